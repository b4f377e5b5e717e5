"""What the metrics measure, for each query and one k; the definitions are those of trec_eval."""

import torch
from torch import Tensor

from elips_torch.evaluation.matching import Match


def recall(match: Match, k: int) -> Tensor:
    """Return the fraction of the relevant that is among the first k, ``(Q,)`` float64."""
    return _found(match, k).double() / match.n_relevant


def hit_rate(match: Match, k: int) -> Tensor:
    """Return 1 where any of the first k is relevant, ``(Q,)`` float64."""
    return (_found(match, k) > 0).double()


def precision(match: Match, k: int) -> Tensor:
    """Return the fraction of the first k places that is relevant, ``(Q,)`` float64."""
    return _found(match, k).double() / k


def average_precision(match: Match, k: int) -> Tensor:
    """Return the sum of the precisions at the hits among the first k, over R, ``(Q,)`` float64."""
    precisions = match.ordinals.double() / (match.places + 1)
    return precisions.masked_fill_(match.places >= k, 0.0).sum(1) / match.n_relevant


def reciprocal_rank(match: Match, k: int) -> Tensor:
    """Return one over the rank of the first hit, 0 where that is not among the first k, ``(Q,)`` float64."""
    if not match.places.shape[1]:
        return torch.zeros_like(match.n_relevant, dtype=torch.float64)
    return (1.0 / (match.first + 1.0).double()).masked_fill_(match.first >= k, 0.0)


def ndcg(match: Match, k: int) -> Tensor:
    """Return the gains of the first k places over those of the best order, ``(Q,)`` float64.

    A gain at rank r, from 1, counts ``1 / log2(r + 1)``.
    """
    gained = 1.0 / torch.log2(match.places.double() + 2.0)
    if match.gains is not None:
        gained *= match.gains
    gained = gained.masked_fill_(match.places >= k, 0.0).sum(1)
    # On the CPU: on a GPU a running sum of floats is not deterministic.
    discounts = 1.0 / torch.log2(torch.arange(1, k + 1, dtype=torch.float64, device="cpu") + 1.0)
    if match.ideal is not None:
        ideal = match.ideal[:, :k]
        return gained / (ideal * discounts[: ideal.shape[1]].to(ideal.device)).sum(1)
    best = torch.nn.functional.pad(discounts.cumsum(0), (1, 0)).to(gained.device)
    return gained / best[match.n_relevant.clamp_max(k)]


def r_precision(match: Match) -> Tensor:
    """Return the fraction of the first R places that is relevant, ``(Q,)`` float64."""
    found = (match.places < match.n_relevant[:, None]).sum(1)
    return found.double() / match.n_relevant


def _found(match: Match, k: int) -> Tensor:
    return (match.places < k).sum(1)
