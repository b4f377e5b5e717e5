"""Fast approximate scores of a tile, with a bound on their error.

The product metrics use one matrix product, the Minkowski family `torch.cdist`. Searches use the
approximation to select and the bound to prove that nothing was missed; see `knn_approximated`.

With unit roundoff u, n terms added in any order err by at most gamma_n = n u / (1 - n u) times the
sum of their magnitudes (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1).
"""

import math

import torch
from torch import Tensor

from elips_torch.core.metric import Metric

# Norms in this range square without overflow or underflow; beyond it, nothing is bounded.
SMALLEST_NORM = {torch.float32: 2.0**-40, torch.float64: 2.0**-400}
_LARGEST_NORM = {torch.float32: 2.0**40, torch.float64: 2.0**400}


def has_approximation(metric: Metric, dtype: torch.dtype) -> bool:
    """Whether `approximate_scores` can serve a metric in float32 or float64."""
    if metric.name == "lp":
        # `cdist` takes the root, which for p < 1 leaves the range; in float32 the powers do.
        return dtype == torch.float64 and metric.p >= 1.0
    return metric.form != "elementwise"


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
    """Return approximate scores, less `query_offset`.

    Where nothing is known, as with overflow, they are infinite or NaN, and never rank behind a row
    that is known to be worse.
    """
    if metric.name == "l2":
        return torch.addmm(norms.square()[None], queries, vectors.T, alpha=-2.0)
    if metric.name == "ip":
        return queries @ vectors.T
    if metric.name == "cosine":
        scores = queries @ vectors.T
        # The norm of a tiny row may have underflowed.
        unknown = norms < SMALLEST_NORM[norms.dtype]
        return scores.mul_(torch.where(unknown, torch.nan, norms.reciprocal()))
    # A Euclidean distance by a matrix product would lose the digits that the bound promises.
    scores = torch.cdist(queries, vectors, p=metric.p, compute_mode="donot_use_mm_for_euclid_dist")
    if metric.name == "linf":
        # The maximum in `cdist` passes over NaN, also over that of inf - inf.
        unknown = ~(queries.isfinite().all(1, keepdim=True) & vectors.isfinite().all(1))
        return scores.masked_fill_(unknown, torch.nan)
    if metric.name == "lp":
        return scores.pow_(metric.p)
    if metric.name == "gower":
        return scores.div_(queries.shape[1])
    if metric.name == "braycurtis":
        total = torch.cdist(queries, -vectors, p=1.0)
        overflow = scores + total == torch.inf
        return torch.where(scores == 0, 0.0, scores / total).masked_fill_(overflow, -torch.inf)
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
    terms = dim + 16.0
    if metric.name in ("cosine", "braycurtis"):
        # A quotient errs by both of its parts.
        terms += dim
    elif metric.name == "lp":
        # Root and power amplify by p, and the rounding of 1 / p by the score's logarithm.
        terms += 4 * metric.p + 710
    loss = terms * info.eps / 2
    gamma = 2.0 * loss / (1 - loss) if loss < 0.5 else math.inf
    floor = 8.0 * dim * info.tiny
    if metric.form == "minkowski":
        return gamma * scores.double().abs() + floor
    norms = norms.double()
    if metric.name == "l2":
        bound = gamma * (query_norms + norms).square() + floor
    elif metric.name == "ip":
        bound = gamma * query_norms * norms + floor
    else:
        bound = torch.full_like(query_norms, gamma + floor / SMALLEST_NORM[dtype])
        underflow = (query_norms > 0) & (query_norms < SMALLEST_NORM[torch.float64])
        bound.masked_fill_(underflow, torch.inf)
    largest = torch.maximum(norms, query_norms)
    return torch.where(largest < _LARGEST_NORM[dtype], bound, torch.inf)
