"""Which plane serves a database, and why another cannot."""

import torch

from elips_torch.core.errors import ArgumentError
from elips_torch.core.hardware import int8_product_is_fast
from elips_torch.core.metric import Metric

SCREENS = ("auto", "int8", "bf16", "none")
# Beyond this many features a sum of int8 products may leave int32.
LARGEST_INT8_DIM = (2**31 - 1) // 128**2


def screen_reasons(screen: str, metric: Metric, dtype: torch.dtype, dim: int) -> list[str]:
    """Return why a plane cannot screen a database; empty where it can.

    Args:
        screen: "int8" or "bf16".
        metric: the distance kind.
        dtype: dtype of the vectors.
        dim: D.
    """
    reasons = []
    if metric.form != "product":
        reasons.append(
            f"metric {metric.name!r} is no product; screens that are asked for serve 'l2', 'ip' and 'cosine'"
        )
    if dtype == torch.float64:
        reasons.append("float64 vectors differ by less than a screen can bound")
    if screen == "int8" and dim > LARGEST_INT8_DIM:
        reasons.append(f"int8 products of {dim} features may leave int32, at most {LARGEST_INT8_DIM} fit")
    return reasons


def check_screen(screen: str, metric: Metric, dtype: torch.dtype, dim: int) -> str:
    """Return the screen, or raise.

    Raises:
        ArgumentError: an unknown screen, or one that cannot serve; the message lists every reason.
    """
    if screen not in SCREENS:
        raise ArgumentError(f"screen is {screen!r}, expected one of {', '.join(map(repr, SCREENS))}")
    if screen in ("int8", "bf16"):
        reasons = screen_reasons(screen, metric, dtype, dim)
        if reasons:
            raise ArgumentError(f"screen {screen!r} cannot serve: {'; '.join(reasons)}")
    return screen


def choose_screen(screen: str, metric: Metric, dtype: torch.dtype, dim: int, device: torch.device) -> str:
    """Return the plane to keep, "int8", "bf16", "fp32" or "none", from static facts.

    "fp32" is the vectors themselves with the terms of their bounds: where no low-precision product is
    faster, the float32 product screens.

    >>> from elips_torch.core.metric import resolve_metric
    >>> choose_screen("auto", resolve_metric("l1"), torch.float32, 64, torch.device("cpu"))
    'none'
    """
    if screen != "auto":
        return screen
    if screen_reasons("int8", metric, dtype, dim):
        return "none"
    if device.type == "cuda" or int8_product_is_fast(device):
        return "int8"
    if device.type == "cpu" and dtype == torch.float32:
        return "fp32"
    return "none"
