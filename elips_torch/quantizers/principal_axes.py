"""The directions in which vectors vary most."""

import torch
from torch import Tensor

from elips_torch.core.tiling import spans

# Features widened to float64 at a time.
_FEATURES_AT_ONCE = 2**20


def principal_axes(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean ``(D,)``, the axes ``(D, D)`` and the variances ``(D,)``, all float64.

    Axes are the rows, by descending variance, of length 1; the entry of largest magnitude of each is
    positive.
    """
    n, dim = vectors.shape
    mean = vectors.new_zeros(dim, dtype=torch.float64)
    for start, stop in spans(n, max(1, _FEATURES_AT_ONCE // dim)):
        mean += vectors[start:stop].double().sum(0)
    mean /= n
    covariance = mean.new_zeros(dim, dim)
    for start, stop in spans(n, max(1, _FEATURES_AT_ONCE // dim)):
        centred = vectors[start:stop].double() - mean
        covariance.addmm_(centred.T, centred)
    variances, columns = torch.linalg.eigh(covariance / n)
    axes = columns.flip(1).T
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    return mean, axes * torch.where(largest < 0, -1.0, 1.0), variances.flip(0).clamp_min_(0.0)
