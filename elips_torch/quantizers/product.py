"""Product quantization: the parts of a vector, each by the nearest of its own centroids."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from elips_torch.core.errors import ArgumentError, DtypeError, MetricError
from elips_torch.core.execution import plain_arithmetic
from elips_torch.core.metric import resolve_metric
from elips_torch.core.tiling import spans
from elips_torch.core.user_warnings import warn_user
from elips_torch.kernels.coded_rows import PackedTable
from elips_torch.ops.assign import assign
from elips_torch.quantizers.kmeans import KMeans
from elips_torch.quantizers.packing import pack, packed_size, unpack
from elips_torch.quantizers.quantizer import Quantizer, check_dim

_NBITS = (4, 8)
# Features coded or looked up at a time: the temporaries stay in cache.
_FEATURES_AT_ONCE = 2**18


class ProductQuantizer(Quantizer):
    """Codes each of m parts of a vector by the nearest of its own ``2**nbits`` centroids.

    The centroids of each part are found by k-means (Jegou, Douze and Schmid, Product quantization for
    nearest neighbor search, 2011). Codes are those of faiss' ProductQuantizer: one byte a part, or with 4
    bits two parts a byte, the first in the low half.

    Args:
        dim: D, size of a vector.
        m: number of parts; divides D.
        nbits: bits per part, 8 or 4: 256 or 16 centroids for each.
        niter: passes of k-means over the training vectors.
        seed: of the random numbers of k-means; each part has its own.
        max_points_per_centroid: train on a random sample of at most so many vectors per centroid.
        min_points_per_centroid: warn when there are fewer than so many.
        device: where the centroids lie.

    Attributes:
        codebooks: ``(m, 2**nbits, D / m)`` float32, the centroids of each part; empty before `fit`.

    Raises:
        ElipsError: an argument has a wrong type or value.

    >>> import torch
    >>> vectors = torch.rand(100, 8)
    >>> quantizer = ProductQuantizer(8, m=4, nbits=4, min_points_per_centroid=1).fit(vectors)
    >>> codes = quantizer.encode(vectors)
    >>> codes.shape, quantizer.decode(codes).shape
    (torch.Size([100, 2]), torch.Size([100, 8]))
    """

    learned_buffers: ClassVar[tuple[str, ...]] = ("codebooks",)

    codebooks: Tensor

    def __init__(
        self,
        dim: int,
        m: int,
        nbits: int = 8,
        *,
        niter: int = 25,
        seed: int = 0,
        max_points_per_centroid: int | None = 256,
        min_points_per_centroid: int = 39,
        device: torch.device | str | None = None,
    ) -> None:
        check_dim(dim)
        if isinstance(m, bool) or not isinstance(m, int):
            raise DtypeError(f"m is {m!r}, expected an int")
        if m < 1 or dim % m:
            raise ArgumentError(f"m is {m}, which does not divide dim = {dim} into equal parts")
        if nbits not in _NBITS:
            raise ArgumentError(f"nbits is {nbits!r}, expected 8 or 4")
        super().__init__(dim, packed_size(m, nbits), device)
        # Made for its checks alone: a wrong number is to be refused here rather than in `fit`.
        KMeans(
            2**nbits,
            niter=niter,
            seed=seed,
            max_points_per_centroid=max_points_per_centroid,
            min_points_per_centroid=min_points_per_centroid,
        )
        self.m = m
        self.nbits = nbits
        self.niter = niter
        self.seed = seed
        self.max_points_per_centroid = max_points_per_centroid
        self.min_points_per_centroid = min_points_per_centroid

    @property
    def ksub(self) -> int:
        """Number of centroids of each part."""
        return 16 if self.nbits == 4 else 256

    @property
    def dsub(self) -> int:
        """Size of each part."""
        return self.dim // self.m

    @property
    def n_examples(self) -> int | None:
        """Number of vectors that `fit` learns from at most; None for all."""
        most = self.max_points_per_centroid
        return None if most is None else most * self.ksub

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return f"dim={self.dim}, m={self.m}, nbits={self.nbits}"

    def config(self) -> dict[str, Any]:
        """Return the constructor keywords beside ``dim`` and ``device``, for JSON."""
        return {
            "m": self.m,
            "nbits": self.nbits,
            "niter": self.niter,
            "seed": self.seed,
            "max_points_per_centroid": self.max_points_per_centroid,
            "min_points_per_centroid": self.min_points_per_centroid,
        }

    def lookup_tables(self, queries: Tensor, metric: str = "l2") -> Tensor:
        """Return what each centroid adds to the score of a vector that is coded by it.

        Args:
            queries: ``(Q, D)`` float32, float16, bfloat16 or float64, on the quantizer's device.
            metric: "l2" or "ip", or an alias.

        Returns:
            ``(Q, m, 2**nbits)`` float32. The score of a code is the sum of one entry per part.

        Raises:
            NotFittedError: before `fit`.
            MetricError: the metric is not a sum over parts.
            ElipsError: queries of wrong type, shape, dtype or device.
        """
        self._check_fitted("lookup_tables")
        kind = resolve_metric(metric)
        if kind.name not in ("l2", "ip"):
            raise MetricError(f"metric is {metric!r}, lookup tables exist for 'l2' and 'ip'")
        self._check("queries", queries, finite=False)
        tables = torch.empty(queries.shape[0], self.m, self.ksub, dtype=torch.float32, device=queries.device)
        with plain_arithmetic(queries.device):
            for start, stop in spans(queries.shape[0], max(1, _FEATURES_AT_ONCE // (self.ksub * self.dim))):
                # No matrix product, whose precision is the caller's to set.
                parts = queries[start:stop].detach().float().reshape(-1, self.m, 1, self.dsub)
                terms = parts * self.codebooks if kind.name == "ip" else (parts - self.codebooks).square_()
                torch.sum(terms, 3, out=tables[start:stop])
        return tables

    def packed_table(self) -> PackedTable:
        """Return the codebooks."""
        return PackedTable(self.codebooks, bits=self.nbits)

    def entries(self, codes: Tensor) -> Tensor:
        """Return the centroids of codes ``(N, code_size)``.

        Returns:
            ``(N, m)`` int32, numbers among the centroids of all parts, those of the first part first.
        """
        first = torch.arange(0, self.m * self.ksub, self.ksub, dtype=torch.int32, device=codes.device)
        return unpack(codes, self.nbits, self.m).to(torch.int32).add_(first)

    def _expected_shapes(self) -> dict[str, tuple[int | None, ...]]:
        return {"codebooks": (self.m, self.ksub, self.dsub)}

    def _learn(self, vectors: Tensor) -> dict[str, Tensor]:
        n = vectors.shape[0]
        if n < self.ksub:
            raise ArgumentError(f"vectors has {n} rows, expected at least 2**nbits = {self.ksub}")
        wanted = self.min_points_per_centroid * self.ksub
        if n < wanted:
            warn_user(
                f"vectors has {n} rows to learn {self.ksub} centroids per part from, expected at least "
                f"{wanted}; min_points_per_centroid sets this limit"
            )
        codebooks = []
        for number, part in enumerate(vectors.view(n, self.m, self.dsub).unbind(1)):
            kmeans = KMeans(
                self.ksub,
                niter=self.niter,
                seed=self.seed + number,
                max_points_per_centroid=self.max_points_per_centroid,
                min_points_per_centroid=0,
            )
            codebooks.append(kmeans.fit(part).centroids)
        return {"codebooks": torch.stack(codebooks)}

    def _encode(self, vectors: Tensor, check_finite: bool) -> Tensor:
        numbers = torch.empty(vectors.shape[0], self.m, dtype=torch.uint8, device=vectors.device)
        if not check_finite:
            vectors = vectors.float().nan_to_num()
        for number, part in enumerate(vectors.float().view(-1, self.m, self.dsub).unbind(1)):
            numbers[:, number] = assign(part.contiguous(), self.codebooks[number], "l2")
        return pack(numbers, self.nbits)

    def _decode(self, codes: Tensor) -> Tensor:
        vectors = torch.empty(codes.shape[0], self.dim, dtype=torch.float32, device=codes.device)
        centroids = self.codebooks.view(self.m * self.ksub, self.dsub)
        parts = vectors.view(-1, self.m, self.dsub)
        for start, stop in spans(codes.shape[0], max(1, _FEATURES_AT_ONCE // self.dim)):
            entries = self.entries(codes[start:stop])
            parts[start:stop] = centroids.index_select(0, entries.flatten()).view(-1, self.m, self.dsub)
        return vectors
