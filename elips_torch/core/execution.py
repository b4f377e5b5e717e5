"""How an operation is entered: directly or through the dispatcher, free of outer settings."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def runs_directly(*tensors: Tensor | None) -> bool:
    """Whether a call may skip the registered operator.

    The dispatcher costs tens of microseconds and is needed for gradients, for tracing, and for
    tensor subclasses such as fake tensors.
    """
    if torch.compiler.is_compiling():
        return False
    present = [tensor for tensor in tensors if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in present):
        return False
    return all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in present)


@contextmanager
def plain_arithmetic(device: torch.device) -> Iterator[None]:
    """Run without gradients and with autocast off, which stays on inside custom operators."""
    with torch.no_grad():
        if torch.is_autocast_enabled(device.type):
            with torch.autocast(device.type, enabled=False):
                yield
        else:
            yield
