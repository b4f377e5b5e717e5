"""Rotations that make vectors easy to code by signs."""

from typing import Any

import torch
from torch import Tensor

from elips_torch.core.errors import ArgumentError
from elips_torch.core.validation import check_count
from elips_torch.quantizers.principal_axes import principal_axes
from elips_torch.quantizers.rotations import closest_rotation, orthonormal, product
from elips_torch.quantizers.transform import CentredTransform, sampled


class ITQ(CentredTransform):
    """Principal directions, rotated so that the signs of the result lose least.

    Gong and Lazebnik, Iterative Quantization: a Procrustean approach to learning binary codes, 2011.

    Args:
        dim_in: D, size of a vector.
        dim_out: number of signs, at most D; default is D.
        niter: rounds of taking signs and rotating towards them.
        max_points_per_dim: learn from a random sample of at most so many vectors per feature; None
            learns from all.
        seed: of the random numbers.
        device: where the learned tensors lie.

    Attributes:
        matrix: ``(dim_out, dim_in)`` float32 with orthonormal rows; empty before `fit`.
        mean: ``(dim_in,)`` float32; empty before `fit`.

    Raises:
        ElipsError: an argument has a wrong type or value.

    >>> import torch
    >>> vectors = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    >>> bits = ITQ(8, 4).fit(vectors)(vectors) > 0
    >>> bits.shape
    torch.Size([500, 4])
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int | None = None,
        *,
        niter: int = 50,
        max_points_per_dim: int | None = 100,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(dim_in, dim_in if dim_out is None else dim_out, device)
        if self.dim_out > self.dim_in:
            raise ArgumentError(f"dim_out is {dim_out}, expected at most dim_in = {dim_in}")
        self.niter = check_count("niter", niter, 0)
        if max_points_per_dim is not None:
            check_count("max_points_per_dim", max_points_per_dim)
        self.max_points_per_dim = max_points_per_dim
        self.seed = check_count("seed", seed, 0)

    def config(self) -> dict[str, Any]:
        """Return the constructor keywords that make an untrained transform like this one, for JSON."""
        return {
            "dim_in": self.dim_in,
            "dim_out": self.dim_out,
            "niter": self.niter,
            "max_points_per_dim": self.max_points_per_dim,
            "seed": self.seed,
        }

    def _learn(self, vectors: Tensor) -> dict[str, Tensor]:
        if len(vectors) < self.dim_out:
            raise ArgumentError(
                f"vectors has {len(vectors)} rows, expected at least dim_out = {self.dim_out}"
            )
        most = None if self.max_points_per_dim is None else self.max_points_per_dim * self.dim_in
        vectors = sampled(vectors, most, self.seed)
        mean, axes, _ = principal_axes(vectors)
        kept = axes[: self.dim_out]
        reduced = product(vectors - mean.float(), kept.float().T)
        rotation = orthonormal(self.dim_out, self.dim_out, self.seed).to(vectors.device)
        for _ in range(self.niter):
            signs = torch.where(product(reduced, rotation.T) < 0, -1.0, 1.0)
            rotation = closest_rotation(reduced, signs).float()
        return {"matrix": (rotation.double() @ kept).float(), "mean": mean.float()}
