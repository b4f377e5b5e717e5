"""What every transform of vectors shares."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from elips_torch.core.errors import NotFittedError
from elips_torch.core.metric import resolve_metric
from elips_torch.core.validation import check_device, check_values, check_vectors
from elips_torch.ops.linear_map import apply_linear_map
from elips_torch.quantizers.learned import Learned, check_count, in_float32, learning
from elips_torch.quantizers.seeding import sample_rows

# Any finite value can be transformed.
_ANY_FINITE = resolve_metric("l2")


class Transform(Learned, ABC):
    """Maps vectors of one size to vectors of another; base of all transforms.

    Results are float32 and depend on each vector alone, not on those beside it, the number of threads or
    the settings of the caller. Gradients flow through `forward` and `reverse`.

    Args:
        dim_in: D, size of a vector.
        dim_out: size of a transformed vector.
        device: where the learned tensors lie.
    """

    def __init__(self, dim_in: int, dim_out: int, device: torch.device | str | None = None) -> None:
        super().__init__(device)
        self.dim_in = check_count("dim_in", dim_in)
        self.dim_out = check_count("dim_out", dim_out)

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Return the constructor keywords that make an untrained transform like this one, for JSON."""

    @abstractmethod
    def _learn(self, vectors: Tensor) -> dict[str, Tensor]:
        """Return the learned buffers for float32 ``(N, D)`` vectors."""

    @abstractmethod
    def _map(self, vectors: Tensor) -> Tensor:
        """Return ``(N, dim_out)`` float32 for ``(N, dim_in)``."""

    @abstractmethod
    def _unmap(self, vectors: Tensor) -> Tensor:
        """Return ``(N, dim_in)`` float32 for ``(N, dim_out)``."""

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return ", ".join(f"{name}={value!r}" for name, value in self.config().items())

    def fit(self, vectors: Tensor) -> Self:
        """Learn from vectors.

        Args:
            vectors: ``(N, dim_in)`` float32, float16, bfloat16 or float64; finite. What is learned will lie
                on their device.

        Returns:
            The transform itself.

        Raises:
            ElipsError: vectors of wrong type, shape, dtype or value, or too few.
        """
        check_vectors("vectors", vectors, dim=self.dim_in, owner=type(self).__name__)
        vectors = in_float32(vectors)
        check_values("vectors", vectors, _ANY_FINITE)
        with learning(vectors.device):
            self._buffers.update(self._learn(vectors.float()))
        return self

    def forward(self, vectors: Tensor) -> Tensor:
        """Transform vectors.

        Args:
            vectors: ``(N, dim_in)`` or ``(dim_in,)`` float32, float16, bfloat16 or float64.

        Returns:
            ``(N, dim_out)`` or ``(dim_out,)`` float32.

        Raises:
            NotFittedError: before `fit`.
            ElipsError: vectors of wrong type, shape, dtype or device.
        """
        self._check(vectors, self.dim_in)
        return self._map(vectors[None])[0] if vectors.ndim == 1 else self._map(vectors)

    def reverse(self, vectors: Tensor) -> Tensor:
        """Return vectors that `forward` maps to these, as far as there are such.

        Args:
            vectors: ``(N, dim_out)`` or ``(dim_out,)`` float32, float16, bfloat16 or float64.

        Returns:
            ``(N, dim_in)`` or ``(dim_in,)`` float32.

        Raises:
            NotFittedError: before `fit`.
            ElipsError: vectors of wrong type, shape, dtype or device.
        """
        self._check(vectors, self.dim_out)
        return self._unmap(vectors[None])[0] if vectors.ndim == 1 else self._unmap(vectors)

    def _check(self, vectors: Tensor, dim: int) -> None:
        if not self.is_trained:
            raise NotFittedError(f"{type(self).__name__} has learned nothing yet; call fit(vectors) first")
        check_vectors("vectors", vectors, dim=dim, owner=type(self).__name__, allow_single=True)
        for name in self.learned_buffers:
            check_device("vectors", vectors, getattr(self, name).device, type(self).__name__)


class LinearTransform(Transform):
    """A transform by a matrix with orthogonal rows or columns; subclasses learn it.

    Attributes:
        matrix: ``(dim_out, dim_in)`` float32; empty before `fit`.
    """

    learned_buffers: ClassVar[tuple[str, ...]] = ("matrix",)

    matrix: Tensor

    def _expected_shapes(self) -> dict[str, tuple[int | None, ...]]:
        return {"matrix": (self.dim_out, self.dim_in)}

    def _map(self, vectors: Tensor) -> Tensor:
        return apply_linear_map(vectors, self.matrix)

    def _unmap(self, vectors: Tensor) -> Tensor:
        return apply_linear_map(vectors, self.matrix.T)


class CentredTransform(LinearTransform):
    """A linear transform of vectors less their mean.

    Attributes:
        matrix: ``(dim_out, dim_in)`` float32; empty before `fit`.
        mean: ``(dim_in,)`` float32; empty before `fit`.
    """

    learned_buffers: ClassVar[tuple[str, ...]] = ("matrix", "mean")

    mean: Tensor

    def _expected_shapes(self) -> dict[str, tuple[int | None, ...]]:
        return {"matrix": (self.dim_out, self.dim_in), "mean": (self.dim_in,)}

    def _map(self, vectors: Tensor) -> Tensor:
        return apply_linear_map(vectors, self.matrix, before=self.mean)

    def _unmap(self, vectors: Tensor) -> Tensor:
        return apply_linear_map(vectors, self.matrix.T, after=self.mean)


def sampled(vectors: Tensor, most: int | None, seed: int) -> Tensor:
    """Return at most so many of the vectors ``(N, D)``, drawn at random."""
    if most is None or len(vectors) <= most:
        return vectors
    rows = sample_rows(len(vectors), most, torch.Generator("cpu").manual_seed(seed))
    return vectors[rows.to(vectors.device)]
