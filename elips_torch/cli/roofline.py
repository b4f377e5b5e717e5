"""What a device reaches in memory bandwidth and matrix products, and a search's share of it."""

import dataclasses
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from elips_torch.cli.timing import clock_for

_ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Rates that a device reached just now.

    Attributes:
        bytes_per_second: read and written together, in a copy.
        flops_per_second: of a square matrix product in the dtype.
        dtype: of the product and of the database.
    """

    bytes_per_second: float
    flops_per_second: float
    dtype: torch.dtype

    def shares(self, n_queries: int, n_rows: int, dim: int, seconds: float) -> tuple[float, float]:
        """Return what fraction of the bandwidth and of the matrix rate a search reached.

        Counted is what a search in full precision cannot avoid: each row read once, and each query
        multiplied with each row. A search that reads a smaller plane can exceed 1.
        """
        size = n_rows * dim * self.dtype.itemsize
        flops = 2.0 * n_queries * n_rows * dim
        return size / seconds / self.bytes_per_second, flops / seconds / self.flops_per_second


def measure_roofline(
    device: torch.device, dtype: torch.dtype, *, copy_bytes: int = 2**30, side: int = 8192
) -> Roofline:
    """Measure a device with a copy and a matrix product.

    Args:
        device: what to measure.
        dtype: of the product.
        copy_bytes: size of what is copied; far above the caches.
        side: of the square matrices.
    """
    source = torch.zeros(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _median_seconds(device, lambda: target.copy_(source))
    matrix = torch.randn(side, side, device=device).to(dtype)
    product = _median_seconds(device, lambda: matrix @ matrix)
    return Roofline(2.0 * copy_bytes / copy, 2.0 * side**3 / product, dtype)


def _median_seconds(device: torch.device, call: Callable[[], Tensor]) -> float:
    clock = clock_for(device)
    call()
    return statistics.median(clock(call)[0] for _ in range(_ROUNDS))
