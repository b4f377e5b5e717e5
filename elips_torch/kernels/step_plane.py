"""Planes for sums of absolute differences: int8 codes with one step for all features and rows.

Where x - m is close to s c, and q - m to s d, differences of codes are differences of vectors:

    | sum |q - x| - s sum |d - c| - offset(q) |  <=  residual(x) + residual(q).

The residual of a row is the sum |x - m - s c|. That of a query leaves out the features that lie beyond all
codes: what their codes leave adds the same to every row, which ranks none before another; see
`code_query_in_steps` in `native/coding.h`.
"""

import math

import torch
from torch import Tensor

from elips_torch.core.metric import Metric
from elips_torch.kernels.plane import (
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
# Where more than this share of rows may be the nearest one, as far as codes tell, distances of the vectors
# themselves are faster (measured). It is looked at for so many rows and queries among them.
_MOST_SURVIVORS, _ROWS_FOR_SURVIVORS, _QUERIES_FOR_SURVIVORS = 1 / 32, 1024, 64


def make_step_plane(metric: Metric, vectors: Tensor) -> Plane | None:
    """Return a plane of rows ``(N, D)``, or None as `step_for` and `encode_in_steps` do."""
    offset = integer_offset(metric, vectors)
    if offset is not None:
        # Such rows are their codes.
        mean = torch.full((vectors.shape[1],), offset, dtype=torch.float32, device=vectors.device)
        return encode_in_steps(vectors, mean, 1.0)
    # A few long rows do not move the median.
    median = (
        _some(vectors, max(1, min(_ROWS_FOR_SURVIVORS, _MOST_FEATURES // vectors.shape[1]))).median(0).values
    )
    step = step_for(vectors, median)
    return None if step is None else encode_in_steps(vectors, median, step)


def _some(vectors: Tensor, n: int) -> Tensor:
    """Return so many rows, float32, or all where there are fewer; spread evenly whatever their order is."""
    if len(vectors) <= n:
        return vectors.float()
    places = torch.arange(n, dtype=torch.float64, device=vectors.device).mul_(_GOLDEN).frac_()
    return vectors[places.mul_(len(vectors)).long().unique()].float()


def step_for(vectors: Tensor, mean: Tensor) -> float | None:
    """Return the step with which codes of rows ``(N, D)`` leave least; a few long rows may be cut off.

    Least is meant of the geometric mean over the rows, which few rows cannot rule. None where codes with this
    step leave so much of so many rows that these would survive every screen.
    """
    centred = _some(vectors, max(1, _FEATURES_FOR_STEP // vectors.shape[1])) - mean
    longest = centred.abs().max() / 127
    steps = longest * 2.0 ** (-0.5 * torch.arange(_STEPS, dtype=torch.float32, device=vectors.device))
    left = [(centred - _codes(centred, step) * step).abs_().mean(1) for step in steps]
    # Codes may leave nothing.
    costs = torch.stack(
        [(each + _LEAST * step).log_().mean() for each, step in zip(left, steps, strict=True)]
    )
    step = max(float(steps[costs.argmin()]), _SMALLEST_STEP)
    # Of few rows little can be said, and little is lost; of many features it takes long.
    can_tell = (
        len(vectors) >= _ROWS_FOR_SURVIVORS and vectors.shape[1] * _ROWS_FOR_SURVIVORS <= _MOST_FEATURES
    )
    if can_tell and _survivors(_some(vectors, _ROWS_FOR_SURVIVORS) - mean, step) > _MOST_SURVIVORS:
        return None
    return step


def _survivors(rows: Tensor, step: float) -> float:
    """Return the share of centred rows ``(N, D)`` that may be nearest to one, as far as codes tell."""
    coded = _codes(rows, step) * step
    chosen = torch.arange(0, len(rows), len(rows) // _QUERIES_FOR_SURVIVORS, device=rows.device)
    distances = torch.cdist(coded[chosen], coded, p=1.0)
    # Of a query at most half a step is left of each feature, a quarter on average.
    errors = (rows - coded).abs_().sum(1) + rows.shape[1] * step / 4
    # No row is its own neighbour here; it survives, and so does the nearest other one.
    upper = (distances + errors).scatter_(1, chosen[:, None], torch.inf).amin(1, keepdim=True)
    return float((distances - errors <= upper).float().mean()) - 2 / len(rows)


def encode_in_steps(
    vectors: Tensor,  # (N, D) float32, float16 or bfloat16
    mean: Tensor,  # (D,) float32
    step: float,
) -> Plane | None:
    """Return the plane of some rows; None where a row is not finite or too long to be bounded.

    Args:
        vectors: ``(N, D)``.
        mean: ``(D,)`` float32, any point.
        step: a float32 number above zero.
    """
    n_rows, dim = vectors.shape
    codes = torch.empty(n_rows, dim, dtype=torch.int8, device=vectors.device)
    terms = torch.zeros(n_rows, 4, dtype=torch.float32, device=vectors.device)
    terms[:, SCALE] = terms[:, NORM] = 1.0
    wider = 1 + norm_slack(dim)
    for start, stop in chunks_of(vectors):
        part = slice(start, stop)
        centred = vectors[part].float() - mean
        size = centred.abs().sum(1)
        code = _codes(centred, step)
        codes[part] = code
        left = centred.sub_(code.mul_(step)).abs_().sum(1)
        # What lies below the normal numbers may be lost.
        terms[part, RESIDUAL] = (left + size * (_ROUNDED * UNIT)) * wider + dim * 2.0**-120
    if n_rows and not bool(terms[:, RESIDUAL].max() < LARGEST_NORM):
        return None
    return Plane(codes, terms, mean, step=step)


def _codes(centred: Tensor, step: Tensor | float) -> Tensor:
    """Return the codes of rows as numbers."""
    return (centred / step).round_().clamp_(-128.0, 127.0)
