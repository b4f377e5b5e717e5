"""How an operation is entered: directly or through the dispatcher, free of outer settings."""

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from elips_torch.core.errors import ImplementationError

# Not subclasses, such as fake tensors.
_PLAIN = (Tensor, torch.nn.Parameter, type(None))


def runs_directly(*tensors: Tensor | None) -> bool:
    """Whether a call may skip the registered operator.

    The dispatcher costs tens of microseconds and is needed for gradients, for tracing, and for
    tensor subclasses such as fake tensors.

    Raises:
        ImplementationError: under `torch.jit.trace`; under forward-mode differentiation or
            `torch.func`, whose tangents a direct call would drop in silence.
    """
    if torch.compiler.is_compiling():
        return False
    if torch._C._get_tracing_state() is not None:
        raise ImplementationError("torch.jit.trace cannot follow a search; use torch.compile")
    # Tangents are there inside a level only; asking each tensor for its own takes longer than the rest.
    dual = forward_ad._current_level >= 0
    if torch._C._are_functorch_transforms_active() or (dual and any(map(_has_tangent, tensors))):
        raise ImplementationError(
            "scores have reverse-mode gradients only: torch.func transforms and forward-mode "
            "differentiation are not supported; use loss.backward() or torch.autograd.grad"
        )
    for tensor in tensors:
        if type(tensor) not in _PLAIN:
            return False
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            return False
    return True


def _has_tangent(tensor: Tensor | None) -> bool:
    return tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for a gradient to any of the tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def refuse_second_derivative(ctx: Any, *grads: Any) -> NoReturn:
    """Stand in for the derivative of a backward operator."""
    raise ImplementationError("scores can be differentiated once, not twice")


class plain_arithmetic:  # noqa: N801
    """Run without gradients and with autocast off, which stays on inside custom operators.

    What `torch.no_grad` and `torch.autocast` do in turn, in a fifth of the time: every search comes by.

    Args:
        device: where the tensors are.
    """

    __slots__ = ("_autocast", "_grad", "_type")

    def __init__(self, device: torch.device) -> None:
        self._type = device.type

    def __enter__(self) -> None:
        self._grad = torch.is_grad_enabled()
        self._autocast = torch.is_autocast_enabled(self._type)
        if self._grad:
            torch._C._set_grad_enabled(False)
        if self._autocast:
            torch.set_autocast_enabled(self._type, False)

    def __exit__(self, *error: object) -> None:
        if torch.is_autocast_enabled(self._type) != self._autocast:
            torch.set_autocast_enabled(self._type, self._autocast)
        torch._C._set_grad_enabled(self._grad)
