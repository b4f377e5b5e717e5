"""Search among product-quantized vectors."""

from typing import Any

import torch

from elips_torch.core.tiling import DEFAULT_WORKSPACE_BYTES
from elips_torch.indexes.coded import CodedIndex
from elips_torch.quantizers.product import ProductQuantizer


class PQIndex(CodedIndex):
    """Search among vectors whose parts are stored as the numbers of their nearest centroids.

    A vector of D features takes ``m * nbits / 8`` bytes (Jegou, Douze and Schmid, Product quantization for
    nearest neighbor search, 2011). Searches are exact for the decoded vectors: scores, gradients and
    `reconstruct` are theirs. A few queries select by lookup tables, many among decoded vectors; the
    result is the same. Codes are those of faiss' IndexPQ.

    Args:
        dim: D, size of a vector.
        m: number of parts; divides D.
        nbits: bits per part, 8 or 4: 256 or 16 centroids for each.
        metric: name of the distance kind, or an alias. Under "cosine", too, vectors are coded as they are.
        k: number of neighbours that `search` returns by default.
        niter: passes of k-means in `fit`.
        seed: of the random numbers of `fit`.
        max_points_per_centroid: `fit` trains on a random sample of at most so many vectors per centroid.
        min_points_per_centroid: `fit` warns when there are fewer than so many.
        p: exponent of metric "lp".
        device: where the database lies.
        index_in_state_dict: whether checkpoints hold the database, and what `fit` has learned.
        check_finite: whether vectors and queries are checked for NaN and infinity.
        workspace_bytes: limit on temporary memory of a search, in bytes. Default 256 MiB.

    Attributes:
        codes: ``(ntotal, code_size)`` uint8, in the order of insertion.
        ids: ``(ntotal,)`` int64, the label of each row.
        quantizer: the `ProductQuantizer`, with the centroids.

    Raises:
        ElipsError: an argument has a wrong type or value.

    >>> import torch
    >>> vectors = torch.rand(1000, 8, generator=torch.Generator().manual_seed(0))
    >>> index = PQIndex(8, m=4, nbits=4).fit(vectors)
    >>> ids = index.add(vectors)
    >>> index.codes.shape, index.reconstruct(3).shape
    (torch.Size([1000, 2]), torch.Size([8]))
    >>> index.search(vectors[:5], k=3).ids.shape
    torch.Size([5, 3])
    """

    quantizer: ProductQuantizer

    def __init__(
        self,
        dim: int,
        m: int,
        nbits: int = 8,
        metric: str = "l2",
        *,
        k: int = 10,
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
            metric,
            k=k,
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
