"""Every score of a tile, bit for bit as the definition gives it, at the cost of a float64 product.

A fast float64 approximation s with error bound e is accepted where s - e and s + e round to the
same float32: then the definition rounds to it too. The few others are computed by the definition
(Ziv, Fast evaluation of elementary mathematical functions with correctly rounded last bit, 1991).
"""

import torch
from torch import Tensor

from elips_torch.core.metric import Metric
from elips_torch.core.tiling import Tiles, plan_tiles
from elips_torch.kernels.approximate import (
    approximate_scores,
    error_bound,
    has_approximation,
    prepare_queries,
    query_offset,
    row_norms,
)
from elips_torch.kernels.definition import score_all, score_pairs

# Share of the workspace for tiles; the rest is for what is then computed by the definition.
TILE_SHARE = 0.7
# Bytes that `score_tile` takes per cell, and per feature of a row or a query, all temporaries counted.
_CELL_BYTES = 56
_FEATURE_BYTES = 24


# Up to so many features of pairs the definition itself is cheaper than the steps that avoid it.
_FEW_FEATURES = 2**17


def is_small(queries: Tensor, database: Tensor) -> bool:
    """Whether scoring every pair by the definition costs less than anything else."""
    return queries.shape[0] * database.numel() <= _FEW_FEATURES


def plan_exact_tiles(
    n_queries: int,
    n_rows: int,
    dim: int,
    workspace_bytes: int,
    *,
    cell_bytes: int = 0,
    query_bytes: int = 0,
) -> Tiles:
    """Return sizes of tiles for `score_tile`, with what the caller takes beside it."""
    features = dim * _FEATURE_BYTES
    return plan_tiles(
        n_queries,
        n_rows,
        workspace_bytes=int(workspace_bytes * TILE_SHARE),
        cell_bytes=_CELL_BYTES + cell_bytes,
        row_bytes=features,
        query_bytes=features + query_bytes,
    )


def score_tile(
    metric: Metric,
    queries: Tensor,  # (Q, D)
    vectors: Tensor,  # (N, D)
    workspace_bytes: int,
) -> Tensor:  # (Q, N) float32
    """Score every pair of a tile that `plan_exact_tiles` has made fit the workspace."""
    rest = int(workspace_bytes * (1 - TILE_SHARE))
    if is_small(queries, vectors) or not has_approximation(metric, torch.float64):
        return score_all(metric, queries, vectors, rest)
    prepared, query_norms = prepare_queries(metric, queries, torch.float64)
    wide = vectors.double().contiguous()
    norms = row_norms(metric, wide)
    scores = approximate_scores(metric, prepared, wide, norms)
    bound = error_bound(metric, scores, query_norms, norms, queries.shape[1], torch.float64)
    scores += query_offset(metric, query_norms)
    lower = (scores - bound).float()
    upper = scores.add_(bound).float()
    # NaN differs from itself: where nothing is known the definition decides as well.
    unsure = (lower != upper).nonzero()
    if unsure.numel():
        query_rows, rows = unsure.unbind(1)
        lower[query_rows, rows] = score_pairs(metric, queries, vectors, query_rows, rows, rest)
    # Rounded from below, a zero may carry a sign; scores have none.
    return lower.add_(0.0)
