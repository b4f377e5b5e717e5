"""Exact range search in plain torch, on every device and for every metric."""

from collections.abc import Callable

import torch
from torch import Tensor

from elips_torch.core.metric import Metric
from elips_torch.core.ordering import order_keys
from elips_torch.core.tiling import spans
from elips_torch.kernels.exact_tile import plan_exact_tiles, score_tile
from elips_torch.kernels.plane import Plane
from elips_torch.kernels.selection import Selection

# What collecting and sorting takes per hit of a tile of queries.
HIT_BYTES = 128


def range_search_eager(
    queries: Tensor,  # (Q, D)
    database: Tensor,  # (N, D)
    radius: Tensor,  # (Q,) float32
    metric: Metric,
    ranks: Tensor | None,  # (N,) int64, rank of each row's id; None: rows are in the order of ids
    selection: Selection,
    workspace_bytes: int,
    find_plane: Callable[[], Plane | None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # (Q + 1,) int64, (M,) float32, (M,) int64
    """Return lims, scores and rows of all rows strictly within the radius, best first; no plane is made."""
    n_queries = queries.shape[0]
    device = queries.device
    n_rows, dim = database.shape
    tiles = plan_exact_tiles(n_queries, n_rows, dim, workspace_bytes, query_bytes=selection.query_bytes)
    lims = torch.zeros(n_queries + 1, dtype=torch.int64, device=device)
    all_scores = [torch.empty(0, dtype=torch.float32, device=device)]
    all_rows = [torch.empty(0, dtype=torch.int64, device=device)]
    first, step = 0, tiles.queries
    while first < n_queries:
        last = min(first + step, n_queries)
        hits = _scan(
            queries[first:last],
            database,
            radius[first:last, None],
            metric,
            selection.for_queries(slice(first, last)),
            tiles.rows,
            workspace_bytes,
        )
        if hits is None:
            # More hits than the workspace can sort; fewer queries find fewer.
            step = (last - first + 1) // 2
            continue
        hit, score, row = hits
        rank = row if ranks is None else ranks[row]
        # Two stable sorts: by key, then by query.
        order = order_keys(score, rank, metric.higher_is_better).argsort()
        order = order[hit[order].argsort(stable=True)]
        all_scores.append(score[order])
        all_rows.append(row[order])
        lims[first + 1 : last + 1] = torch.bincount(hit, minlength=last - first)
        first = last
    return lims.cumsum(0), torch.cat(all_scores), torch.cat(all_rows)


def _scan(
    queries: Tensor,  # (Q, D)
    database: Tensor,  # (N, D)
    limit: Tensor,  # (Q, 1) float32
    metric: Metric,
    selection: Selection,
    row_step: int,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return query, score and row of each hit; None when several queries have too many."""
    n_queries, most = queries.shape[0], workspace_bytes // HIT_BYTES
    hits = [torch.empty(0, dtype=torch.int64, device=queries.device)]
    scores = [torch.empty(0, dtype=torch.float32, device=queries.device)]
    rows = [torch.empty(0, dtype=torch.int64, device=queries.device)]
    found = 0
    for start, stop in spans(database.shape[0], row_step):
        tile = score_tile(metric, queries, database[start:stop], workspace_bytes)
        within = tile > limit if metric.higher_is_better else tile < limit
        dropped = selection.dropped(n_queries, start, stop)
        if dropped is not None:
            within &= ~dropped
        hit, column = within.nonzero(as_tuple=True)
        if not hit.numel():
            continue
        found += hit.numel()
        if found > most and n_queries > 1:
            return None
        # A copy: `hit` is a view of both columns.
        hits.append(hit.clone())
        scores.append(tile[hit, column])
        rows.append(column + start)
    return torch.cat(hits), torch.cat(scores), torch.cat(rows)
