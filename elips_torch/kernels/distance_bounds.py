"""Bounds on the rounding of distances that are computed in float32.

They hold for features that are 0 or of magnitude 2**-100 to 2**100, which are float32 themselves, and
for sums in any order: n terms err by at most gamma_n = n u / (1 - n u) times the sum of their
magnitudes, with u = 2**-24 (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section
3.1). Beside sums, products and differences, which are rounded once, they take for granted that

- a division errs by at most 3 units in the last place,
- log and log2 err by at most 8 u max(1, |result|), exp2 by at most 8 u relatively,
- what underflows is lost altogether.

The documented errors of CUDA's and ROCm's functions are below these.
"""

import math

import torch
from torch import Tensor

from elips_torch.core.metric import Metric

_UNIT_ROUNDOFF = 2.0**-24
_TINY = torch.finfo(torch.float32).tiny
# Largest |log2| of a power that neither overflows nor underflows.
_LARGEST_EXPONENT = 160


def distance_error_bound(
    metric: Metric,
    distances: Tensor,  # float32
    dim: int,
    *,
    query_sums: Tensor | None = None,  # float64, broadcasts with distances
    row_sums: Tensor | None = None,  # float64, broadcasts with distances
) -> Tensor:  # float64, shaped like distances; infinite or NaN where nothing can be said
    """Bound how far float32 distances are from the metric's definition.

    Less its bound, a distance grows with the distance, so that of a group's minimum bounds every row
    of the group from below.

    Args:
        metric: one that `distance_group_min_triton` takes.
        distances: what it computed.
        dim: number of features.
        query_sums: sum of the magnitudes of each query's features; needed for "jensenshannon" only.
        row_sums: the same of each row, or the largest of a group's.

    Raises:
        ValueError: the sums are missing, or the metric has no bound.
    """
    share = error_share(metric, dim)
    if metric.name == "jensenshannon":
        if query_sums is None or row_sums is None:
            raise ValueError("the bound of 'jensenshannon' needs query_sums and row_sums")
        bound = share * (query_sums + row_sums)
    else:
        bound = share * distances.double()
    # Distances are finite unless something overflowed.
    return torch.where(distances.isfinite(), bound + 8.0 * dim * _TINY, torch.inf)


def error_share(metric: Metric, dim: int) -> float:
    """Return the share of a float32 distance that its error is at most, beside what underflows.

    For "jensenshannon" it is a share of the sums of the magnitudes of both vectors' features; infinite
    where nothing can be said.

    Args:
        metric: one that is computed as a distance.
        dim: number of features.

    Raises:
        ValueError: the metric has no bound.
    """
    if metric.name == "jensenshannon":
        # Its terms have both signs. A feature with mean m adds two of size at most 1.4 m, each off by
        # 42 u m through the rounding of the ratio, the logarithm and the product; half of the sum of
        # 2 m over all features is half of the sums given. With those 90 u m and 2.8 m per addition:
        # (23 + 0.7 dim) u times the sums.
        return _gamma(dim + 32)
    if metric.name in ("l1", "linf", "gower", "canberra", "l2"):
        # Difference, sum of magnitudes and division by 3 units: at most 9 roundings beside the sum's. The
        # square of a difference errs by less.
        return _gamma(dim + 16)
    if metric.name == "braycurtis":
        return _gamma(2 * dim + 16)
    if metric.name == "lp":
        # The exponent's errors are relative ones of the power: log2 by 8 u max(1, |log2|), times p,
        # and one rounding of a product of at most 160; all times ln 2.
        return _gamma(dim + 7 * _LARGEST_EXPONENT + 8 * metric.p + 16)
    raise ValueError(f"metric {metric.name!r} is a product and is not computed as a distance")


def _gamma(terms: float) -> float:
    loss = terms * _UNIT_ROUNDOFF
    # Twice what is needed: the bound is itself rounded, and so is the definition in float64.
    return 2.0 * loss / (1.0 - loss) if loss < 0.5 else math.inf
