"""Rows within a radius, found by the searches in C++ that find nearest rows.

A radius is a threshold that is known before the first row is met: what reaches it is kept, scored by the
definition, and sorted. See `native/within.h`.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from elips_torch.core.ordering import order_keys
from elips_torch.core.tiling import even_cuts, spans
from elips_torch.kernels.knn_native import NativeSearch, Plan
from elips_torch.kernels.search_facts import ProbedLists, selection_facts
from elips_torch.kernels.search_native import (
    CERTIFIED,
    DONE,
    NO_MEMORY,
    SPARE,
    UNCERTIFIED,
    UNSURE,
    native_search,
)
from elips_torch.kernels.selection import Selection

# Rows of a query that there is room for at first; each counts how many it has met.
FEW = 640
# Bytes of a hit that is sorted here, and hits that are moved at a time.
_SORTED_BYTES, _MOVED = 80, 2**20
# Bytes of a row's feature that is decoded and scored in float64.
_FEATURE_BYTES = 40


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


@dataclasses.dataclass(frozen=True)
class Overflow:
    """Queries for which there was no room.

    Attributes:
        queries: ``(P,)`` int64, numbers of the queries.
        counts: ``(P,)`` int64, how many rows each may have.
    """

    queries: Tensor
    counts: Tensor


def assemble(n_queries: int, parts: Sequence[Hits]) -> tuple[Tensor, Tensor, Tensor]:
    """Return lims ``(Q + 1,)``, scores ``(M,)`` and rows ``(M,)`` of parts that have all queries."""
    lims = torch.zeros(n_queries + 1, dtype=torch.int64, device="cpu")
    for part in parts:
        lims[part.queries + 1] = part.counts
    lims = lims.cumsum(0)
    if bool((torch.cat([part.queries for part in parts]).diff() == 1).all()):
        if len(parts) == 1:
            return lims, parts[0].scores, parts[0].rows
        return lims, torch.cat([part.scores for part in parts]), torch.cat([part.rows for part in parts])
    scores = torch.empty(int(lims[-1]), dtype=torch.float32, device="cpu")
    rows = torch.empty(int(lims[-1]), dtype=torch.int64, device="cpu")
    for part in parts:
        ends = part.counts.cumsum(0)
        shifts = lims[part.queries] - (ends - part.counts)
        for start, stop in spans(len(part.rows), _MOVED):
            places = torch.arange(start, stop, device="cpu")
            places += shifts[torch.bucketize(places, ends, right=True)]
            scores[places], rows[places] = part.scores[start:stop], part.rows[start:stop]
    return lims, scores, rows


def native_hits(
    search: NativeSearch,
    queries: Tensor,  # (Q, D)
    radius: Tensor,  # (Q,) float32
    ranks: Tensor | None,  # (N,) int64
    selection: Selection,
    capacity: int,
    workspace_bytes: int,
    lists: ProbedLists | None = None,
) -> Iterable[Hits | Overflow]:
    """Yield the rows within a radius, and the queries for which there was no room.

    Nothing is yielded of queries that the code does not serve.

    Args:
        search: of all rows, or of lists.
        queries: ``(Q, D)``.
        radius: ``(Q,)`` float32.
        ranks: ``(N,)`` int64, place of each row's id among the sorted ids; None where that is the row.
        selection: rows that each query may see.
        capacity: rows of a query that there is to be room for.
        workspace_bytes: limit on temporary memory beside the result, in bytes.
        lists: those that each query searches; None where it searches all rows.
    """
    n_queries = queries.shape[0]
    plan = search.plan_for(n_queries, capacity, workspace_bytes, lists)
    if plan is None:
        return
    for start, stop in even_cuts(n_queries, plan.queries):
        yield from _hits(
            search,
            queries[start:stop],
            radius[start:stop],
            ranks,
            selection.narrowed(start, stop),
            plan,
            workspace_bytes,
            None if lists is None else lists.narrowed(start, stop),
            torch.arange(start, stop, device="cpu"),
        )


def _hits(
    search: NativeSearch,
    queries: Tensor,
    radius: Tensor,
    ranks: Tensor | None,
    selection: Selection,
    plan: Plan,
    workspace_bytes: int,
    lists: ProbedLists | None,
    numbers: Tensor,
) -> Iterable[Hits | Overflow]:
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
        total = int(counts.sum())
        yield Hits(numbers, counts, scores.view(-1)[:total].clone(), rows.view(-1)[:total].long())
        return
    full = ((answers == UNCERTIFIED) & (counts > 0)).nonzero()[:, 0]
    if full.numel():
        yield Overflow(numbers[full], counts[full])
    sure = (answers == CERTIFIED).nonzero()[:, 0]
    if sure.numel():
        found = counts[sure]
        yield Hits(numbers[sure], found, _first(scores, sure, found), _first(rows, sure, found).long())
    unsure = (answers == UNSURE).nonzero()[:, 0]
    for chosen in _groups(unsure, counts, workspace_bytes // 4 // _SORTED_BYTES):
        met = counts[chosen]
        owners = torch.repeat_interleave(met)
        kept, known = _first(rows, chosen, met).long(), _first(scores, chosen, met)
        _score(search, queries, chosen, owners, kept, known, workspace_bytes // 4)
        yield _sorted(search, radius[chosen], ranks, numbers[chosen], owners, kept, known)


def _groups(chosen: Tensor, counts: Tensor, most: int) -> Iterable[Tensor]:
    """Yield queries in groups that have so many rows together, or one at a time."""
    start, total = 0, 0
    for place, count in enumerate(counts[chosen].tolist()):
        if total and total + count > most:
            yield chosen[start:place]
            start, total = place, 0
        total += count
    if start < chosen.numel():
        yield chosen[start:]


def _first(table: Tensor, chosen: Tensor, counts: Tensor) -> Tensor:
    """Return the first so many values ``(M,)`` of chosen rows of a contiguous table ``(Q, C)``."""
    return torch.cat(
        [table[row, :count] for row, count in zip(chosen.tolist(), counts.tolist(), strict=True)]
    )


def _score(
    search: NativeSearch,
    queries: Tensor,  # (Q, D)
    chosen: Tensor,  # (P,) queries
    owners: Tensor,  # (M,) places of queries in these
    rows: Tensor,  # (M,)
    scores: Tensor,  # (M,), NaN where they are in doubt
    workspace_bytes: int,
) -> None:
    """Score by the definition what is in doubt."""
    unknown = scores.isnan().nonzero()[:, 0]
    for start, stop in spans(unknown.numel(), max(1, workspace_bytes // (_FEATURE_BYTES * search.dim))):
        part = unknown[start:stop]
        scores[part] = search.pair_scores(queries, chosen[owners[part]], rows[part], workspace_bytes)


def _sorted(
    search: NativeSearch,
    radius: Tensor,  # (P,)
    ranks: Tensor | None,
    numbers: Tensor,  # (P,) queries
    owners: Tensor,  # (M,) places of queries in these
    rows: Tensor,  # (M,)
    scores: Tensor,  # (M,)
) -> Hits:
    """Return the rows that are within, best first."""
    limit = radius[owners]
    within = scores > limit if search.metric.higher_is_better else scores < limit
    scores, owners, rows = scores[within], owners[within], rows[within]
    rows = rows if search.names is None else search.names[rows]
    places = rows if ranks is None else ranks[rows]
    order = order_keys(scores, places, search.metric.higher_is_better).argsort()
    order = order[owners[order].argsort(stable=True)]
    counts = torch.bincount(owners, minlength=numbers.numel())
    return Hits(numbers, counts, scores[order], rows[order])
