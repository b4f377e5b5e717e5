"""Fast approximate scores of a tile, with a bound on their error.

The product metrics use one matrix product, the Minkowski family `torch.cdist`. Searches use the
approximation to select and the bound to prove that nothing was missed; see `knn_eager`.

With unit roundoff u, n terms added in any order err by at most gamma_n = n u / (1 - n u) times the
sum of their magnitudes (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1).
"""

import torch
from torch import Tensor

from elips_torch.core.metric import Metric

# Norms in this range square without overflow or underflow; beyond it, nothing is bounded.
_SMALLEST_NORM = {torch.float32: 2.0**-40, torch.float64: 2.0**-400}
_LARGEST_NORM = {torch.float32: 2.0**40, torch.float64: 2.0**400}


def has_approximation(metric: Metric, dtype: torch.dtype) -> bool:
    """Whether `approximate_scores` can serve a metric in float32 or float64."""
    # Powers of small differences underflow in float32.
    return metric.form == "product" or (
        metric.form == "minkowski" and (metric.name != "lp" or dtype == torch.float64)
    )


def row_norms(metric: Metric, vectors: Tensor) -> Tensor:
    """Return the Euclidean norms ``(N,)`` that the approximation and its bound need.

    Metrics without a product need none and get an empty tensor.
    """
    if metric.form != "product":
        return vectors.new_empty(0)
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=1)
    return norms


def prepare_queries(metric: Metric, queries: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the queries as `approximate_scores` takes them and their float64 norms ``(Q, 1)``."""
    exact = queries.double().contiguous()
    norms = torch.linalg.vector_norm(exact, dim=1, keepdim=True)
    if metric.name == "cosine":
        exact = torch.where(norms == 0, 0.0, exact / norms)
    return exact.to(dtype), norms


def query_offset(metric: Metric, query_norms: Tensor) -> Tensor | float:
    """Return what is still to be added to the approximation, one float64 number per query."""
    return query_norms.square() if metric.name == "l2" else 0.0


def approximate_scores(
    metric: Metric,
    queries: Tensor,  # (Q, D) from prepare_queries
    vectors: Tensor,  # (N, D) same dtype, contiguous
    norms: Tensor,  # (N,) from row_norms
) -> Tensor:  # (Q, N) same dtype
    """Return approximate scores, less `query_offset`; NaN where nothing is known."""
    if metric.name == "l2":
        return torch.addmm(norms.square()[None], queries, vectors.T, alpha=-2.0)
    if metric.name == "ip":
        return queries @ vectors.T
    if metric.name == "cosine":
        scores = queries @ vectors.T
        # The norm of a tiny row may have underflowed.
        unknown = norms < _SMALLEST_NORM[norms.dtype]
        return scores.mul_(torch.where(unknown, torch.nan, norms.reciprocal()))
    scores = torch.cdist(queries, vectors, p=metric.p)
    if metric.name == "lp":
        return scores.pow_(metric.p)
    if metric.name == "gower":
        return scores.div_(queries.shape[1])
    if metric.name == "braycurtis":
        total = torch.cdist(queries, -vectors, p=1.0)
        return torch.where(scores > 0, scores / total, 0.0)
    return scores


def error_bound(
    metric: Metric,
    scores: Tensor,  # approximate, without query_offset
    query_norms: Tensor,  # (Q, 1) float64
    norms: Tensor,  # broadcasts with scores; (N,) or the largest norm of all rows
    dim: int,
    dtype: torch.dtype,
) -> Tensor:  # broadcasts with scores, float64; infinite or NaN where nothing can be said
    """Bound the distance of approximate scores, `query_offset` added, from the definition.

    With the largest norm of a set of rows it bounds the error of each row of the set.
    """
    info = torch.finfo(dtype)
    # eps is 2 u. The term beside dim covers norms, roots, powers and divisions; the factor of two
    # covers the rounding of the bound itself and of the definition in float64.
    terms = dim + 16 + (4 * metric.p if metric.name == "lp" else 0)
    gamma = 2.0 * terms * info.eps / 2 / (1 - terms * info.eps / 2)
    floor = 8.0 * dim * info.tiny
    if metric.form == "minkowski":
        return gamma * scores.double().abs() + floor
    norms = norms.double()
    if metric.name == "l2":
        bound = gamma * (query_norms + norms).square() + floor
    elif metric.name == "ip":
        bound = gamma * query_norms * norms + floor
    else:
        bound = gamma + floor / _SMALLEST_NORM[dtype] * torch.ones_like(query_norms)
    largest = torch.maximum(norms, query_norms)
    return torch.where(largest < _LARGEST_NORM[dtype], bound, torch.inf)
