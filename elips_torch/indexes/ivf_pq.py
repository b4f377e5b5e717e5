"""Search of the nearest lists, over product-quantized vectors."""

from typing import Any

import torch

from elips_torch.core.tiling import DEFAULT_WORKSPACE_BYTES
from elips_torch.indexes.base import Index
from elips_torch.indexes.ivf_coded import IVFCodedIndex
from elips_torch.kernels.coded_rows import PartRows
from elips_torch.kernels.list_layout import RowDecoder
from elips_torch.quantizers.product import ProductQuantizer


class IVFPQIndex(IVFCodedIndex):
    """Search of the lists nearest to the query, over vectors coded by parts.

    Lists, probing, masks and range search are those of `IVFFlatIndex`. What is stored of a vector is, for
    each of m parts, the number of the nearest centroid of that part; by default the parts are those of
    its difference to the centroid of its list (Jegou, Douze and Schmid, Product quantization for nearest
    neighbor search, 2011). Scores, gradients and `reconstruct` are those of the decoded vectors. The same
    as faiss' IndexIVFPQ.

    Args:
        dim: D, size of a vector.
        nlist: number of lists; about 4 to 16 times the square root of the number of vectors is usual.
        m: number of parts; divides D.
        nbits: bits per part, 8 or 4: 256 or 16 centroids for each.
        metric: name of the distance kind, or an alias.
        by_residual: code the difference of a vector to the centroid of its list rather than the vector.
        nprobe: number of lists that `search` reads; a search parameter.
        k: number of neighbours that `search` returns by default.
        coarse: an empty index that is to hold the centroids, or one that holds them under the ids 0 to
            ``nlist - 1``. Default: a `FlatIndex`.
        niter: passes of k-means over the training vectors, for the lists and for each part.
        seed: of the random numbers of `fit`.
        max_points_per_centroid: the centroids of a part are learned from a random sample of at most so
            many vectors per centroid.
        min_points_per_centroid: `fit` warns when there are fewer than so many.
        p: exponent of metric "lp".
        device: where the database lies.
        index_in_state_dict: whether checkpoints hold the database, and what `fit` has learned.
        check_finite: whether vectors and queries are checked for NaN and infinity.
        workspace_bytes: limit on temporary memory of a search, in bytes. Default 256 MiB.

    Attributes:
        codes: ``(ntotal, code_size)`` uint8, in the order of insertion; a copy.
        assignments: ``(ntotal,)`` int32, the list of each row.
        ids: ``(ntotal,)`` int64, the label of each row.
        coarse: the index of the centroids of the lists.
        quantizer: the `ProductQuantizer`, with the centroids of the parts.

    Raises:
        ElipsError: an argument has a wrong type or value.

    >>> import torch
    >>> vectors = torch.rand(1000, 8, generator=torch.Generator().manual_seed(0))
    >>> index = IVFPQIndex(dim=8, nlist=16, m=4, nbits=4, nprobe=4).fit(vectors)
    >>> ids = index.add(vectors)
    >>> index.codes.shape, index(vectors[:5], k=3).ids.shape
    (torch.Size([1000, 2]), torch.Size([5, 3]))
    """

    quantizer: ProductQuantizer

    def __init__(
        self,
        dim: int,
        nlist: int,
        m: int,
        nbits: int = 8,
        metric: str = "l2",
        *,
        by_residual: bool = True,
        nprobe: int = 8,
        k: int = 10,
        coarse: Index | None = None,
        niter: int = 25,
        seed: int = 0,
        max_points_per_centroid: int | None = 256,
        min_points_per_centroid: int = 39,
        p: float | None = None,
        device: torch.device | str | None = None,
        index_in_state_dict: bool = True,
        check_finite: bool = True,
        workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    ) -> None:
        quantizer = ProductQuantizer(
            dim,
            m,
            nbits,
            niter=niter,
            seed=seed,
            max_points_per_centroid=max_points_per_centroid,
            min_points_per_centroid=min_points_per_centroid,
            device=device,
        )
        super().__init__(
            quantizer,
            nlist,
            metric,
            by_residual=by_residual,
            nprobe=nprobe,
            k=k,
            coarse=coarse,
            niter=niter,
            seed=seed,
            p=p,
            device=device,
            index_in_state_dict=index_in_state_dict,
            check_finite=check_finite,
            workspace_bytes=workspace_bytes,
        )

    @property
    def m(self) -> int:
        """Number of parts."""
        return self.quantizer.m

    @property
    def nbits(self) -> int:
        """Bits per part."""
        return self.quantizer.nbits

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return f"{super().extra_repr()}, m={self.m}, nbits={self.nbits}"

    def config(self) -> dict[str, Any]:
        """Return the constructor keywords that make an empty index like this one, for JSON."""
        return {**super().config(), **self.quantizer.config()}

    def _least_to_fit(self) -> dict[str, int]:
        return {**super()._least_to_fit(), "2**nbits": self.quantizer.ksub}

    def _examples(self) -> int | None:
        return self.quantizer.n_examples

    def _decoder(self) -> RowDecoder:
        quantizer = self.quantizer
        return PartRows(
            self._decode,
            lambda rows: quantizer.entries(self._codes_of(rows)),
            quantizer.codebooks,
            self._centroids_of if self.by_residual else None,
            self._screened(),
        )
