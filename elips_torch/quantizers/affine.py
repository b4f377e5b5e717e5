"""Plain transforms that other libraries build upon: a mean taken off, a matrix that is given."""

from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from elips_torch.core.errors import NotFittedError, ShapeError
from elips_torch.core.validation import check_vectors
from elips_torch.ops.linear_map import apply_linear_map
from elips_torch.quantizers.learned import in_float32, learning
from elips_torch.quantizers.transform import LinearTransform, Transform


class AffineMap(LinearTransform):
    """Maps vectors by a matrix of any kind and adds a bias.

    `reverse` goes by the pseudo-inverse.

    Args:
        dim_in: D, size of a vector.
        dim_out: size of a transformed vector; default is D.
        device: where the tensors lie.

    Attributes:
        matrix: ``(dim_out, dim_in)`` float32; empty before `give`.
        bias: ``(dim_out,)`` float32; empty before `give`.

    Raises:
        ElipsError: an argument has a wrong type or value.

    >>> import torch
    >>> double = AffineMap(2).give(2 * torch.eye(2), torch.tensor([0.0, 1.0]))
    >>> double(torch.tensor([1.0, 1.0])), double.reverse(torch.tensor([2.0, 3.0]))
    (tensor([2., 3.]), tensor([1., 1.]))
    """

    learned_buffers: ClassVar[tuple[str, ...]] = ("matrix", "bias")

    bias: Tensor

    def __init__(
        self, dim_in: int, dim_out: int | None = None, *, device: torch.device | str | None = None
    ) -> None:
        super().__init__(dim_in, dim_in if dim_out is None else dim_out, device)

    def give(self, matrix: Tensor, bias: Tensor | None = None) -> Self:
        """Take tensors over, in float32, copied.

        Args:
            matrix: ``(dim_out, dim_in)``.
            bias: ``(dim_out,)``; default is zero.

        Returns:
            The transform itself.

        Raises:
            ElipsError: a tensor of wrong type or shape.
        """
        check_vectors("matrix", matrix, dim=self.dim_in, owner="the map")
        if len(matrix) != self.dim_out:
            raise ShapeError(f"matrix has {len(matrix)} rows, expected dim_out = {self.dim_out}")
        if bias is None:
            bias = matrix.new_zeros(self.dim_out)
        check_vectors("bias", bias[None], dim=self.dim_out, owner="the result")
        with learning(matrix.device):
            self._buffers.update(
                {"matrix": in_float32(matrix).float().clone(), "bias": in_float32(bias).float().clone()}
            )
        return self

    def config(self) -> dict[str, Any]:
        """Return the constructor keywords that make an empty map like this one, for JSON."""
        return {"dim_in": self.dim_in, "dim_out": self.dim_out}

    def fit(self, vectors: Tensor) -> Self:
        """Refuse where tensors have not been given: the map learns nothing.

        Raises:
            NotFittedError: before `give`.
        """
        if not self.is_trained:
            raise NotFittedError("AffineMap learns nothing: call give(matrix, bias)")
        return super().fit(vectors)

    def _learn(self, vectors: Tensor) -> dict[str, Tensor]:
        return {name: getattr(self, name).to(vectors.device) for name in self.learned_buffers}

    def _expected_shapes(self) -> dict[str, tuple[int | None, ...]]:
        return {**super()._expected_shapes(), "bias": (self.dim_out,)}

    def _map(self, vectors: Tensor) -> Tensor:
        return apply_linear_map(vectors, self.matrix, after=self.bias)

    def _unmap(self, vectors: Tensor) -> Tensor:
        inverse = torch.linalg.pinv(self.matrix.double()).float()
        return apply_linear_map(vectors, inverse, before=self.bias)


class Centring(Transform):
    """Subtracts the mean of the vectors of `fit`.

    Args:
        dim: D, size of a vector.
        device: where the mean lies.

    Attributes:
        mean: ``(D,)`` float32; empty before `fit`.

    Raises:
        ElipsError: an argument has a wrong type or value.

    >>> import torch
    >>> Centring(2).fit(torch.tensor([[0.0, 0.0], [2.0, 4.0]]))(torch.tensor([1.0, 1.0]))
    tensor([ 0., -1.])
    """

    learned_buffers: ClassVar[tuple[str, ...]] = ("mean",)

    mean: Tensor

    def __init__(self, dim: int, *, device: torch.device | str | None = None) -> None:
        super().__init__(dim, dim, device)

    def config(self) -> dict[str, Any]:
        """Return the constructor keywords that make an empty transform like this one, for JSON."""
        return {"dim": self.dim_in}

    def _expected_shapes(self) -> dict[str, tuple[int | None, ...]]:
        return {"mean": (self.dim_in,)}

    def _learn(self, vectors: Tensor) -> dict[str, Tensor]:
        return {"mean": vectors.double().mean(0).float()}

    def _map(self, vectors: Tensor) -> Tensor:
        return vectors.float() - self.mean

    def _unmap(self, vectors: Tensor) -> Tensor:
        return vectors.float() + self.mean
