"""Functions that torch compiles where that is possible and run as they are where it is not."""

import functools
import logging
import os
import shutil
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("elips_torch")

# Processes forked from one that ran compiled code hang when they run it, too.
_state = {"forked": False}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _state.update(forked=True))


def was_forked() -> bool:
    """Whether this process was forked, so that neither code that torch compiles nor OpenMP may run in it."""
    return _state["forked"]


@functools.cache
def find_cpp_compiler() -> str | None:
    """Return the path of the C++ compiler that torch would call; None where there is none."""
    # Torch reads this variable to find its compiler; it switches nothing here.
    names = (os.environ.get("CXX", "g++"), "g++", "clang++", "cl")
    return next((path for path in map(shutil.which, names) if path), None)


def compiler_reasons(device_type: str) -> list[str]:
    """Return why nothing can be compiled for a type of device; empty where it can.

    >>> compiler_reasons("meta")
    ['nothing is compiled for meta tensors']
    """
    if device_type not in ("cpu", "cuda"):
        return [f"nothing is compiled for {device_type} tensors"]
    reasons = []
    if device_type == "cpu" and find_cpp_compiler() is None:
        reasons.append("torch.compile needs a C++ compiler and finds none; install g++")
    if device_type == "cuda" and not torch.cuda.is_available():
        reasons.append("there is no CUDA device")
    if was_forked():
        reasons.append("this process was forked, and compiled code hangs in forked processes")
    return reasons


class Compiled:
    """A function on tensors with a compiled twin, made at the first call for any sizes.

    Args:
        function: a plain function that stays within torch and mutates or returns tensors. Sizes are
            compiled as symbols: other sizes do not compile again.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.eager = function
        self._twins: dict[Any, Callable[..., Any] | None] = {}

    def __call__(self, *args: Tensor) -> Any:
        """Run compiled, or as it is when the compiler turned out not to work."""
        # Each mix of dtypes has a cache of its own: many of them do not crowd each other out.
        variant = (args[0].device.type, *(arg.dtype for arg in args))
        if variant not in self._twins:
            self._twins[variant] = torch.compile(_copy(self.eager), dynamic=True)
            return self._first(variant, args)
        twin = self._twins[variant]
        return self.eager(*args) if twin is None else twin(*args)

    def _first(self, variant: Any, args: tuple[Tensor, ...]) -> Any:
        from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException
        from torch._inductor.exc import InductorError
        from torch.fx.experimental import _config as shape_config

        twin = self._twins[variant]
        assert twin is not None
        try:
            # Sizes that happen to be equal in the first call need not be in the next.
            with shape_config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
                return twin(*args)
        except (BackendCompilerFailed, InductorError, TorchDynamoException) as error:
            self._twins[variant] = None
            logger.warning("%s runs uncompiled: %s", self.eager.__name__, str(error).split("\n")[0])
            return self.eager(*args)


def _copy(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with a code object of its own, by which torch keeps compiled code."""
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace()
    return types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
