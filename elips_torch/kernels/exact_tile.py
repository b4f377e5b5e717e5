"""Every score of a tile, bit for bit as the definition gives it, at the cost of a float64 product.

A fast float64 approximation s with error bound e is accepted where s - e and s + e round to the
same float32: then the definition rounds to it too. The few others are computed by the definition
(Ziv, Fast evaluation of elementary mathematical functions with correctly rounded last bit, 1991).
"""

import torch
from torch import Tensor

from elips_torch.core.metric import Metric
from elips_torch.kernels.approximate import (
    approximate_scores,
    error_bound,
    has_approximation,
    prepare_queries,
    query_offset,
    row_norms,
)
from elips_torch.kernels.definition import score_all, score_pairs

# Bytes that `score_tile` takes per cell, per row and per query feature, all temporaries counted.
CELL_BYTES = 56
FEATURE_BYTES = 24


def score_tile(
    metric: Metric,
    queries: Tensor,  # (Q, D)
    vectors: Tensor,  # (N, D)
    workspace_bytes: int,
) -> Tensor:  # (Q, N) float32
    """Score every pair of a tile that fits the workspace."""
    if not has_approximation(metric, torch.float64):
        return score_all(metric, queries, vectors, workspace_bytes)
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
        lower[query_rows, rows] = score_pairs(metric, queries, vectors, query_rows, rows, workspace_bytes)
    # Rounded from below, a zero may carry a sign; scores have none.
    return lower.add_(0.0)
