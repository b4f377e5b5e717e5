"""Keeping methods that change an index out of compiled graphs."""

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function outside any compiled graph: a graph break, or an error under fullgraph.

    This is `torch.compiler.disable` that does not import the compiler, which takes seconds, unless
    the program has done so already.
    """
    disabled: Callable[P, R] | None = None

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal disabled
        if disabled is None:
            if "torch._dynamo" not in sys.modules:
                return function(*args, **kwargs)
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    # The mark that `torch.compiler.disable` leaves: callers do not inline the function.
    run._torchdynamo_disable = True  # type: ignore[attr-defined]
    return run
