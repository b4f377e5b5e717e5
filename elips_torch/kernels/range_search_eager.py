"""Exact range search in plain torch, on every device and for every metric."""

import torch
from torch import Tensor

from elips_torch.core.metric import Metric
from elips_torch.core.ordering import order_keys
from elips_torch.core.tiling import plan_tiles, spans
from elips_torch.kernels.exact_tile import CELL_BYTES, FEATURE_BYTES, score_tile
from elips_torch.kernels.selection import Selection

_TILE_SHARE = 0.7


def range_search_eager(
    queries: Tensor,  # (Q, D)
    database: Tensor,  # (N, D)
    radius: Tensor,  # (Q,) float32
    metric: Metric,
    ranks: Tensor | None,  # (N,) int64, rank of each row's id; None: rows are in the order of ids
    selection: Selection,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:  # (Q + 1,) int64, (M,) float32, (M,) int64
    """Return lims, scores and rows of all rows strictly within the radius, best first."""
    n_queries, n_rows = queries.shape[0], database.shape[0]
    device = queries.device
    features = queries.shape[1] * FEATURE_BYTES
    tiles = plan_tiles(
        n_queries,
        n_rows,
        workspace_bytes=int(workspace_bytes * _TILE_SHARE),
        cell_bytes=CELL_BYTES,
        row_bytes=features,
        query_bytes=features,
    )
    rest = int(workspace_bytes * (1 - _TILE_SHARE))
    lims = torch.zeros(n_queries + 1, dtype=torch.int64, device=device)
    all_scores = [torch.empty(0, dtype=torch.float32, device=device)]
    all_rows = [torch.empty(0, dtype=torch.int64, device=device)]
    for first, last in spans(n_queries, tiles.queries):
        part = queries[first:last]
        visible = selection.for_queries(slice(first, last))
        hits, scores, rows = [], [], []
        for start, stop in spans(n_rows, tiles.rows):
            tile = score_tile(metric, part, database[start:stop], rest)
            limit = radius[first:last, None]
            within = tile > limit if metric.higher_is_better else tile < limit
            dropped = visible.dropped(last - first, start, stop)
            if dropped is not None:
                within &= ~dropped
            hit, column = within.nonzero(as_tuple=True)
            hits.append(hit)
            scores.append(tile[hit, column])
            rows.append(column + start)
        if not hits:
            continue
        hit, score, row = torch.cat(hits), torch.cat(scores), torch.cat(rows)
        rank = row if ranks is None else ranks[row]
        # Two stable sorts: by key, then by query.
        order = order_keys(score, rank, metric.higher_is_better).argsort()
        order = order[hit[order].argsort(stable=True)]
        all_scores.append(score[order])
        all_rows.append(row[order])
        lims[first + 1 : last + 1] = torch.bincount(hit, minlength=last - first)
    return lims.cumsum(0), torch.cat(all_scores), torch.cat(all_rows)
