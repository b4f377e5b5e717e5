"""Scores of chosen pairs, bit for bit as the definition gives them, in one compiled pass.

A float64 sum in another order than the definition's is accepted where everything within its error
rounds to the same float32; the few other pairs are computed by the definition (Ziv, Fast evaluation
of elementary mathematical functions with correctly rounded last bit, 1991).
"""

import torch
from torch import Tensor

from elips_torch.core.metric import Metric
from elips_torch.kernels.definition import score_pairs
from elips_torch.kernels.screen_passes import Passes

# Features of pairs under which entering compiled code costs more than it saves.
_WORTH_COMPILED_CODE = 2**15


def exact_pair_scores(
    metric: Metric,
    queries: Tensor,  # (Q, D)
    database: Tensor,  # (N, D)
    query_rows: Tensor,  # (P,) int64
    rows: Tensor,  # (P,) int64
    row_lengths: Tensor,  # (P,) float32, at least the norm of each row
    passes: Passes,
    workspace_bytes: int,
) -> Tensor:  # (P,) float32
    """Score chosen pairs under "l2", "ip" or "cosine"; `row_lengths` serves "ip"."""
    if not passes.is_compiled or rows.numel() * queries.shape[1] < _WORTH_COMPILED_CODE:
        return score_pairs(metric, queries, database, query_rows, rows, workspace_bytes)
    if metric.name == "l2":
        scores = passes.l2_pairs(queries, database, query_rows, rows)
        size = scores
    else:
        lengths = torch.linalg.vector_norm(queries.double(), dim=1)[query_rows]
        if metric.name == "ip":
            scores = passes.ip_pairs(queries, database, query_rows, rows)
            size = row_lengths * lengths
        else:
            scores, squares = passes.cosine_pairs(queries, database, query_rows, rows)
            lengths = squares.sqrt_() * lengths
            scores = torch.where(lengths == 0, 0.0, scores / lengths)
            size = torch.ones_like(scores)
    # Both sums err by at most (D + 2) u of their size, a quotient by twice as much.
    error = size * (4 * (queries.shape[1] + 8) * 2.0**-53)
    return rounded_pair_scores(metric, queries, database, query_rows, rows, scores, error, workspace_bytes)


def rounded_pair_scores(
    metric: Metric,
    queries: Tensor,  # (Q, D)
    database: Tensor,  # (N, D)
    query_rows: Tensor,  # (P,) int64
    rows: Tensor,  # (P,) int64
    scores: Tensor,  # (P,) float64
    error: Tensor,  # (P,) float64, at most so far from the definition's
    workspace_bytes: int,
) -> Tensor:  # (P,) float32
    """Round scores as the definition's would be rounded."""
    lower = (scores - error).float()
    # NaN differs from itself: where nothing is known the definition decides as well.
    unsure = (lower != (scores + error).float()).nonzero()[:, 0]
    if unsure.numel():
        lower[unsure] = score_pairs(
            metric, queries, database, query_rows[unsure], rows[unsure], workspace_bytes
        )
    # Rounded from below, a zero may carry a sign; scores have none.
    return lower.add_(0.0)
