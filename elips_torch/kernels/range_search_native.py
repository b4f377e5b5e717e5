"""Exact range search in C++, of all rows or of inverted lists; what it leaves is answered in torch."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from elips_torch.core.metric import Metric
from elips_torch.kernels.distance_native import distance_first
from elips_torch.kernels.ivf_native import ScreenedLists, native_lists, vector_lists
from elips_torch.kernels.ivf_range_search_eager import ivf_range_search_eager
from elips_torch.kernels.knn_native import NativeSearch, native_serves
from elips_torch.kernels.list_layout import ListLayout, RowDecoder, StoredRows
from elips_torch.kernels.made_terms import with_terms
from elips_torch.kernels.plane import Plane
from elips_torch.kernels.range_search_eager import range_search_eager
from elips_torch.kernels.selection import Selection
from elips_torch.kernels.within_native import FEW, Hits, Overflow, assemble, native_hits

FindPlane = Callable[[], Plane | None]
# Given numbers of queries or all of them, and for how many rows of each there is to be room; returns what is
# found, and for which there was none, whose queries are places in these numbers.
_Attempt = Callable[[Tensor | slice, int], Iterable[Hits | Overflow]]
_Results = tuple[Tensor, Tensor, Tensor]


def range_search_native(
    queries: Tensor,  # (Q, D)
    database: Tensor,  # (N, D)
    radius: Tensor,  # (Q,) float32
    metric: Metric,
    ranks: Tensor | None,  # (N,) int64, rank of each row's id; None: rows are in the order of ids
    selection: Selection,
    workspace_bytes: int,
    find_plane: FindPlane | None = None,
) -> _Results:  # (Q + 1,) int64, (M,) float32, (M,) int64
    """Return lims, scores and rows of all rows strictly within the radius, best first."""
    plane = None if find_plane is None else find_plane()
    if plane is not None and not native_serves(database, plane):
        plane = None
    plane, workspace_bytes = with_terms(len(queries), database, None, metric, plane, workspace_bytes)

    def attempt(chosen: Tensor | slice, capacity: int) -> Iterable[Hits | Overflow]:
        search = _search(database, metric, plane, selection.n_excluded, workspace_bytes)
        if search is None:
            return ()
        part = selection.for_queries(chosen)
        return native_hits(search, queries[chosen], radius[chosen], ranks, part, capacity, workspace_bytes)

    def otherwise(chosen: Tensor) -> _Results:
        part = selection.for_queries(chosen)
        return range_search_eager(
            queries[chosen], database, radius[chosen], metric, ranks, part, workspace_bytes
        )

    return _answered(queries.shape[0], database.shape[0], attempt, otherwise)


def ivf_range_search_native(
    queries: Tensor,  # (Q, D)
    probes: Tensor,  # (Q, P) int64, -1 for none
    layout: ListLayout,
    decode: RowDecoder,
    radius: Tensor,  # (Q,) float32
    metric: Metric,
    ranks: Tensor | None,  # (N,) int64, rank of each row's id; None: rows are in the order of ids
    selection: Selection,
    workspace_bytes: int,
) -> _Results:  # (Q + 1,) int64, (M,) float32, (M,) int64
    """Return lims, scores and rows of all rows of the probed lists strictly within the radius, best first."""
    # Differences are summed of no float64 queries.
    has_distances = metric.name == "l2" and queries.dtype != torch.float64

    def attempt(chosen: Tensor | slice, capacity: int) -> Iterable[Hits | Overflow]:
        step = native_lists(layout, decode, metric, 1, probes.shape[1], selection.n_excluded, workspace_bytes)
        if not isinstance(step, ScreenedLists) and isinstance(decode, StoredRows) and has_distances:
            # Without codes, distances of the vectors where they are: products would take a copy of them.
            step = vector_lists(layout, decode.vectors, metric, 1, workspace_bytes, {})
        if not isinstance(step, ScreenedLists):
            return ()
        part, lists = selection.for_queries(chosen), step.lists(probes[chosen])
        return native_hits(
            step.search, queries[chosen], radius[chosen], ranks, part, capacity, workspace_bytes, lists
        )

    def otherwise(chosen: Tensor) -> _Results:
        part = selection.for_queries(chosen)
        return ivf_range_search_eager(
            queries[chosen],
            probes[chosen],
            layout,
            decode,
            radius[chosen],
            metric,
            ranks,
            part,
            workspace_bytes,
        )

    return _answered(queries.shape[0], layout.n_rows if probes.shape[1] else 0, attempt, otherwise)


def _answered(
    n_queries: int, n_rows: int, attempt: _Attempt, otherwise: Callable[[Tensor], _Results]
) -> _Results:
    """Return the results of attempts with room for few rows, then for all, and of what answers the rest."""
    numbers = torch.arange(n_queries, device="cpu")
    left = torch.ones(n_queries, dtype=torch.bool, device="cpu")
    parts: list[Hits] = []
    full: list[Overflow] = []

    def take(found: Iterable[Hits | Overflow], chosen: Tensor) -> None:
        for each in found:
            each = dataclasses.replace(each, queries=chosen[each.queries])
            if isinstance(each, Overflow):
                full.append(each)
            else:
                parts.append(each)
                left[each.queries] = False

    if n_queries and n_rows:
        take(attempt(slice(0, n_queries), min(FEW, n_rows) + 1), numbers)
        for chosen, capacity in _by_size(full):
            take(attempt(chosen, capacity), chosen)
    if bool(left.any()) or not parts:
        pending = numbers[left]
        lims, scores, rows = otherwise(pending)
        if not parts:
            return lims, scores, rows
        parts.append(Hits(pending, lims.diff(), scores, rows))
    return assemble(n_queries, parts)


def _by_size(full: Sequence[Overflow]) -> list[tuple[Tensor, int]]:
    """Return queries that need about as much room, and how much."""
    if not full:
        return []
    queries = torch.cat([each.queries for each in full])
    counts = torch.cat([each.counts for each in full])
    sizes = counts.double().log2().floor()
    groups = [sizes == size for size in sizes.unique()]
    return [(queries[group], int(counts[group].max()) + 1) for group in groups]


def _search(
    database: Tensor, metric: Metric, plane: Plane | None, n_excluded: int, workspace_bytes: int
) -> NativeSearch | None:
    """Return a search in C++ of all rows, or None where it cannot serve."""
    if plane is not None and native_serves(database, plane):
        return NativeSearch(database, metric, plane, 1, n_excluded)
    if metric.form == "product" and metric.name != "l2":
        return None
    return distance_first(database, metric, 1, n_excluded, workspace_bytes)
