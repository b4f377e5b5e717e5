"""Gradient of the scores of chosen rows, shared by every search."""

import torch
from torch import Tensor

from elips_torch.core.metric import Metric
from elips_torch.core.tiling import spans

# float64 temporaries of the costliest gradient, and the candidates widened.
_BYTES_PER_FEATURE = 160


def candidate_gradient(
    grad: Tensor,  # (Q, K) d loss / d scores
    queries: Tensor,  # (Q, D)
    candidates: Tensor,  # (Q, K, D)
    metric: Metric,
    for_candidates: bool,
) -> tuple[Tensor, Tensor | None]:  # (Q, D) float64, (Q, K, D) float64
    """Return d loss / d queries and, if asked for, d loss / d candidates.

    Pairs whose incoming gradient is 0 give 0, also where the slope itself is infinite.
    """
    weight = grad[..., None].double()
    q, x = queries[:, None].double(), candidates.double()
    for_queries = torch.where(weight == 0, 0.0, metric.gradient(q, x) * weight).sum(1)
    if not for_candidates:
        return for_queries, None
    return for_queries, torch.where(weight == 0, 0.0, metric.gradient(x, q) * weight)


def queries_at_once(k: int, dim: int, workspace_bytes: int) -> int:
    """Return for how many queries `candidate_gradient` fits the workspace."""
    return max(1, workspace_bytes // (_BYTES_PER_FEATURE * dim * max(1, k)))


def database_gradient(
    grad: Tensor,  # (Q, K) d loss / d scores
    queries: Tensor,  # (Q, D)
    database: Tensor,  # (N, D)
    rows: Tensor,  # (Q, K) int64, -1 where there is none
    metric: Metric,
    workspace_bytes: int,
    for_queries: bool,
    for_database: bool,
) -> tuple[Tensor, Tensor]:
    """Return d loss / d queries ``(Q, D)`` and d loss / d database ``(N, D)``.

    What is not asked for is an empty tensor.
    """
    # Rows are added up in float64, once per database and not per tile, and rounded at the end.
    wide = torch.empty(0, dtype=torch.float64, device=queries.device)
    grad_queries = wide.new_zeros(queries.shape if for_queries else (0,))
    grad_database = wide.new_zeros(database.shape if for_database else (0,))
    grad = grad.masked_fill(rows < 0, 0.0)
    valid = rows.clamp_min(0)
    dim = queries.shape[1]
    for start, stop in spans(len(queries), queries_at_once(rows.shape[1], dim, workspace_bytes)):
        part = valid[start:stop]
        candidates = database.index_select(0, part.reshape(-1)).view(*part.shape, dim)
        slopes = candidate_gradient(grad[start:stop], queries[start:stop], candidates, metric, for_database)
        if for_queries:
            grad_queries[start:stop] = slopes[0]
        if slopes[1] is not None:
            grad_database.index_add_(0, part.reshape(-1), slopes[1].view(-1, dim))
    return grad_queries.to(queries.dtype), grad_database.to(database.dtype)


def pair_gradient(
    grad: Tensor,  # (M,) d loss / d scores
    queries: Tensor,  # (Q, D)
    database: Tensor,  # (N, D)
    rows: Tensor,  # (M,) int64
    lims: Tensor,  # (Q + 1,) int64
    metric: Metric,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:  # (Q, D), (N, D) in the dtypes of the two
    """Return d loss / d queries and d loss / d database of range search results."""
    grad_queries = torch.zeros(queries.shape, dtype=torch.float64, device=queries.device)
    grad_database = torch.zeros(database.shape, dtype=torch.float64, device=queries.device)
    query_rows = torch.repeat_interleave(lims.diff())
    for start, stop in spans(rows.numel(), queries_at_once(1, queries.shape[1], workspace_bytes)):
        hit, row = query_rows[start:stop], rows[start:stop]
        q, x = queries.index_select(0, hit), database.index_select(0, row)
        slopes = candidate_gradient(grad[start:stop, None], q, x[:, None], metric, True)
        grad_queries.index_add_(0, hit, slopes[0])
        if slopes[1] is not None:
            grad_database.index_add_(0, row, slopes[1][:, 0])
    return grad_queries.to(queries.dtype), grad_database.to(database.dtype)
