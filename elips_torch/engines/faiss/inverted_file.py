"""Inverted files of faiss on plain tensors, to measure against."""

from typing import Any

import torch
from torch import Tensor

from elips_torch.core.errors import ArgumentError
from elips_torch.engines.faiss.builds import FaissBuild
from elips_torch.engines.faiss.forked import use_one_thread_if_forked

_QTYPES = {"int8": "QT_8bit", "int6": "QT_6bit", "int4": "QT_4bit", "fp16": "QT_fp16", "bf16": "QT_bf16"}
# Over queries, the usual, and over lists.
PARALLEL_MODES = (0, 1)


class FaissInvertedFile:
    """An inverted file of a build of faiss, on the CPU.

    Objects are made by the build's own constructors only: what functions of faiss return may be dressed as
    classes of another build in the same process.

    Args:
        build: the faiss to use.
        dim: D.
        nlist: number of lists.
        metric: "l2" or "ip"; for cosine pass normalised vectors and "ip".
        qtype: a scalar quantizer, named as `ScalarQuantizer` names it.
        m: number of parts of a product quantizer; with neither, vectors are kept as they are.
        nbits: bits per part.
        niter: passes of k-means.
    """

    def __init__(
        self,
        build: FaissBuild,
        dim: int,
        nlist: int,
        metric: str,
        *,
        qtype: str | None = None,
        m: int | None = None,
        nbits: int = 8,
        niter: int = 20,
    ) -> None:
        faiss: Any = build.module
        if metric not in ("l2", "ip"):
            raise ArgumentError(f"metric is {metric!r}, expected 'l2' or 'ip'")
        kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
        self._quantizer = faiss.IndexFlatL2(dim) if metric == "l2" else faiss.IndexFlatIP(dim)
        arguments = (self._quantizer, dim, nlist)
        if qtype is not None:
            code = getattr(faiss.ScalarQuantizer, _QTYPES[qtype])
            self._index = faiss.IndexIVFScalarQuantizer(*arguments, code, kind)
        elif m is not None:
            self._index = faiss.IndexIVFPQ(*arguments, m, nbits, kind)
            self._index.pq.cp.niter = niter
        else:
            self._index = faiss.IndexIVFFlat(*arguments, kind)
        self._index.cp.niter = niter
        self._build, self._nlist = build, nlist

    def train(self, vectors: Tensor, centroids: Tensor | None = None) -> None:
        """Learn from ``(N, D)`` float32 vectors; what is given as ``(nlist, D)`` centroids is not learned."""
        use_one_thread_if_forked(self._build)
        if centroids is not None:
            self._quantizer.add(centroids.contiguous().numpy())
        self._index.train(vectors.numpy())

    def add(self, vectors: Tensor) -> None:
        """Store ``(N, D)`` float32 vectors."""
        use_one_thread_if_forked(self._build)
        self._index.add(vectors.numpy())

    def search(self, queries: Tensor, k: int, nprobe: int, parallel_mode: int = 0) -> Tensor:
        """Return ``(Q, K)`` row numbers for float32 queries ``(Q, D)``."""
        use_one_thread_if_forked(self._build)
        self._index.nprobe = nprobe
        self._index.parallel_mode = parallel_mode
        return torch.from_numpy(self._index.search(queries.numpy(), k)[1])

    @property
    def centroids(self) -> Tensor:
        """``(nlist, D)`` float32."""
        use_one_thread_if_forked(self._build)
        # An array, or a tensor once something has imported `faiss.contrib.torch_utils`.
        return torch.as_tensor(self._quantizer.reconstruct_n(0, self._nlist))
