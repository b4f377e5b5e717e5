"""Search of the nearest lists, over scalar-quantized vectors."""

from typing import Any

import torch

from elips_torch.core.tiling import DEFAULT_WORKSPACE_BYTES
from elips_torch.indexes.base import Index
from elips_torch.indexes.code_screen import check_code_screen
from elips_torch.indexes.ivf_coded import IVFCodedIndex
from elips_torch.quantizers.scalar import ScalarQuantizer

# As many as faiss takes: a range changes little with more.
_EXAMPLES = 100_000


class IVFSQIndex(IVFCodedIndex):
    """Search of the lists nearest to the query, over vectors coded in 4 to 16 bits per feature.

    Lists, probing, masks and range search are those of `IVFFlatIndex`. What is stored of a vector is a
    code, by default of its difference to the centroid of its list, which spans a smaller range than the
    vector. Scores, gradients and `reconstruct` are those of the decoded vectors. The same as faiss'
    IndexIVFScalarQuantizer.

    Args:
        dim: D, size of a vector.
        nlist: number of lists; about 4 to 16 times the square root of the number of vectors is usual.
        qtype: "int8", "int6", "int4", "fp16" or "bf16", as for `SQIndex`.
        metric: name of the distance kind, or an alias.
        by_residual: code the difference of a vector to the centroid of its list rather than the vector.
        nprobe: number of lists that `search` reads; a search parameter.
        k: number of neighbours that `search` returns by default.
        screen: "auto" keeps what screens the codes, on CPUs that multiply int8 fast: 8 bytes of each vector;
            for "fp16" and "bf16" an int8 copy, a byte of each feature and 16 more. "none" keeps nothing.
        coarse: an empty index that is to hold the centroids, or one that holds them under the ids 0 to
            ``nlist - 1``. Default: a `FlatIndex`.
        niter: passes of k-means over the training vectors.
        seed: of the random numbers of k-means.
        p: exponent of metric "lp".
        device: where the database lies.
        index_in_state_dict: whether checkpoints hold the database, and what `fit` has learned.
        check_finite: whether vectors and queries are checked for NaN and infinity.
        workspace_bytes: limit on temporary memory of a search, in bytes. Default 256 MiB.

    Attributes:
        codes: ``(ntotal, code_size)`` uint8, in the order of insertion; a copy.
        assignments: ``(ntotal,)`` int32, the list of each row.
        ids: ``(ntotal,)`` int64, the label of each row.
        coarse: the index of the centroids.
        quantizer: the `ScalarQuantizer`, with the ranges.

    Raises:
        ElipsError: an argument has a wrong type or value.

    >>> import torch
    >>> vectors = torch.rand(1000, 8, generator=torch.Generator().manual_seed(0))
    >>> index = IVFSQIndex(dim=8, nlist=16, qtype="int8", nprobe=4).fit(vectors)
    >>> ids = index.add(vectors)
    >>> index(vectors[:2], k=1).ids.tolist()
    [[0], [1]]
    """

    quantizer: ScalarQuantizer

    def __init__(
        self,
        dim: int,
        nlist: int,
        qtype: str = "int8",
        metric: str = "l2",
        *,
        by_residual: bool = True,
        nprobe: int = 8,
        k: int = 10,
        screen: str = "auto",
        coarse: Index | None = None,
        niter: int = 20,
        seed: int = 0,
        p: float | None = None,
        device: torch.device | str | None = None,
        index_in_state_dict: bool = True,
        check_finite: bool = True,
        workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    ) -> None:
        super().__init__(
            ScalarQuantizer(dim, qtype, device=device),
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
        self.screen = check_code_screen(screen)

    @property
    def qtype(self) -> str:
        """How features are coded."""
        return self.quantizer.qtype

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return f"{super().extra_repr()}, qtype={self.qtype!r}"

    def config(self) -> dict[str, Any]:
        """Return the constructor keywords that make an empty index like this one, for JSON."""
        return {**super().config(), "qtype": self.qtype, "screen": self.screen}

    def _examples(self) -> int | None:
        return _EXAMPLES
