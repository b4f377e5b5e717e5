"""What every quantizer of vectors shares: its verbs and their checks."""

from abc import ABC, abstractmethod
from typing import Any, Self

import torch
from torch import Tensor

from elips_torch.core.errors import ArgumentError, DtypeError, NotFittedError, ShapeError
from elips_torch.core.execution import plain_arithmetic
from elips_torch.core.metric import resolve_metric
from elips_torch.core.validation import check_device, check_values, check_vectors
from elips_torch.kernels.coded_rows import PackedTable
from elips_torch.quantizers.learned import Learned, learning

# Any finite value can be coded.
_ANY_FINITE = resolve_metric("l2")


class Quantizer(Learned, ABC):
    """Codes vectors in a fixed number of bytes, after learning how from examples.

    What it learns, `half` or `double` leave as it is: codes mean the same for ever.

    Args:
        dim: D, size of a vector.
        code_size: bytes per code.
        device: where what is learned lies.

    Attributes:
        in_state_dict: whether checkpoints hold what was learned. An index that leaves its codes out of them
            leaves this out, too: codes mean nothing to another fit.
    """

    def __init__(self, dim: int, code_size: int, device: torch.device | str | None) -> None:
        super().__init__(device)
        self.dim = dim
        self.code_size = code_size
        self.in_state_dict = True

    @abstractmethod
    def _learn(self, vectors: Tensor) -> dict[str, Tensor]:
        """Return the learned tensors for float32 ``(N, D)`` vectors."""

    @abstractmethod
    def _encode(self, vectors: Tensor, check_finite: bool) -> Tensor:
        """Return uint8 codes ``(N, code_size)`` of ``(N, D)`` vectors of any dtype."""

    def packed_table(self) -> PackedTable | None:
        """Return what codes stand for as plain tensors, None where it takes more to decode them."""
        return None

    @abstractmethod
    def _decode(self, codes: Tensor) -> Tensor:
        """Return float32 vectors ``(N, D)`` of codes ``(N, code_size)``."""

    def fit(self, vectors: Tensor) -> Self:
        """Learn from ``(N, D)`` vectors; deterministic.

        Args:
            vectors: ``(N, D)`` float32, float16, bfloat16 or float64, on the quantizer's device; finite.

        Returns:
            The quantizer itself.

        Raises:
            ElipsError: vectors of wrong type, shape, dtype, device or value, or too few.
        """
        self._check("vectors", vectors, finite=True)
        with learning(vectors.device):
            learned = self._learn(vectors.detach().float())
            self._buffers.update(learned)
        return self

    def encode(self, vectors: Tensor, *, check_finite: bool = True) -> Tensor:
        """Return the codes of vectors.

        Args:
            vectors: ``(N, D)``, as for `fit`.
            check_finite: look for NaN, infinity, and values that the code cannot hold. Without the
                check their codes mean some vector.

        Returns:
            ``(N, code_size)`` uint8.

        Raises:
            NotFittedError: before `fit`.
            ElipsError: vectors of wrong type, shape, dtype, device or value.
        """
        self._check_fitted("encode")
        self._check("vectors", vectors, finite=check_finite)
        with plain_arithmetic(vectors.device):
            return self._encode(vectors.detach(), check_finite)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the vectors that codes stand for.

        Args:
            codes: ``(N, code_size)`` uint8, as `encode` returns them.

        Returns:
            ``(N, D)`` float32.

        Raises:
            NotFittedError: before `fit`.
            ElipsError: codes of wrong type, shape or device.
        """
        self._check_fitted("decode")
        if not isinstance(codes, Tensor) or codes.dtype != torch.uint8:
            got = codes.dtype if isinstance(codes, Tensor) else type(codes).__name__
            raise DtypeError(f"codes is {got}, expected a uint8 tensor")
        if codes.ndim != 2 or codes.shape[1] != self.code_size:
            raise ShapeError(f"codes has shape {tuple(codes.shape)}, expected (N, {self.code_size})")
        self._check_place("codes", codes)
        with plain_arithmetic(codes.device):
            return self._decode(codes)

    def forward(self, vectors: Tensor) -> Tensor:
        """Return what is left of vectors ``(N, D)`` after coding: `decode` of `encode`, float32."""
        return self.decode(self.encode(vectors))

    def _check(self, name: str, vectors: Tensor, *, finite: bool) -> None:
        check_vectors(name, vectors, dim=self.dim, owner="the quantizer")
        self._check_place(name, vectors)
        if finite:
            # What is coded is float32, which holds less than float64.
            check_values(name, vectors.float(), _ANY_FINITE)

    def _check_place(self, name: str, tensor: Tensor) -> None:
        check_device(name, tensor, getattr(self, self.learned_buffers[0]).device, "the quantizer")

    def _check_fitted(self, verb: str) -> None:
        if not self.is_trained:
            raise NotFittedError(f"{type(self).__name__}.{verb} was called before fit(vectors)")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.in_state_dict:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if self.in_state_dict or any(prefix + name in state_dict for name in self.learned_buffers):
            super()._load_from_state_dict(state_dict, prefix, *rest)


def check_dim(dim: int) -> int:
    """Check the size of vectors and return it."""
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise DtypeError(f"dim is {dim!r}, expected an int")
    if dim < 1:
        raise ArgumentError(f"dim is {dim}, expected at least 1")
    return dim
