"""Exact k-nearest-neighbour search for every metric, as a chain of searches.

Each search answers the queries for which it can prove the answer, and leaves the others to the next:

1. the codes of a plane screen the rows (`knn_screened`), where there is a plane;
2. a float32 product selects candidates (`knn_approximated`), then a float64 product;
3. every row is scored (`knn_complete`), which always answers.
"""

import functools
from collections.abc import Callable, Iterator
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from elips_torch.core.hardware import float32_product_is_exact
from elips_torch.core.metric import Metric
from elips_torch.core.tiling import spans
from elips_torch.kernels.approximate import has_approximation
from elips_torch.kernels.exact_tile import is_small
from elips_torch.kernels.knn_approximated import ApproximatedSearch, n_candidates
from elips_torch.kernels.knn_complete import CompleteSearch
from elips_torch.kernels.knn_screened import screened_search
from elips_torch.kernels.plane import Plane
from elips_torch.kernels.screen_passes import COMPILED, EAGER
from elips_torch.kernels.selection import Selection


class Search(Protocol):
    """One link of the chain.

    Attributes:
        has_overhead: it takes so many calls that scoring all of a few rows is faster.
    """

    has_overhead: ClassVar[bool]

    def queries_at_once(self, k: int, workspace_bytes: int) -> int:
        """Return how many queries `run` takes at a time."""

    def run(
        self, queries: Tensor, k: int, ranks: Tensor | None, selection: Selection, workspace_bytes: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores ``(Q, K)``, rows ``(Q, K)`` and bool ``(Q,)``, which queries are certified."""


# Makes a search from the database, the metric, the plane if there is one, k, the number of rows excluded
# per query, and the workspace; None where it cannot serve.
FirstSearch = Callable[[Tensor, Metric, Plane | None, int, int, int], Search | None]
eager_first: FirstSearch = functools.partial(screened_search, EAGER)
compiled_first: FirstSearch = functools.partial(screened_search, COMPILED)


def knn_exact(
    queries: Tensor,  # (Q, D)
    database: Tensor,  # (N, D)
    k: int,
    metric: Metric,
    ranks: Tensor | None,  # (N,) int64, rank of each row's id; None: rows are in the order of ids
    selection: Selection,
    workspace_bytes: int,
    plane: Plane | None = None,
    first_search: FirstSearch = eager_first,
) -> tuple[Tensor, Tensor]:  # (Q, K) float32, (Q, K) int64
    """Return the scores and rows of the k best rows; -1 where there are fewer.

    ``first_search`` makes the first link of the chain; implementations differ by it.
    """
    n_queries, n_rows = queries.shape[0], database.shape[0]
    if n_rows == 0 or n_queries == 0:
        return empty_results(n_queries, k, metric, queries.device)
    found = min(k, n_rows)
    pending: Tensor | None = None
    scores = rows = queries.new_empty(0)
    for search in _searches(queries, database, k, metric, selection, workspace_bytes, plane, first_search):
        left = []
        step = search.queries_at_once(found, workspace_bytes)
        for start, stop in spans(n_queries if pending is None else pending.numel(), step):
            part: slice | Tensor = slice(start, stop) if pending is None else pending[start:stop]
            result = search.run(queries[part], found, ranks, selection.for_queries(part), workspace_bytes)
            if pending is None and stop - start == n_queries and found == k and bool(result[2].all()):
                # The usual end, without a copy.
                return result[0], result[1]
            if pending is None and start == 0:
                scores, rows = empty_results(n_queries, k, metric, queries.device)
            scores[part, :found], rows[part, :found], certified = result
            unsure = (~certified).nonzero()[:, 0]
            left.append(unsure + start if pending is None else pending[start:stop][unsure])
        pending = torch.cat(left)
        if not pending.numel():
            break
    return scores, rows


def empty_results(n_queries: int, k: int, metric: Metric, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return scores ``(Q, K)`` and rows ``(Q, K)`` of queries for which nothing was found."""
    scores = torch.full((n_queries, k), metric.worst, dtype=torch.float32, device=device)
    return scores, torch.full((n_queries, k), -1, dtype=torch.int64, device=device)


def _searches(
    queries: Tensor,
    database: Tensor,
    k: int,
    metric: Metric,
    selection: Selection,
    workspace_bytes: int,
    plane: Plane | None,
    first_search: FirstSearch,
) -> Iterator[Search]:
    """Yield the searches to try in turn; the last one certifies every query."""
    small = is_small(queries, database)
    first = first_search(database, metric, plane, k, selection.n_excluded, workspace_bytes)
    if first is not None and not (small and first.has_overhead):
        yield first
    if n_candidates(k) <= database.shape[0] // 2 and not small:
        wide = torch.float64 in (queries.dtype, database.dtype)
        for dtype in (torch.float32, torch.float64):
            if dtype == torch.float32 and (wide or not float32_product_is_exact(queries.device)):
                continue
            if has_approximation(metric, dtype):
                yield ApproximatedSearch(database, metric, dtype, k, selection.query_bytes)
    yield CompleteSearch(database, metric, selection.query_bytes)
