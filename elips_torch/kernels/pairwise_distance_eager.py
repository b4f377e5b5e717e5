"""All pairwise scores in plain torch, and their gradient, on every device and for every metric."""

import torch
from torch import Tensor

from elips_torch.core.metric import Metric
from elips_torch.core.tiling import plan_tiles, spans
from elips_torch.kernels.exact_tile import TILE_SHARE, plan_exact_tiles, score_tile

# float64 temporaries of the costliest gradient.
_GRADIENT_BYTES_PER_FEATURE = 72


def pairwise_distance_eager(
    queries: Tensor,  # (Q, D)
    database: Tensor,  # (N, D)
    metric: Metric,
    workspace_bytes: int,
) -> Tensor:  # (Q, N) float32
    """Return every score; only the result itself is larger than the workspace."""
    n_queries, n_rows = queries.shape[0], database.shape[0]
    tiles = plan_exact_tiles(n_queries, n_rows, queries.shape[1], workspace_bytes)
    scores = torch.empty(n_queries, n_rows, dtype=torch.float32, device=queries.device)
    for first, last in spans(n_rows, tiles.rows):
        for start, stop in spans(n_queries, tiles.queries):
            tile = score_tile(metric, queries[start:stop], database[first:last], workspace_bytes)
            scores[start:stop, first:last] = tile
    return scores


def pairwise_gradient(
    grad: Tensor,  # (Q, N) d loss / d scores
    queries: Tensor,  # (Q, D)
    database: Tensor,  # (N, D)
    metric: Metric,
    workspace_bytes: int,
) -> Tensor:  # (Q, D) float64
    """Return d loss / d queries of pairwise scores. Swap the sides for the database's."""
    if metric.form == "product":
        return _product_gradient(grad, queries, database, metric, workspace_bytes)
    n_queries, dim = queries.shape
    result = torch.zeros(n_queries, dim, dtype=torch.float64, device=queries.device)
    cells = max(1, workspace_bytes // (_GRADIENT_BYTES_PER_FEATURE * dim))
    row_step = max(1, min(database.shape[0], cells))
    for start, stop in spans(n_queries, max(1, cells // row_step)):
        q = queries[start:stop].double()[:, None]
        for first, last in spans(database.shape[0], row_step):
            slope = metric.gradient(q, database[first:last].double()[None])
            part = grad[start:stop, first:last].double()
            # A pair without weight gives nothing, also where its slope is infinite.
            slope.mul_(part[..., None]).masked_fill_((part == 0)[..., None], 0.0)
            result[start:stop] += slope.sum(1)
    return result


def _product_gradient(
    grad: Tensor, queries: Tensor, database: Tensor, metric: Metric, workspace_bytes: int
) -> Tensor:
    n_queries, n_rows, dim = queries.shape[0], database.shape[0], queries.shape[1]
    features = 24 * dim
    tiles = plan_tiles(
        n_queries,
        n_rows,
        # The rest is for what the product packs.
        workspace_bytes=int(workspace_bytes * TILE_SHARE),
        cell_bytes=16,
        row_bytes=features,
        query_bytes=2 * features,
    )
    result = torch.empty(n_queries, dim, dtype=torch.float64, device=queries.device)
    for start, stop in spans(n_queries, tiles.queries):
        pull = torch.zeros(stop - start, dim, dtype=torch.float64, device=queries.device)
        total = pull.new_zeros(stop - start, 1)
        for first, last in spans(n_rows, tiles.rows):
            x = database[first:last].double()
            weight = grad[start:stop, first:last].double()
            total += weight.sum(1, keepdim=True)
            pull += weight @ (_unit(x) if metric.name == "cosine" else x)
        q = queries[start:stop].double()
        if metric.name == "l2":
            pull = 2.0 * (total * q - pull)
        elif metric.name == "cosine":
            unit, norms = _unit(q), torch.linalg.vector_norm(q, dim=1, keepdim=True)
            across = pull - (pull * unit).sum(1, keepdim=True) * unit
            pull = torch.where(norms > 0, across / norms, 0.0)
        result[start:stop] = pull
    return result


def _unit(vectors: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return torch.where(norms > 0, vectors / norms, 0.0)
