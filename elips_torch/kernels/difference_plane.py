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
# Codes are looked at for so many rows, and queries among them.
_ROWS_FOR_SURVIVORS, _QUERIES_FOR_SURVIVORS = 1024, 64
# Where a larger share of rows may be the nearest one, as far as codes tell, other codes or none are faster
# (measured); likewise where what they leave is more than this share of the distance to the nearest one, since the
# rows of the lists that a query reads are all near.
_MOST_SURVIVORS, _MOST_BLURRED = 1 / 64, 1 / 2
# int8 codes leave much of rows that lie beyond them, and searches near these are slow: so few rows may be left
# more of than this share of a usual distance.
_MOST_BEYOND, _FAR_BEYOND = 1 / 256, 1 / 4
_L1 = resolve_metric("l1")


def make_difference_plane(metric: Metric, vectors: Tensor, kind: str) -> Plane | None:
    """Return a plane of rows ``(N, D)``; None where no codes tell rows apart, or as `encode_differences` does.

    Args:
        metric: one of `METRICS`.
        vectors: ``(N, D)``.
        kind: "int8", which becomes "bf16" where a sample says that int8 codes would leave too much; or "bf16".
    """
    offset = integer_offset(metric, vectors) if kind == "int8" else None
    if offset is not None:
        # Such rows are their codes.
        mean = torch.full((vectors.shape[1],), offset, dtype=torch.float32, device=vectors.device)
        return encode_differences(vectors, mean, kind, 1.0)
    # A few long rows do not move the median.
    few = max(1, min(_ROWS_FOR_SURVIVORS, _MOST_FEATURES // vectors.shape[1]))
    median = _some(vectors, few).median(0).values
    step = step_for(vectors, median) if kind == "int8" else None
    if step is not None:
        return encode_differences(vectors, median, "int8", step)
    if not tells_apart(vectors, median, "bf16", 1.0):
        return None
    return encode_differences(vectors, median, "bf16", 1.0)


def _some(vectors: Tensor, n: int) -> Tensor:
    """Return so many rows, float32, or all where there are fewer; spread evenly whatever their order is."""
    if len(vectors) <= n:
        return vectors.float()
    places = torch.arange(n, dtype=torch.float64, device=vectors.device).mul_(_GOLDEN).frac_()
    return vectors[places.mul_(len(vectors)).long().unique()].float()


def step_for(vectors: Tensor, mean: Tensor) -> float | None:
    """Return the step with which int8 codes of rows ``(N, D)`` leave least; a few long rows may be cut off.

    Least is meant of the geometric mean over the rows, which few rows cannot rule. None where codes with this
    step do not tell rows apart.
    """
    centred = _some(vectors, max(1, _FEATURES_FOR_STEP // vectors.shape[1])) - mean
    longest = centred.abs().max() / 127
    steps = longest * 2.0 ** (-0.5 * torch.arange(_STEPS, dtype=torch.float32, device=vectors.device))
    left = [(centred - _codes(centred, "int8", step) * step).abs_().mean(1) for step in steps]
    # Codes may leave nothing.
    costs = torch.stack(
        [(each + _LEAST * step).log_().mean() for each, step in zip(left, steps, strict=True)]
    )
    step = max(float(steps[costs.argmin()]), _SMALLEST_STEP)
    return step if tells_apart(vectors, mean, "int8", step) else None


def tells_apart(vectors: Tensor, mean: Tensor, kind: str, step: float) -> bool:
    """Whether few rows of a sample of ``(N, D)`` would survive a search by codes of a kind."""
    # Of few rows little can be said, and little is lost; of many features it takes long.
    if len(vectors) < _ROWS_FOR_SURVIVORS or vectors.shape[1] * _ROWS_FOR_SURVIVORS > _MOST_FEATURES:
        return True
    rows = _some(vectors, _ROWS_FOR_SURVIVORS) - mean
    coded = _codes(rows, kind, step).mul_(step)
    left = _left(rows, coded, kind)
    chosen = torch.arange(0, len(rows), len(rows) // _QUERIES_FOR_SURVIVORS, device=rows.device)
    distances = torch.cdist(coded[chosen], coded, p=1.0)
    if kind == "int8" and float((left > _FAR_BEYOND * distances.median()).float().mean()) > _MOST_BEYOND:
        return False
    # Of a query at most half a step is left of each feature, a quarter on average.
    errors = left + (rows.shape[1] * step / 4 if kind == "int8" else 0.0)
    # No row is its own neighbour here; it survives, and so does the nearest other one.
    others = distances.scatter(1, chosen[:, None], torch.inf)
    upper = (others + errors).amin(1, keepdim=True)
    survivors = float((distances - errors <= upper).float().mean()) - 2 / len(rows)
    is_blurred = bool(errors.median() > _MOST_BLURRED * others.amin(1).median())
    return survivors <= _MOST_SURVIVORS and not is_blurred


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
