"""Principal component analysis."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from elips_torch.core.errors import ArgumentError
from elips_torch.core.validation import check_count, check_flag
from elips_torch.ops.linear_map import apply_linear_map
from elips_torch.quantizers.principal_axes import principal_axes
from elips_torch.quantizers.transform import CentredTransform, sampled

# Variances below this share of the largest are rounding.
_NO_VARIANCE = 1e-12


class PCA(CentredTransform):
    """Keeps the directions in which vectors vary most (Pearson, 1901), by descending variance.

    Distances change as little as a linear map of this size allows. Inner products do change, because the
    mean is subtracted.

    Args:
        dim_in: D, size of a vector.
        dim_out: number of directions to keep, at most D.
        whiten: scale every direction to variance 1; one without variance becomes 0.
        max_points_per_dim: learn from a random sample of at most so many vectors per feature; None
            learns from all.
        seed: of the sample.
        device: where the learned tensors lie.

    Attributes:
        matrix: ``(dim_out, dim_in)`` float32; empty before `fit`.
        mean: ``(dim_in,)`` float32; empty before `fit`.
        variances: ``(dim_out,)`` float32, of the training vectors along each direction; empty before
            `fit`.

    Raises:
        ElipsError: an argument has a wrong type or value.

    >>> import torch
    >>> vectors = torch.tensor([[0.0, 0.0], [1.0, 2.0], [2.0, 4.0], [3.0, 6.0]])
    >>> pca = PCA(2, 1).fit(vectors)
    >>> pca.reverse(pca(vectors)).round(decimals=3).tolist()
    [[0.0, 0.0], [1.0, 2.0], [2.0, 4.0], [3.0, 6.0]]
    """

    learned_buffers: ClassVar[tuple[str, ...]] = ("matrix", "mean", "variances")

    variances: Tensor

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        *,
        whiten: bool = False,
        max_points_per_dim: int | None = 1000,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(dim_in, dim_out, device)
        if dim_out > dim_in:
            raise ArgumentError(f"dim_out is {dim_out}, expected at most dim_in = {dim_in}")
        self.whiten = check_flag("whiten", whiten)
        if max_points_per_dim is not None:
            check_count("max_points_per_dim", max_points_per_dim)
        self.max_points_per_dim = max_points_per_dim
        self.seed = check_count("seed", seed, 0)

    def config(self) -> dict[str, Any]:
        """Return the constructor keywords that make an untrained transform like this one, for JSON."""
        return {
            "dim_in": self.dim_in,
            "dim_out": self.dim_out,
            "whiten": self.whiten,
            "max_points_per_dim": self.max_points_per_dim,
            "seed": self.seed,
        }

    def _expected_shapes(self) -> dict[str, tuple[int | None, ...]]:
        return {**super()._expected_shapes(), "variances": (self.dim_out,)}

    def _learn(self, vectors: Tensor) -> dict[str, Tensor]:
        if len(vectors) < self.dim_out:
            raise ArgumentError(
                f"vectors has {len(vectors)} rows, expected at least dim_out = {self.dim_out}"
            )
        most = None if self.max_points_per_dim is None else self.max_points_per_dim * self.dim_in
        mean, axes, variances = principal_axes(sampled(vectors, most, self.seed))
        matrix, kept = axes[: self.dim_out], variances[: self.dim_out]
        if self.whiten:
            known = kept > _NO_VARIANCE * variances[0]
            matrix = matrix * torch.where(known, kept.rsqrt(), 0.0)[:, None]
        return {"matrix": matrix.float(), "mean": mean.float(), "variances": kept.float()}

    def _unmap(self, vectors: Tensor) -> Tensor:
        # The rows are orthogonal, so this is the pseudo-inverse.
        squares = self.matrix.double().square().sum(1)
        inverse = self.matrix.double() * torch.where(squares == 0, 0.0, squares.reciprocal())[:, None]
        return apply_linear_map(vectors, inverse.float().T, after=self.mean)
