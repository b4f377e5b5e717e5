"""Exact range search in C++, of all rows or of inverted lists; what it leaves is answered in torch."""

from collections.abc import Callable, Iterable

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
from elips_torch.kernels.within_native import FEW, Hits, assemble, native_hits

# Given numbers of queries or all of them, and for how many neighbours there is to be room; returns hits
# whose queries are places in these numbers.
_Attempt = Callable[[Tensor | slice, int], Iterable[Hits]]
_Results = tuple[Tensor, Tensor, Tensor]


def range_search_native(
    queries: Tensor,  # (Q, D)
    database: Tensor,  # (N, D)
    radius: Tensor,  # (Q,) float32
    metric: Metric,
    ranks: Tensor | None,  # (N,) int64, rank of each row's id; None: rows are in the order of ids
    selection: Selection,
    workspace_bytes: int,
    plane: Plane | None = None,
) -> _Results:  # (Q + 1,) int64, (M,) float32, (M,) int64
    """Return lims, scores and rows of all rows strictly within the radius, best first."""
    if plane is not None and not native_serves(database, plane):
        plane = None
    plane, workspace_bytes = with_terms(len(queries), database, None, metric, plane, workspace_bytes)

    def attempt(chosen: Tensor | slice, k: int) -> Iterable[Hits]:
        search = _search(database, metric, plane, k, selection.n_excluded, workspace_bytes)
        if search is None:
            return ()
        return native_hits(
            search, queries[chosen], radius[chosen], ranks, selection.for_queries(chosen), workspace_bytes
        )

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

    def attempt(chosen: Tensor | slice, k: int) -> Iterable[Hits]:
        step = native_lists(layout, decode, metric, k, probes.shape[1], selection.n_excluded, workspace_bytes)
        if not isinstance(step, ScreenedLists) and isinstance(decode, StoredRows) and metric.name == "l2":
            # Without codes, distances of the vectors where they are: products would take a copy of them.
            step = vector_lists(layout, decode.vectors, metric, k, workspace_bytes, {})
        if not isinstance(step, ScreenedLists):
            return ()
        part, lists = selection.for_queries(chosen), step.lists(probes[chosen])
        return native_hits(step.search, queries[chosen], radius[chosen], ranks, part, workspace_bytes, lists)

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
    """Return the results of attempts with more and more room, and of what answers the rest."""
    pending = torch.arange(n_queries, device="cpu")
    parts: list[Hits] = []
    for k in (min(FEW, n_rows), n_rows):
        if not (pending.numel() and n_rows):
            break
        left = torch.ones(pending.numel(), dtype=torch.bool, device="cpu")
        # All of them without a copy.
        for hits in attempt(pending if parts else slice(0, n_queries), k):
            left[hits.queries] = False
            parts.append(hits.of(pending))
        pending = pending[left]
    if pending.numel() or not parts:
        lims, scores, rows = otherwise(pending)
        if not parts:
            return lims, scores, rows
        parts.append(Hits(pending, lims.diff(), scores, rows))
    return assemble(n_queries, parts)


def _search(
    database: Tensor, metric: Metric, plane: Plane | None, k: int, n_excluded: int, workspace_bytes: int
) -> NativeSearch | None:
    """Return a search in C++ of all rows, or None where it cannot serve."""
    if plane is not None and native_serves(database, plane):
        search = NativeSearch(database, metric, plane, k, n_excluded)
        return search if search.plan(1, workspace_bytes) is not None else None
    if metric.form == "product" and metric.name != "l2":
        return None
    return distance_first(database, metric, k, n_excluded, workspace_bytes)
