"""The certificate of a screen: queries as codes, and bounds of every approximate score.

All metrics are screened as a similarity, the larger the better, that differs from the score by a
number per query (and a factor of -2 for "l2"):

    similarity(q, x) = q . (x - m)                          "ip"; "cosine" with q and x normalised
    similarity(q, x) = (q - m) . (x - m) - |x - m|**2 / 2   "l2"

With the query coded like the rows, q' = t d close to q, the approximation ``t s (d . c) + bias``
differs from it by no more than

    |q'| residual(x) + |q - q'| norm(x) + rounding.

A row can be dropped when its upper bound is below the lower bounds of k other rows, by more than
what float32, in which scores are compared, could hide.
"""

import dataclasses

import torch
from torch import Tensor

from elips_torch.core.metric import Metric
from elips_torch.kernels.plane import (
    LARGEST_NORM,
    NORM,
    RESIDUAL,
    SMALLEST_SCALE,
    UNIT,
    Plane,
)
from elips_torch.kernels.screen_passes import FLOOR, NO_ROW

_LEAST_FACTOR = 2.0**-120
# A query's factor of residuals counts as at least this part of the largest, see `group_terms`.
_SPREAD = 16.0
# Up to this many features a sum of products of two int8 codes is below 2**24: float32 is exact.
EXACT_FLOAT_DIM = 2**24 // 128**2
# Up to this many a similarity of integers is, too, whose bias ends in a half.
_EXACT_SIMILARITY_DIM = EXACT_FLOAT_DIM // 4


@dataclasses.dataclass(frozen=True)
class CodedQueries:
    """Queries as a plane's codes, and the factors of the bounds.

    Attributes:
        codes: ``(Q, D)``, dtype of the plane's codes.
        terms: ``(3, Q)`` float32, what the bounds need of each query: its scale, and the factors of a
            row's residual and of its norm.
        slack: float32 number, the factor of a row's squared norm.
        rounding: ``(Q,)`` float64, what scores lose by rounding to float32, as a similarity, beside
            that in proportion to the similarity.
        offsets: ``(Q,)`` float64, the score of similarity zero.
        usable: bool ``(Q,)``; False where nothing is bounded.
        is_exact: similarities of the codes are those of the vectors.
    """

    codes: Tensor
    terms: Tensor
    slack: Tensor
    rounding: Tensor
    offsets: Tensor
    usable: Tensor
    is_exact: bool


def code_queries(metric: Metric, queries: Tensor, plane: Plane) -> CodedQueries:
    """Code queries ``(Q, D)`` of any float dtype for a plane."""
    dim = queries.shape[1]
    wide = queries.double()
    mean = plane.mean.double()
    if metric.name == "cosine":
        norms = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
        wide = torch.where(norms > 0, wide / norms, 0.0)
    if metric.name == "l2":
        wide = wide - mean
        offsets = wide.square().sum(1)
        rounding = offsets
    else:
        offsets = wide @ mean
        rounding = torch.linalg.vector_norm(wide, dim=1) * torch.linalg.vector_norm(mean)
    largest = wide.abs().amax(1)
    # NaN compares False.
    usable = largest < LARGEST_NORM / dim
    wide = torch.where(usable[:, None], wide, 0.0)
    if plane.kind == "int8":
        is_integer = plane.is_integer and dim <= _EXACT_SIMILARITY_DIM
        is_exact = is_integer and _is_int8(wide)
        scales = torch.ones_like(largest) if is_exact else (largest / 127.0)
        scales = scales.clamp_min(SMALLEST_SCALE).float()
        scales = torch.where(usable, scales, 1.0)
        codes = (wide / scales.double()[:, None]).round_().clamp_(-128.0, 127.0)
        coded = codes * scales.double()[:, None]
        codes = codes.to(torch.int8)
    else:
        is_exact = False
        scales = torch.ones_like(largest, dtype=torch.float32)
        codes = wide.to(plane.codes.dtype)
        coded = codes.double()
        usable &= coded.isfinite().all(1)
        codes, coded = (torch.where(usable[:, None], each, 0.0) for each in (codes, coded))
    if is_exact:
        terms = torch.stack([scales, torch.zeros_like(scales), torch.zeros_like(scales)])
        return CodedQueries(codes, terms, terms.new_zeros(()), rounding, offsets, usable, True)
    length = torch.linalg.vector_norm(coded, dim=1)
    residual = torch.linalg.vector_norm(wide - coded, dim=1)
    rounded = rounded_units(plane.kind, dim)
    # The last factor covers rounding these factors and the bounds made of them.
    widen = (1 + 2.0**-40) * (1 + 8 * UNIT)
    # Beside rows as long as they may be, what these factors lose to underflow would count.
    residual_factors = (1 + rounded * UNIT) * length * widen + _LEAST_FACTOR
    norm_factors = (residual + rounded * UNIT * length) * widen + _LEAST_FACTOR
    terms = torch.stack([scales, residual_factors.float(), norm_factors.float()])
    return CodedQueries(
        codes, terms, terms.new_full((), norm_square_slack(metric)), rounding, offsets, usable, False
    )


def rounded_units(kind: str, dim: int) -> float:
    """Return how many roundoffs of float32 a product of codes may lose, relative to their lengths."""
    # A sum of int8 products is exact unless it outgrows float32; other products are accumulated in
    # float32, which tensor cores may truncate.
    if kind in ("bf16", "fp16"):
        return 16.0 + 4 * dim
    return 16.0 + dim if kind == "fp32" or dim > EXACT_FLOAT_DIM else 16.0


def norm_square_slack(metric: Metric) -> float:
    """Return the part of a row's squared norm by which rounding and adding its bias may err."""
    return 8 * UNIT if metric.name == "l2" else 0.0


def _is_int8(vectors: Tensor) -> bool:
    inside = (vectors >= -128) & (vectors <= 127) & (vectors == vectors.round())
    return bool(inside.all())


def group_terms(metric: Metric, coded: CodedQueries, terms: Tensor) -> tuple[Tensor, Tensor]:
    """Return looser bounds of fewer terms, for the step that computes most of them.

    An error ``residual * a + norm * b + norm**2 * slack`` is at most ``width * f`` with a factor f of the
    query that is at least its a, and a width of the row for the least favourable of the queries.

    Args:
        metric: "l2", "ip" or "cosine".
        coded: the queries.
        terms: ``(N, 4)`` of a plane.

    Returns:
        ``(N,)`` width of each row; and ``(2, Q)``, scale and f of each query.
    """
    scales, residual_factors, norm_factors = coded.terms
    least = (residual_factors.max() / _SPREAD).clamp_min(SMALLEST_SCALE)
    factors = torch.maximum(residual_factors, least)
    # Wider by what these few operations may round.
    wider = 1 + 8 * UNIT
    norms = terms[:, NORM]
    width = norms * ((norm_factors / factors).max() * wider)
    if metric.name == "l2":
        width += norms.square() * (coded.slack / factors.min() * wider)
    return torch.add(width, terms[:, RESIDUAL], alpha=wider), torch.stack([scales, factors])


def threshold(rounding: Tensor, lowest: Tensor) -> Tensor:
    """Return the similarity ``(Q,)`` float32 below which no row matters.

    Args:
        rounding: ``(Q,)``, that of the coded queries.
        lowest: ``(Q,)`` float32; k rows are known to have at least this similarity. `NO_ROW` or
            less where there are no k rows; then every row matters.
    """
    wide = lowest.double()
    # Scores are compared as float32: what differs by less may tie, and the lower id wins.
    wide = wide - 8 * UNIT * (wide.abs() + rounding) - 2 * FLOOR
    wide = torch.where(lowest > NO_ROW / 2, wide, -torch.inf).float()
    return wide.nextafter(torch.full_like(wide, -torch.inf))


def exact_scores(metric: Metric, coded: CodedQueries, upper: Tensor, owners: Tensor) -> Tensor:
    """Return float32 scores ``(P,)`` of pairs whose codes are the vectors.

    Args:
        metric: "l2" or "ip".
        coded: queries with ``is_exact``.
        upper: ``(P,)`` bounds, which are the similarities but for `FLOOR`.
        owners: ``(P,)`` queries.
    """
    # Similarities are whole multiples of a half.
    similarities = (2 * upper.double()).round_() / 2
    offsets = coded.offsets[owners]
    scores = offsets - 2 * similarities if metric.name == "l2" else offsets + similarities
    return scores.float() + 0.0
