"""Vectors scaled to length 1."""

import torch
from torch import Tensor

from elips_torch.core.tiling import spans

# Features widened to float64 at a time.
_FEATURES_AT_ONCE = 2**20
# In the place of the length of zero.
_LEAST = 1e-300


def normalized(vectors: Tensor) -> Tensor:
    """Return vectors ``(N, D)`` of length 1, float32; zero stays zero."""
    step = max(1, _FEATURES_AT_ONCE // vectors.shape[1])
    parts = [_normalized(vectors[start:stop]) for start, stop in spans(len(vectors), step)]
    return parts[0] if len(parts) == 1 else torch.cat([vectors[:0].float(), *parts])


def _normalized(vectors: Tensor) -> Tensor:
    wide = vectors.detach().double()
    unit: Tensor = (wide / wide.norm(dim=1, keepdim=True).clamp_min_(_LEAST)).float()
    return unit
