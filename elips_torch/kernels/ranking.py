"""From scored pairs of query and row to the k best rows of each query."""

from collections.abc import Callable

import torch
from torch import Tensor

from elips_torch.core.metric import Metric
from elips_torch.core.ordering import EMPTY_KEY, order_keys, ranks_of_keys, scores_of_keys


def smallest_keys(keys: Tensor, k: int) -> Tensor:
    """Return the k smallest keys ``(Q, K)`` of ``(Q, C)``, ascending."""
    return keys.topk(k, dim=1, largest=False).values


def table_of_pairs(
    owners: Tensor, values: Tensor, n_queries: int, least: int, empty: float = -torch.inf
) -> Tensor:
    """Return values ``(P, ...)`` as a table ``(Q, W, ...)`` with those of each query in its row.

    Args:
        owners: ``(P,)`` int64, the query of each value, in any order.
        values: ``(P, ...)``.
        n_queries: Q.
        least: W is this or the length of the longest list, whichever is more.
        empty: what fills the rest.
    """
    counts = torch.bincount(owners, minlength=n_queries)
    owners, order = owners.sort(stable=True)
    column = torch.arange(owners.numel(), device=owners.device) - (counts.cumsum(0) - counts)[owners]
    width = max(least, int(counts.max()))
    table = values.new_full((n_queries, width, *values.shape[1:]), empty)
    table[owners, column] = values[order]
    return table


def rank_pairs(
    metric: Metric,
    owners: Tensor,  # (P,) int64, queries
    rows: Tensor,  # (P,) int64
    scores: Tensor,  # (P,) float32
    n_queries: int,
    k: int,
    ranks: Tensor | None,  # (N,) int64, rank of each row's id; None: rows are in the order of ids
    smallest: Callable[[Tensor, int], Tensor] = smallest_keys,
) -> tuple[Tensor, Tensor]:  # (Q, K) float32, (Q, K) int64
    """Return the scores and rows of the k best pairs of each query; -1 where there are fewer."""
    keys = order_keys(scores, rows if ranks is None else ranks[rows], metric.higher_is_better)
    best = smallest(table_of_pairs(owners, keys, n_queries, k, EMPTY_KEY), k)
    empty = best == EMPTY_KEY
    found = ranks_of_keys(best)
    if ranks is not None:
        row_of_rank = torch.empty_like(ranks)
        row_of_rank[ranks] = torch.arange(ranks.numel(), device=ranks.device)
        found = row_of_rank[found.masked_fill(empty, 0)]
    scores = scores_of_keys(best, metric.higher_is_better).masked_fill_(empty, metric.worst)
    return scores, found.masked_fill_(empty, -1)


def merge_ranked(
    metric: Metric,
    scores: Tensor,  # (Q, C) float32
    rows: Tensor,  # (Q, C) int64, each once per query; -1 for none
    k: int,
    ranks: Tensor | None,  # (N,) int64, rank of each row's id; None: rows are in the order of ids
) -> tuple[Tensor, Tensor]:  # (Q, K) float32, (Q, K) int64
    """Return the k best of rows that several searches found; -1 where there are fewer."""
    known = rows.clamp_min(0)
    keys = order_keys(scores, known if ranks is None else ranks[known], metric.higher_is_better)
    keys, best = keys.masked_fill_(rows < 0, EMPTY_KEY).topk(k, dim=1, largest=False)
    return scores.gather(1, best).masked_fill_(keys == EMPTY_KEY, metric.worst), rows.gather(1, best)
