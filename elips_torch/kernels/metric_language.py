"""What the definitions of the metrics add up per feature, as device functions."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl
from triton.language.extra import libdevice

from elips_torch.kernels.triton_language import INTERPRETED


@triton.jit
def power(base, exponent: tl.constexpr):
    """Return base ** exponent for base >= 0, in the base's own precision."""
    if exponent == 1.0:
        return base
    elif exponent == 2.0:
        return base * base
    elif INTERPRETED or base.dtype == tl.float32:
        # The interpreter has no libdevice, and float32 is for distances with a bound on their error.
        return tl.where(base > 0, tl.exp2(exponent * tl.log2(tl.where(base > 0, base, 1.0))), 0.0)
    else:
        return libdevice.pow(base, tl.full(base.shape, exponent, tl.float64))


@triton.jit
def x_log_ratio(x, middle):
    """Return x log(x / middle), which is 0 where x is."""
    ratio = tl.where(x == 0, 1.0, x / tl.where(middle == 0, 1.0, middle))
    return tl.where(x == 0, 0.0, x * tl.log(ratio))


@triton.jit
def definition_terms(q, x, METRIC: tl.constexpr, P: tl.constexpr):
    """Return what the metric's definition adds up per feature; features that are 0 on both sides give 0."""
    difference = tl.abs(q - x)
    if METRIC == "l2":
        return difference * difference
    elif METRIC == "ip" or METRIC == "cosine":
        return q * x
    elif METRIC == "lp":
        return power(difference, P)
    elif METRIC == "canberra":
        size = tl.abs(q) + tl.abs(x)
        return tl.where(size == 0, 0.0, difference / tl.where(size == 0, 1.0, size))
    elif METRIC == "jensenshannon":
        middle = 0.5 * (q + x)
        return tl.where(middle == 0, 0.0, x_log_ratio(q, middle) + x_log_ratio(x, middle))
    else:
        # l1, linf, gower and the numerator of braycurtis.
        return difference
