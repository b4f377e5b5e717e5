"""Range search in the lists that each query probes, in plain torch."""

import torch
from torch import Tensor

from elips_torch.core.metric import Metric
from elips_torch.core.ordering import order_keys
from elips_torch.core.tiling import spans
from elips_torch.kernels.exact_tile import plan_exact_tiles, score_tile
from elips_torch.kernels.ivf_search_eager import PROBE_BYTES, PROBE_SHARE, choose_tiling
from elips_torch.kernels.list_layout import ListLayout, ListSelection, RowDecoder
from elips_torch.kernels.range_search_eager import HIT_BYTES
from elips_torch.kernels.selection import Selection

# Share of the workspace for tiles; what probes leave of the rest is for the hits.
_TILE_SHARE = 0.5
_PREFERRED_QUERIES = 4096


def ivf_range_search_eager(
    queries: Tensor,  # (Q, D)
    probes: Tensor,  # (Q, P) int64, -1 for none
    layout: ListLayout,
    decode: RowDecoder,
    radius: Tensor,  # (Q,) float32
    metric: Metric,
    ranks: Tensor | None,  # (N,) int64, rank of each row's id; None: rows are in the order of ids
    selection: Selection,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:  # (Q + 1,) int64, (M,) float32, (M,) int64
    """Return lims, scores and rows of all rows of the probed lists strictly within the radius, best first."""
    n_queries, device = queries.shape[0], queries.device
    lims = torch.zeros(n_queries + 1, dtype=torch.int64, device=device)
    all_scores = [torch.empty(0, dtype=torch.float32, device=device)]
    all_rows = [torch.empty(0, dtype=torch.int64, device=device)]
    affordable = int(workspace_bytes * PROBE_SHARE) // (PROBE_BYTES * max(1, probes.shape[1]))
    first, step = 0, max(1, min(affordable, _PREFERRED_QUERIES))
    while first < n_queries and layout.n_rows and probes.shape[1]:
        last = min(first + step, n_queries)
        part = slice(first, last)
        hits = _scan(
            queries[part],
            probes[part],
            layout,
            decode,
            radius[part, None],
            metric,
            selection.for_queries(part),
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
    probes: Tensor,  # (Q, P)
    layout: ListLayout,
    decode: RowDecoder,
    limit: Tensor,  # (Q, 1) float32
    metric: Metric,
    selection: Selection,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return query, score and row of each hit; None when several queries have too many."""
    n_queries, dim = queries.shape
    share = int(workspace_bytes * _TILE_SHARE)
    most = int(workspace_bytes * (1 - _TILE_SHARE - PROBE_SHARE)) // HIT_BYTES
    tiles = plan_exact_tiles(
        n_queries,
        layout.n_rows,
        dim,
        share,
        cell_bytes=4,
        query_bytes=8 * dim + 24 * selection.n_excluded,
    )
    hits = [torch.empty(0, dtype=torch.int64, device=queries.device)]
    scores = [torch.empty(0, dtype=torch.float32, device=queries.device)]
    rows = [torch.empty(0, dtype=torch.int64, device=queries.device)]
    found = 0
    hidden = ListSelection(selection, layout)
    tiling = choose_tiling(n_queries, probes.shape[1], layout, dim)
    for tile in tiling(layout, probes, tiles.rows):
        vectors = decode(tile.rows)
        for start, stop in spans(tile.owners.shape[0], tiles.queries):
            owners = tile.owners[start:stop]
            scored = score_tile(metric, queries[owners], vectors, share)
            within = scored > limit[owners] if metric.higher_is_better else scored < limit[owners]
            dropped = hidden.dropped(tile, owners)
            if dropped is not None:
                within &= ~dropped
            hit, column = within.nonzero(as_tuple=True)
            if not hit.numel():
                continue
            found += hit.numel()
            if found > most and n_queries > 1:
                return None
            hits.append(owners[hit])
            scores.append(scored[hit, column])
            rows.append(tile.rows[column])
    return torch.cat(hits), torch.cat(scores), torch.cat(rows)
