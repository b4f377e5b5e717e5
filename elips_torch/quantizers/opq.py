"""Rotations that make vectors easy to code by parts."""

import math
from typing import Any

import torch
from torch import Tensor

from elips_torch.core.errors import ArgumentError
from elips_torch.ops.assign import assign
from elips_torch.quantizers.kmeans import KMeans
from elips_torch.quantizers.learned import check_count
from elips_torch.quantizers.lloyd import full_step
from elips_torch.quantizers.principal_axes import principal_axes
from elips_torch.quantizers.rotations import closest_rotation, product
from elips_torch.quantizers.transform import LinearTransform, sampled

# Variances below this share of the largest count as this: a product of variances needs no zero.
_LEAST_VARIANCE = 1e-9


class OPQ(LinearTransform):
    """Rotates vectors so that a product quantizer of m parts loses least.

    It starts from principal axes, dealt to the parts so that all have about the same product of variances,
    and then alternates between coding the rotated vectors and rotating them closest to what their
    codes mean (Ge et al., Optimized Product Quantization, 2013).

    Args:
        dim: D, size of a vector.
        m: number of parts that the product quantizer will have.
        dim_out: size of a rotated vector, at most D; default is D. m divides it.
        nbits: bits of the code of a part while learning.
        niter: rounds of coding and rotating.
        max_points: learn from a random sample of at most so many vectors; default is 256 per centroid.
        seed: of the random numbers.
        device: where the matrix lies.

    Attributes:
        matrix: ``(dim_out, dim)`` float32 with orthonormal rows; empty before `fit`.
        history: mean squared distance between rotated training vectors and what their codes mean, at
            each round.

    Raises:
        ElipsError: an argument has a wrong type or value.

    >>> import torch
    >>> vectors = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    >>> opq = OPQ(8, m=4, nbits=4).fit(vectors)
    >>> torch.allclose(opq.reverse(opq(vectors)), vectors, atol=1e-5)
    True
    """

    def __init__(
        self,
        dim: int,
        m: int,
        *,
        dim_out: int | None = None,
        nbits: int = 8,
        niter: int = 25,
        max_points: int | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(dim, dim if dim_out is None else dim_out, device)
        if self.dim_out > self.dim_in:
            raise ArgumentError(f"dim_out is {dim_out}, expected at most dim = {dim}")
        self.m = check_count("m", m)
        if self.dim_out % m:
            name = "dim" if dim_out is None else "dim_out"
            raise ArgumentError(f"m is {m}, expected a divisor of {name} = {self.dim_out}")
        self.nbits = check_count("nbits", nbits)
        if nbits > 16:
            raise ArgumentError(f"nbits is {nbits}, expected at most 16")
        self.niter = check_count("niter", niter, 0)
        self.max_points = None if max_points is None else check_count("max_points", max_points)
        self.seed = check_count("seed", seed, 0)
        self.history: list[float] = []

    def config(self) -> dict[str, Any]:
        """Return the constructor keywords that make an untrained transform like this one, for JSON."""
        return {
            "dim": self.dim_in,
            "m": self.m,
            "dim_out": self.dim_out,
            "nbits": self.nbits,
            "niter": self.niter,
            "max_points": self.max_points,
            "seed": self.seed,
        }

    def _learn(self, vectors: Tensor) -> dict[str, Tensor]:
        k = 2**self.nbits
        if len(vectors) < k:
            raise ArgumentError(f"vectors has {len(vectors)} rows, expected at least 2**nbits = {k}")
        vectors = sampled(vectors, 256 * k if self.max_points is None else max(k, self.max_points), self.seed)
        mean, axes, variances = principal_axes(vectors)
        # The quantizer learns where its parts lie, so the mean plays no role.
        vectors = vectors - mean.float()
        rotation = axes[_dealt(variances[: self.dim_out], self.m)].float()
        history = []
        codebooks: list[Tensor] = []
        for _ in range(self.niter):
            parts = product(vectors, rotation.T).chunk(self.m, dim=1)
            if not codebooks:
                codebooks = [_codebook(part, k, self.seed + i) for i, part in enumerate(parts)]
            decoded, error = _coded(parts, codebooks)
            history.append(error)
            rotation = closest_rotation(vectors, decoded).float()
        self.history = history
        return {"matrix": rotation}


def _codebook(part: Tensor, k: int, seed: int) -> Tensor:
    """Return the centroids ``(k, D)`` of one part of the vectors."""
    kmeans = KMeans(k, niter=10, seed=seed, max_points_per_centroid=None, min_points_per_centroid=0)
    return kmeans.fit(part).centroids


def _coded(parts: tuple[Tensor, ...], codebooks: list[Tensor]) -> tuple[Tensor, float]:
    """Take one step of k-means in every part; updates the codebooks.

    Returns:
        What the codes of the vectors mean ``(N, dim_out)``, and its mean squared distance to them before
        the step.
    """
    decoded, error = [], 0.0
    for i, part in enumerate(parts):
        part = part.contiguous()
        labels = assign(part, codebooks[i])
        codebooks[i], lost = full_step(part, codebooks[i], labels, spherical=False)
        decoded.append(codebooks[i][labels])
        error += lost
    return torch.cat(decoded, dim=1), error


def _dealt(variances: Tensor, m: int) -> list[int]:
    """Deal axes ``(O,)``, by descending variance, to m parts of one size and about the same product.

    Returns:
        Numbers of axes in the order of the parts.
    """
    least = max(float(variances[0]) * _LEAST_VARIANCE, 1e-300)
    hands: list[list[int]] = [[] for _ in range(m)]
    weights = [0.0] * m
    for axis, variance in enumerate(variances.tolist()):
        free = [i for i in range(m) if len(hands[i]) < len(variances) // m]
        part = min(free, key=weights.__getitem__)
        hands[part].append(axis)
        # Relative to the least, so that no logarithm is negative and full hands weigh more.
        weights[part] += math.log(max(variance, least) / least)
    return [axis for hand in hands for axis in hand]
