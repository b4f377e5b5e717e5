"""Scores by the metric's definition: accumulated in float64, rounded once to float32.

Whatever a search selects, these functions give its scores, so every exact implementation returns
the same bits. `Tensor.sum` over a contiguous last axis adds each row in an order that depends on
its length alone, so the result of a pair does not depend on which pairs are computed with it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from elips_torch.core.metric import Metric
from elips_torch.core.tiling import spans

# float64 temporaries of the costliest definition, and the gathered rows themselves.
_BYTES_PER_FEATURE = 64
# Above this many features at a time the temporaries fall out of the cache (measured).
_PREFERRED_FEATURES = 2**18


def _pairs_at_once(dim: int, workspace_bytes: int) -> int:
    affordable = workspace_bytes // (_BYTES_PER_FEATURE * dim)
    return max(1, min(affordable, _PREFERRED_FEATURES // dim))


def score_candidates(
    metric: Metric,
    queries: Tensor,  # (Q, D)
    database: Tensor,  # (N, D)
    rows: Tensor,  # (Q, C) int64, all valid
    workspace_bytes: int,
) -> Tensor:  # (Q, C) float32
    """Score chosen rows of each query."""
    return score_decoded(
        metric, queries, lambda chosen: database.index_select(0, chosen), rows, workspace_bytes
    )


def score_decoded(
    metric: Metric,
    queries: Tensor,  # (Q, D)
    decode: Callable[[Tensor], Tensor],  # rows (M,) to vectors (M, D)
    rows: Tensor,  # (Q, C) int64, all valid
    workspace_bytes: int,
) -> Tensor:  # (Q, C) float32
    """Score chosen rows of each query, of vectors that are not stored as they are."""
    n_queries, n_candidates = rows.shape
    dim = queries.shape[1]
    step = _pairs_at_once(dim, workspace_bytes)

    def tile(start: int, stop: int, first: int, last: int) -> Tensor:
        q = queries[start:stop].double().contiguous()[:, None]
        part = rows[start:stop, first:last]
        x = decode(part.reshape(-1)).double()
        return metric.rounded_score(q, x.view(*part.shape, dim))

    if 0 < rows.numel() <= step:
        return tile(0, n_queries, 0, n_candidates)
    scores = torch.empty(rows.shape, dtype=torch.float32, device=queries.device)
    # Whole queries at a time while they fit, parts of one query's candidates otherwise.
    query_step = max(1, step // max(1, n_candidates))
    for start, stop in spans(n_queries, query_step):
        for first, last in spans(n_candidates, step if query_step == 1 else n_candidates):
            scores[start:stop, first:last] = tile(start, stop, first, last)
    return scores


def score_pairs(
    metric: Metric,
    queries: Tensor,  # (Q, D)
    database: Tensor,  # (N, D)
    query_rows: Tensor,  # (M,) int64
    database_rows: Tensor,  # (M,) int64
    workspace_bytes: int,
) -> Tensor:  # (M,) float32
    """Score chosen (query, row) pairs."""
    scores = torch.empty(query_rows.shape, dtype=torch.float32, device=queries.device)
    for start, stop in spans(query_rows.numel(), _pairs_at_once(queries.shape[1], workspace_bytes)):
        q = queries.index_select(0, query_rows[start:stop]).double()
        x = database.index_select(0, database_rows[start:stop]).double()
        scores[start:stop] = metric.rounded_score(q, x)
    return scores


def score_all(
    metric: Metric,
    queries: Tensor,  # (Q, D)
    database: Tensor,  # (N, D)
    workspace_bytes: int,
) -> Tensor:  # (Q, N) float32
    """Score every pair; the slow way that every metric has."""
    n_queries, n_rows, dim = queries.shape[0], database.shape[0], queries.shape[1]
    scores = torch.empty(n_queries, n_rows, dtype=torch.float32, device=queries.device)
    step = _pairs_at_once(dim, workspace_bytes)
    row_step = min(max(1, n_rows), step)
    query_step = max(1, step // row_step)
    for first, last in spans(n_rows, row_step):
        x = database[first:last].double().contiguous()[None]
        for start, stop in spans(n_queries, query_step):
            q = queries[start:stop].double().contiguous()[:, None]
            scores[start:stop, first:last] = metric.rounded_score(q, x)
    return scores
