"""Taking an index to faiss, as a method of every index."""

import importlib
from collections.abc import Sequence
from typing import Any

import torch


class FaissExport:
    """Gives indexes the verb `to_faiss`."""

    def to_faiss(
        self,
        device: torch.device | str | Sequence[torch.device | str] | None = None,
        *,
        binary: bool = False,
        precomputed_tables: bool | None = None,
        **gpu_options: Any,
    ) -> Any:
        """Make an index of faiss that holds the same values and finds the same ids.

        Scores are equal to float rounding. Vectors in other dtypes become float32 (those that `RefineIndex`
        keeps in float16 and bfloat16 stay that). Where the ids are 0 to ntotal - 1 in this order, faiss
        numbers rows itself; else inverted files hold them, and an ``IndexIDMap2`` does for the others.
        "cosine" becomes the inner product of vectors that faiss normalises. Parameters of searches
        (``nprobe``, ``k_factor``) come along. Faiss can search, add and remove at once; for
        ``reconstruct(id)`` in an inverted file it wants ``set_direct_map_type(faiss.DirectMap.Hashtable)``.
        A `FaissIndex` gives a copy of its index, under its ids and without the rows that were removed.

        Args:
            device: a GPU to copy the index to, or several, each with all of it or, with ``shard=True``, with
                a part; default is the CPU.
            binary: make an ``IndexBinaryFlat``, on the CPU, of a `FlatIndex` under "l2" whose vectors are
                zeros and ones. It takes a bit for each, and its Hamming distances are the same scores.
            precomputed_tables: for product-quantized residuals under "l2", whether faiss keeps tables of
                products of centroids, which make its searches faster and take ``nlist * m * 2**nbits``
                floats; default is as faiss decides, by their size.
            **gpu_options: for GPUs, ``use_float16``, ``use_float16_coarse``, ``interleaved_layout``,
                ``indices_options``, ``reserve_vectors``, ``temp_memory_bytes``, ``pinned_memory_bytes``,
                ``memory_space``, ``allow_cpu_coarse``, ``use_cuvs`` and ``shard``: fields of `GpuOptions`.

        Returns:
            The index of faiss, which shares no memory with this one.

        Raises:
            ConversionError: faiss has no such index, ``binary`` is asked of vectors that are no bits, or rows
                of a `FaissIndex` were removed whose family takes none out.
            DeviceError: a GPU is asked for, and there is none.
            ParameterError: no such option.
            ImportError: faiss is not installed.
        """
        # That module knows every class of index, and all of them import this file.
        conversion = importlib.import_module("elips_torch.indexes.faiss_conversion")
        return conversion.to_faiss(
            self, device, binary=binary, precomputed_tables=precomputed_tables, **gpu_options
        )
