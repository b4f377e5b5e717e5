"""Rows within a radius, found by the searches in C++ that find nearest rows.

A radius is a threshold that is known before the first row is met: what reaches it is kept, scored by the
definition, and sorted. See `native/within.h`.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from elips_torch.core.ordering import order_keys
from elips_torch.core.tiling import even_cuts
from elips_torch.kernels.knn_native import NativeSearch, Plan
from elips_torch.kernels.search_facts import ProbedLists, selection_facts
from elips_torch.kernels.search_native import CERTIFIED, DONE, NO_MEMORY, SPARE, UNSURE, native_search
from elips_torch.kernels.selection import Selection

# Neighbours whose reservoirs are tried first; where they overflow, those that hold every row.
FEW = 64


@dataclasses.dataclass(frozen=True)
class Hits:
    """The rows within the radius of some queries.

    Attributes:
        queries: ``(P,)`` int64, numbers of the queries, each once.
        counts: ``(P,)`` int64, rows of each.
        scores: ``(M,)`` float32, those of the first query before those of the next, best first.
        rows: ``(M,)`` int64.
    """

    queries: Tensor
    counts: Tensor
    scores: Tensor
    rows: Tensor

    def of(self, queries: Tensor) -> "Hits":
        """Return the same, where the numbers of queries are places in ``queries``."""
        return dataclasses.replace(self, queries=queries[self.queries])


def assemble(n_queries: int, parts: Sequence[Hits]) -> tuple[Tensor, Tensor, Tensor]:
    """Return lims ``(Q + 1,)``, scores ``(M,)`` and rows ``(M,)`` of parts that have all queries."""
    lims = torch.zeros(n_queries + 1, dtype=torch.int64, device="cpu")
    for part in parts:
        lims[part.queries + 1] = part.counts
    lims = lims.cumsum(0)
    if len(parts) == 1 and bool((parts[0].queries.diff() == 1).all()):
        return lims, parts[0].scores, parts[0].rows
    scores = torch.empty(int(lims[-1]), dtype=torch.float32, device="cpu")
    rows = torch.empty(int(lims[-1]), dtype=torch.int64, device="cpu")
    for part in parts:
        starts = part.counts.cumsum(0) - part.counts
        moved = torch.repeat_interleave(lims[part.queries] - starts, part.counts)
        places = moved + torch.arange(len(part.rows), device="cpu")
        scores[places], rows[places] = part.scores, part.rows
    return lims, scores, rows


def native_hits(
    search: NativeSearch,
    queries: Tensor,  # (Q, D)
    radius: Tensor,  # (Q,) float32
    ranks: Tensor | None,  # (N,) int64
    selection: Selection,
    workspace_bytes: int,
    lists: ProbedLists | None = None,
) -> Iterable[Hits]:
    """Yield the rows within a radius; of queries for which more are kept than there is room for, nothing.

    Args:
        search: of all rows, or of lists.
        queries: ``(Q, D)``.
        radius: ``(Q,)`` float32.
        ranks: ``(N,)`` int64, place of each row's id among the sorted ids; None where that is the row.
        selection: rows that each query may see.
        workspace_bytes: limit on temporary memory beside the result, in bytes.
        lists: those that each query searches; None where it searches all rows.
    """
    n_queries = queries.shape[0]
    plan = search.plan(n_queries, workspace_bytes, lists)
    if plan is None:
        return
    numbers = torch.arange(n_queries, device="cpu")
    for start, stop in even_cuts(n_queries, plan.queries):
        found = _hits(
            search,
            queries[start:stop],
            radius[start:stop],
            ranks,
            selection.narrowed(start, stop),
            plan,
            workspace_bytes,
            None if lists is None else lists.narrowed(start, stop),
        )
        yield from (part.of(numbers[start:stop]) for part in found)


def _hits(
    search: NativeSearch,
    queries: Tensor,
    radius: Tensor,
    ranks: Tensor | None,
    selection: Selection,
    plan: Plan,
    workspace_bytes: int,
    lists: ProbedLists | None,
) -> Iterable[Hits]:
    n_queries = queries.shape[0]
    status = torch.empty(2, n_queries, dtype=torch.int32, device="cpu")
    memory = torch.empty(3, plan.parts, n_queries, plan.capacity + SPARE, dtype=torch.int32, device="cpu")
    radius = radius.contiguous()
    outcome = native_search(
        **search.facts(queries, search.k, ranks, plan, lists),
        **selection_facts(selection, n_queries),
        radius=radius,
        memory=memory,
        status=status,
    )
    if outcome == NO_MEMORY:
        return
    answers, counts = status.unbind(0)
    counts = counts.long()
    rows, scores = memory[0, 0], memory[1, 0].view(torch.float32)
    if outcome == DONE:
        total, numbers = int(counts.sum()), torch.arange(n_queries, device="cpu")
        yield Hits(numbers, counts, scores.view(-1)[:total].clone(), rows.view(-1)[:total].long())
        return
    sure = (answers == CERTIFIED).nonzero()[:, 0]
    unsure = (answers == UNSURE).nonzero()[:, 0]
    if unsure.numel():
        owners = torch.repeat_interleave(counts[unsure])
        kept = _first(rows, unsure, counts[unsure]).long()
        yield _scored(search, queries, radius, ranks, unsure, owners, kept, workspace_bytes)
    if sure.numel():
        found = counts[sure]
        yield Hits(sure, found, _first(scores, sure, found), _first(rows, sure, found).long())


def _first(table: Tensor, chosen: Tensor, counts: Tensor) -> Tensor:
    """Return the first so many values ``(M,)`` of chosen rows of a contiguous table ``(Q, C)``."""
    starts = counts.cumsum(0) - counts
    places = torch.repeat_interleave(chosen * table.shape[1] - starts, counts)
    places += torch.arange(places.numel(), device="cpu")
    return table.view(-1).index_select(0, places)


def _scored(
    search: NativeSearch,
    queries: Tensor,  # (Q, D)
    radius: Tensor,  # (Q,)
    ranks: Tensor | None,
    chosen: Tensor,  # (P,) queries
    owners: Tensor,  # (M,) places of queries in these
    rows: Tensor,  # (M,)
    workspace_bytes: int,
) -> Hits:
    """Score rows whose last bits are open by the definition, and sort those that are within."""
    scores = search.pair_scores(queries, chosen[owners], rows, workspace_bytes // 4)
    limit = radius[chosen[owners]]
    within = scores > limit if search.metric.higher_is_better else scores < limit
    scores, owners, rows = scores[within], owners[within], rows[within]
    rows = rows if search.names is None else search.names[rows]
    order = order_keys(
        scores, rows if ranks is None else ranks[rows], search.metric.higher_is_better
    ).argsort()
    order = order[owners[order].argsort(stable=True)]
    counts = torch.bincount(owners, minlength=chosen.numel())
    return Hits(chosen, counts, scores[order], rows[order])
