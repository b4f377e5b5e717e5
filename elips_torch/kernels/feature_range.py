"""What bounds of distances need to know of a database, read tile by tile without a copy of it."""

from collections.abc import Iterator

import torch
from torch import Tensor

from elips_torch.core.tiling import spans

# Magnitudes for which `distance_error_bound` holds, beside zero.
LEAST_FEATURE, LARGEST_FEATURE = 2.0**-100, 2.0**100
# Bytes per feature of a tile: converted to float64, and its magnitude.
_FEATURE_BYTES = 16
# Tiles larger than this are no faster.
_MOST_BYTES = 64 * 2**20


def in_range(vectors: Tensor) -> Tensor:
    """Return bool shaped like the vectors, True for features that `distance_error_bound` covers."""
    size = vectors.abs()
    # Numbers beyond a dtype would be compared as infinity.
    largest = min(LARGEST_FEATURE, torch.finfo(vectors.dtype).max)
    return (size == 0) | ((size >= LEAST_FEATURE) & (size <= largest))


def all_in_range(vectors: Tensor, workspace_bytes: int) -> bool:
    """Return whether `distance_error_bound` covers every feature of ``(N, D)``."""
    covered = torch.ones((), dtype=torch.bool, device=vectors.device)
    for start, stop in _tiles(vectors, workspace_bytes):
        covered &= in_range(vectors[start:stop]).all()
    return bool(covered)


def magnitude_sums(vectors: Tensor, workspace_bytes: int) -> Tensor:
    """Return ``(N,)`` float64, the sum of the magnitudes of each row's features."""
    sums = torch.empty(vectors.shape[0], dtype=torch.float64, device=vectors.device)
    for start, stop in _tiles(vectors, workspace_bytes):
        sums[start:stop] = vectors[start:stop].double().abs_().sum(1)
    return sums


def _tiles(vectors: Tensor, workspace_bytes: int) -> Iterator[tuple[int, int]]:
    row_bytes = _FEATURE_BYTES * vectors.shape[1]
    return spans(vectors.shape[0], max(1, min(workspace_bytes, _MOST_BYTES) // row_bytes))
