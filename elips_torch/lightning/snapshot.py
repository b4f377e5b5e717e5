"""A copy of a module as it is now, which another thread may use while training goes on."""

import copy
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from elips_torch.core.errors import ImplementationError
from elips_torch.indexes.state import RowState

M = TypeVar("M", bound=nn.Module)


def snapshot_of(module: M) -> M:
    """Return a copy of a module with weights of its own, and the same indexes.

    Tensors that hang on a graph, such as a loss that the module remembers or the weight of a normalised
    layer, are the same too, but detached.

    Raises:
        ImplementationError: it holds what cannot be copied.

    >>> layer = nn.Linear(2, 1)
    >>> layer.seen = layer.weight.sum()
    >>> snapshot_of(layer).seen.requires_grad
    False
    """
    shared: dict[int, Any] = {id(part): part for part in module.modules() if isinstance(part, RowState)}
    for part in module.modules():
        shared |= {id(tensor): tensor.detach() for tensor in _on_a_graph(vars(part).values())}
    try:
        return copy.deepcopy(module, memo=shared)
    except (RuntimeError, TypeError) as error:
        raise ImplementationError(
            f"background=True copies the module, and {type(module).__name__} holds what cannot be copied "
            f"({error}): refresh with background=False, or leave it out in __getstate__"
        ) from error


def _on_a_graph(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            if not value.is_leaf:
                yield value
        elif isinstance(value, Mapping):
            yield from _on_a_graph(value.values())
        elif isinstance(value, (list, tuple, set, deque)):
            yield from _on_a_graph(value)
