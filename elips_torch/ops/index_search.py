"""Search in an index that the compiled graph knows by a number.

A graph that took the database as an input would be compiled again whenever the index grows. This
operator takes an integer instead, and reads the tensors of the index when it runs.
"""

import itertools
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor


class Searchable(Protocol):
    """What an index offers to the operator."""

    def _search_now(
        self,
        queries: Tensor,
        k: int,
        mask: Tensor | None,
        exclude: Tensor | None,
        exclude_self: bool,
        implementation: str,
        parameters: dict[str, Any],
        keep_candidates: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...

    def _range_search_now(
        self,
        queries: Tensor,
        radius: Tensor,
        mask: Tensor | None,
        exclude: Tensor | None,
        exclude_self: bool,
        implementation: str,
        parameters: dict[str, Any],
        keep_candidates: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]: ...


_handles = itertools.count()
_indexes: "weakref.WeakValueDictionary[int, Searchable]" = weakref.WeakValueDictionary()


def register(index: Searchable) -> int:
    """Return a number that stands for the index as long as it lives."""
    handle = next(_handles)
    _indexes[handle] = index
    return handle


def format_parameters(parameters: dict[str, Any]) -> str:
    """Return search parameters as a string, since operators take no dictionaries."""
    return ",".join(f"{name}={value}" for name, value in parameters.items())


def parse_parameters(text: str) -> dict[str, Any]:
    """Undo `format_parameters`, whose values are numbers.

    >>> parse_parameters("nprobe=8,margin=0.5")
    {'nprobe': 8, 'margin': 0.5}
    """
    pairs = (part.split("=") for part in text.split(",") if part)
    return {name: int(value) if value.lstrip("-").isdigit() else float(value) for name, value in pairs}


@torch.library.custom_op("elips_torch::index_search", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def index_search_op(
    queries: Tensor,  # (Q, D)
    mask: Tensor | None,
    exclude: Tensor | None,
    handle: int,
    k: int,
    exclude_self: bool,
    implementation: str,
    parameters: str,
    keep_candidates: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return scores ``(Q, K)``, candidates ``(Q, K, D)`` in dtype or empty, ids and rows ``(Q, K)``."""
    index = _indexes[handle]
    scores, candidates, ids, rows = index._search_now(
        queries,
        k,
        mask,
        exclude,
        exclude_self,
        implementation,
        parse_parameters(parameters),
        keep_candidates,
    )
    # An operator may not return one tensor twice.
    return scores, candidates, ids.clone() if ids is rows else ids, rows


@index_search_op.register_fake
def _fake(queries: Tensor, mask: Any, exclude: Any, handle: int, k: int, *rest: Any) -> Any:
    keep_candidates, dtype = rest[-2:]
    shape = (queries.shape[0], k)
    return (
        queries.new_empty(shape, dtype=torch.float32),
        queries.new_empty((*shape, queries.shape[1]) if keep_candidates else (0,), dtype=dtype),
        queries.new_empty(shape, dtype=torch.int64),
        queries.new_empty(shape, dtype=torch.int64),
    )


@torch.library.custom_op(
    "elips_torch::index_range_search", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def index_range_search_op(
    queries: Tensor,  # (Q, D)
    radius: Tensor,  # (Q,) float32
    mask: Tensor | None,
    exclude: Tensor | None,
    handle: int,
    exclude_self: bool,
    implementation: str,
    parameters: str,
    keep_candidates: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return scores ``(M,)``, candidates ``(M, D)`` or empty, ids and rows ``(M,)``, lims ``(Q + 1,)``."""
    return _indexes[handle]._range_search_now(
        queries,
        radius,
        mask,
        exclude,
        exclude_self,
        implementation,
        parse_parameters(parameters),
        keep_candidates,
    )


@index_range_search_op.register_fake
def _range_fake(queries: Tensor, *rest: Any) -> Any:
    keep_candidates, dtype = rest[-2:]
    found = torch.library.get_ctx().new_dynamic_size()
    return (
        queries.new_empty((found,), dtype=torch.float32),
        queries.new_empty((found, queries.shape[1]) if keep_candidates else (0,), dtype=dtype),
        queries.new_empty((found,), dtype=torch.int64),
        queries.new_empty((found,), dtype=torch.int64),
        queries.new_empty((queries.shape[0] + 1,), dtype=torch.int64),
    )
