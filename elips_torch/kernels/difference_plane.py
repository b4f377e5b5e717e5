"""Planes for sums of absolute differences: codes whose differences are differences of vectors.

Where x - m is close to s c, and q - m to s d, with one step s for all features and rows,

    | sum |q - x| - s sum |d - c| - offset(q) |  <=  residual(x) + residual(q).

int8 codes are whole numbers, whose sums are exact. The residual of a row is the sum |x - m - s c|; that of a
query leaves out the features that lie beyond all codes: what their codes leave adds the same to every row,
which ranks none before another; see `code_query_of_differences` in `native/coding.h`.

bfloat16 codes are the rounded differences themselves, s is 1, and d is float32. They leave a share of each
feature, so that rows of all sizes may have them; they take twice the memory. What a sum of float32 loses adds
to both residuals.
"""

import dataclasses
import math

import torch
from torch import Tensor

from elips_torch.core.metric import Metric, resolve_metric
from elips_torch.kernels.distance_bounds import error_share
from elips_torch.kernels.plane import (
    CODE_DTYPES,
    LARGEST_NORM,
    NORM,
    RESIDUAL,
    SCALE,
    UNIT,
    Plane,
    chunks_of,
    integer_offset,
    norm_slack,
)

# The metrics whose differences are summed: "gower" is their mean.
METRICS = ("l1", "gower")
# Roundoffs of float32 that centring, coding and the bounds of a row may lose, relative to its size.
_ROUNDED = 24
# By its multiples, numbers from 0 to 1 are spread evenly.
_GOLDEN = (math.sqrt(5) - 1) / 2
# Features, of rows spread evenly, by which steps are compared.
_FEATURES_FOR_STEP = 2**17
# Steps that are tried, each shorter by the square root of two.
_STEPS = 32
# Bounds may err by 2**-100 anyway.
_SMALLEST_STEP = 2.0**-90
# Features that the median and survivors are looked for in, at most.
_MOST_FEATURES = 2**22
# What codes leave of a feature counts as at least this part of a step.
_LEAST = 2.0**-10
# Rows that a median is taken of.
_ROWS_FOR_MEDIAN = 1024
# Codes are looked at by so many searches for so many neighbours, each among so many rows that lie together.
# Where more of these may be neighbours, as far as codes tell, other codes or none are faster (measured).
_SEARCHES, _NEIGHBOURS, _ROWS_TOGETHER, _MOST_SURVIVORS = 32, 10, 256, 1 / 5
# int8 codes leave much of rows that lie beyond them, and searches near these are slow: so few rows may lose
# more than this share of a usual distance.
_MOST_BEYOND, _FAR_BEYOND = 1 / 256, 1 / 4
_L1 = resolve_metric("l1")


@dataclasses.dataclass(frozen=True)
class DifferenceCodes:
    """What rows are coded by.

    Attributes:
        kind: "int8" or "bf16".
        mean: ``(D,)`` float32.
        step: 1 for "bf16".
    """

    kind: str
    mean: Tensor
    step: float = 1.0

    def encode(self, vectors: Tensor) -> Plane | None:
        """Return the plane of rows ``(N, D)``, or None as `encode_differences` does."""
        return encode_differences(vectors, self.mean, self.kind, self.step)


def choose_codes(
    metric: Metric, vectors: Tensor, kind: str, order: Tensor | None = None
) -> DifferenceCodes | None:
    """Return what to code rows ``(N, D)`` by; None where no codes tell rows apart that are near each other.

    Args:
        metric: one of `METRICS`.
        vectors: ``(N, D)``.
        kind: "int8", which becomes "bf16" where a sample says that int8 codes leave too much; or "bf16".
        order: ``(N,)`` int64, the rows, those together that are near each other. Default: any are.
    """
    offset = integer_offset(metric, vectors) if kind == "int8" else None
    if offset is not None:
        # Such rows are their codes.
        return DifferenceCodes(kind, vectors.new_full((vectors.shape[1],), offset, dtype=torch.float32))
    # A few long rows do not move the median.
    few = max(1, min(_ROWS_FOR_MEDIAN, _MOST_FEATURES // vectors.shape[1]))
    median = _some(vectors, few).median(0).values
    tried = [DifferenceCodes("bf16", median)]
    if kind == "int8":
        tried.insert(0, DifferenceCodes("int8", median, step_for(vectors, median)))
    return next((codes for codes in tried if tells_apart(vectors, codes, order)), None)


def _some(vectors: Tensor, n: int) -> Tensor:
    """Return so many rows, float32, or all where there are fewer; spread evenly whatever their order is."""
    if len(vectors) <= n:
        return vectors.float()
    places = torch.arange(n, dtype=torch.float64, device=vectors.device).mul_(_GOLDEN).frac_()
    return vectors[places.mul_(len(vectors)).long().unique()].float()


def step_for(vectors: Tensor, mean: Tensor) -> float:
    """Return the step with which int8 codes of rows ``(N, D)`` leave least; a few long rows may be cut off.

    Least is meant of the geometric mean over the rows, which few rows cannot rule.
    """
    centred = _some(vectors, max(1, _FEATURES_FOR_STEP // vectors.shape[1])) - mean
    longest = centred.abs().max() / 127
    steps = longest * 2.0 ** (-0.5 * torch.arange(_STEPS, dtype=torch.float32, device=vectors.device))
    left = [(centred - _codes(centred, "int8", step) * step).abs_().mean(1) for step in steps]
    # Codes may leave nothing.
    costs = torch.stack(
        [(each + _LEAST * step).log_().mean() for each, step in zip(left, steps, strict=True)]
    )
    return max(float(steps[costs.argmin()]), _SMALLEST_STEP)


def tells_apart(vectors: Tensor, codes: DifferenceCodes, order: Tensor | None = None) -> bool:
    """Whether searches among some of the rows ``(N, D)`` would drop most of them by their codes.

    Args:
        vectors: ``(N, D)``.
        codes: what rows would be coded by.
        order: as for `choose_codes`.
    """
    n_rows, dim = vectors.shape
    # Of few rows little can be said, and little is lost.
    if n_rows < 4 * _ROWS_TOGETHER:
        return True
    n_searches = min(_SEARCHES, _MOST_FEATURES // (_ROWS_TOGETHER * dim))
    if not n_searches:
        # It would take long.
        return codes.kind == "bf16"
    if order is not None and len(order) != n_rows:
        # Another thread is changing the lists.
        order = None
    if codes.kind == "int8" and _many_lie_beyond(vectors, codes):
        return False
    survivors = 0.0
    for number in range(n_searches):
        start = (n_rows - _ROWS_TOGETHER) * number // max(1, n_searches - 1)
        part = slice(start, start + _ROWS_TOGETHER)
        rows = (vectors[part] if order is None else vectors[order[part]]).float() - codes.mean
        coded = _codes(rows, codes.kind, codes.step).mul_(codes.step)
        left = _left(rows, coded, codes.kind)
        # The row in the middle is the query, and none of its neighbours.
        query = _ROWS_TOGETHER // 2
        distances = (coded - coded[query]).abs_().sum(1)
        # The query itself is not rounded to bfloat16.
        own = left[query] if codes.kind == "int8" else rows[query].abs().sum() * lost_share("bf16", dim)
        errors = left + own
        upper = distances + errors
        upper[query] = torch.inf
        reached = (distances - errors <= upper.kthvalue(_NEIGHBOURS).values).sum() - _NEIGHBOURS - 1
        survivors += float(reached) / _ROWS_TOGETHER
    return survivors <= _MOST_SURVIVORS * n_searches


def _many_lie_beyond(vectors: Tensor, codes: DifferenceCodes) -> bool:
    """Whether many rows ``(N, D)`` are so long that codes leave most of them."""
    rows = _some(vectors, min(4 * _ROWS_TOGETHER, _MOST_FEATURES // vectors.shape[1])) - codes.mean
    coded = _codes(rows, codes.kind, codes.step).mul_(codes.step)
    usual = torch.cdist(coded[:: len(coded) // _SEARCHES], coded, p=1.0).median()
    return float((_left(rows, coded, codes.kind) > _FAR_BEYOND * usual).float().mean()) > _MOST_BEYOND


def encode_differences(
    vectors: Tensor,  # (N, D) float32, float16 or bfloat16
    mean: Tensor,  # (D,) float32
    kind: str,
    step: float,
) -> Plane | None:
    """Return the plane of some rows; None where a row is not finite or too long to be bounded.

    Args:
        vectors: ``(N, D)``.
        mean: ``(D,)`` float32, any point.
        kind: "int8" or "bf16".
        step: a float32 number above zero; 1 for "bf16".
    """
    n_rows, dim = vectors.shape
    codes = torch.empty(n_rows, dim, dtype=CODE_DTYPES[kind], device=vectors.device)
    terms = torch.zeros(n_rows, 4, dtype=torch.float32, device=vectors.device)
    terms[:, SCALE] = terms[:, NORM] = 1.0
    for start, stop in chunks_of(vectors):
        part = slice(start, stop)
        centred = vectors[part].float() - mean
        code = _codes(centred, kind, step)
        codes[part] = code
        terms[part, RESIDUAL] = _left(centred, code.mul_(step), kind)
    if n_rows and not bool(terms[:, RESIDUAL].max() < LARGEST_NORM):
        return None
    return Plane(codes, terms, mean, step=step)


def lost_share(kind: str, dim: int) -> float:
    """Return the share of the sizes of both sides that a sum of differences of codes loses at most."""
    return 0.0 if kind == "int8" else error_share(_L1, dim)


def _codes(centred: Tensor, kind: str, step: Tensor | float) -> Tensor:
    """Return the codes of rows as numbers, a new tensor."""
    if kind == "bf16":
        return centred.bfloat16().float()
    return (centred / step).round_().clamp_(-128.0, 127.0)


def _left(centred: Tensor, coded: Tensor, kind: str) -> Tensor:
    """Return the residuals ``(N,)`` of centred rows, given what their codes stand for."""
    dim = centred.shape[1]
    lost = _ROUNDED * UNIT + lost_share(kind, dim)
    left = (centred - coded).abs_().sum(1) + centred.abs().sum(1) * lost
    # What lies below the normal numbers may be lost.
    return left * (1 + norm_slack(dim)) + dim * 2.0**-120
