"""Weights of neighbours from their scores, and what they mix."""

import torch
from torch import Tensor

from elips_torch.core.errors import ArgumentError, DtypeError


def neighbour_weights(
    scores: Tensor,  # (Q, K)
    ids: Tensor,  # (Q, K)
    *,
    higher_is_better: bool,
    temperature: float | None,
) -> Tensor:  # (Q, K)
    """Return the softmax of scores over the neighbours of each query, with gradients.

    Args:
        scores: ``(Q, K)``; distances count with a minus.
        ids: ``(Q, K)`` int64; -1 where there is no neighbour, which weighs nothing. A query without any
            has weights 0.
        higher_is_better: whether scores are similarities.
        temperature: what scores are divided by; None weighs all neighbours alike.
    """
    missing = ids < 0
    if temperature is None:
        even = (~missing).to(scores.dtype)
        return even / even.sum(1, keepdim=True).clamp_min(1.0)
    logits = scores.masked_fill(missing, 0.0) * ((1.0 if higher_is_better else -1.0) / temperature)
    # A finite number, since the softmax of nothing but -inf is NaN, backwards too.
    lowest = torch.finfo(logits.dtype).min
    return logits.masked_fill(missing, lowest).softmax(1).masked_fill(missing, 0.0)


def votes(weights: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return ``(Q, num_classes)``, the sum of the weights ``(Q, K)`` of each label ``(Q, K)``."""
    return weights.new_zeros(len(weights), num_classes).scatter_add(1, labels, weights)


def check_temperature(temperature: float | None) -> float | None:
    """Check a temperature and return it."""
    if temperature is None:
        return None
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise DtypeError(f"temperature is {temperature!r}, expected a number or None")
    if not temperature > 0.0:
        raise ArgumentError(f"temperature is {temperature}, expected a number above 0")
    return float(temperature)
