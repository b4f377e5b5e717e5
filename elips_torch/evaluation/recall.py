"""Recall and hit rate of retrieved ids or labels, at several k at once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from elips_torch.core.errors import ArgumentError, DeviceError, DtypeError, ShapeError

# Comparing every retrieved id with every relevant one takes a byte per pair.
_PAIRS_AT_ONCE = 2**24


class _AtK(Metric):
    """An average over queries at several k; keeps two sums, whatever the number of queries."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    name = ""
    total: Tensor
    queries: Tensor

    def __init__(self, k: int | Sequence[int] = (1, 5, 10), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.k = _check_ks(k)
        # float64, so that the average does not depend on the order or the number of processes.
        self.add_state("total", torch.zeros(len(self.k), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("queries", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def compute(self) -> dict[str, Tensor]:
        """Return the average over all queries so far, 0-D float32 for each k; NaN for no query."""
        # An integer divides as float64, and 0 / 0 is NaN.
        average = (self.total / self.queries).float()
        return {f"{self.name}@{k}": value for k, value in zip(self.k, average, strict=True)}

    def _accumulate(self, found: Tensor, relevant: Tensor) -> None:
        """Add queries to the sums.

        Args:
            found: ``(Q, K)`` number of relevant entries that each place of the result found.
            relevant: ``(Q,)`` number of relevant entries in all; queries with none do not count.
        """
        found = found.cumsum(1)
        columns = torch.tensor([k - 1 for k in self.k], device=found.device)
        score = self._score(found[:, columns], relevant[:, None])
        counted = relevant > 0
        self.total += score.masked_fill_(~counted[:, None], 0.0).sum(0)
        self.queries += counted.sum()

    def _score(self, found: Tensor, relevant: Tensor) -> Tensor:
        """Return float64 ``(Q, len(k))`` for ``(Q, len(k))`` entries found of ``(Q, 1)``."""
        raise NotImplementedError


class _Recall(_AtK):
    """The fraction of what is relevant that was found."""

    name = "recall"

    def _score(self, found: Tensor, relevant: Tensor) -> Tensor:
        return found.double() / relevant.clamp_min(1)


class RecallAtK(_Recall):
    """Fraction of the relevant ids that are among the first k retrieved, averaged over queries.

    Queries without a relevant id do not count. A repeated id counts once.

    Args:
        k: one or several numbers of results to look at.
        **kwargs: passed on to `torchmetrics.Metric`.

    Raises:
        ArgumentError: k is empty, repeated or below 1.

    >>> import torch
    >>> recall = RecallAtK(k=(1, 3))
    >>> recall.update(torch.tensor([[7, 2, 9], [4, 5, -1]]), torch.tensor([[7, 9], [3, -1]]))
    >>> recall.compute()
    {'recall@1': tensor(0.2500), 'recall@3': tensor(0.5000)}
    """

    def update(self, retrieved_ids: Tensor, relevant_ids: Tensor) -> None:
        """Add queries.

        Args:
            retrieved_ids: ``(Q, K)`` int64, best first, K at least the largest k; -1 where nothing
                was found, which is never a hit.
            relevant_ids: ``(Q, R)`` or ``(Q,)`` int64, in any order, padded by -1.

        Raises:
            ElipsError: an argument of wrong dtype, shape or device.
        """
        self._accumulate(*_match_ids(retrieved_ids, relevant_ids, max(self.k)))


class HitRateAtK(_AtK):
    """Fraction of queries with anything relevant among the first k retrieved.

    Queries without a relevant id do not count. Given the labels of what was retrieved in place of ids,
    and each query's own label as what is relevant, this is the Recall@k of metric learning.

    Args:
        k: one or several numbers of results to look at.
        **kwargs: passed on to `torchmetrics.Metric`.

    Raises:
        ArgumentError: k is empty, repeated or below 1.

    >>> import torch
    >>> hit_rate = HitRateAtK(k=(1, 3))
    >>> hit_rate.update(torch.tensor([[7, 2, 9], [4, 5, -1]]), torch.tensor([[2, 9], [3, -1]]))
    >>> hit_rate.compute()
    {'hit_rate@1': tensor(0.), 'hit_rate@3': tensor(0.5000)}

    By label:

    >>> recall = HitRateAtK(k=2)
    >>> recall.update(retrieved_ids=torch.tensor([[0, 1], [0, 0]]), relevant_ids=torch.tensor([1, 2]))
    >>> recall.compute()
    {'hit_rate@2': tensor(0.5000)}
    """

    name = "hit_rate"

    def update(self, retrieved_ids: Tensor, relevant_ids: Tensor) -> None:
        """Add queries; the arguments are those of `RecallAtK.update`."""
        self._accumulate(*_match_ids(retrieved_ids, relevant_ids, max(self.k)))

    def _score(self, found: Tensor, relevant: Tensor) -> Tensor:
        return (found > 0).double()


class LabelRecallAtK(_Recall):
    """Fraction of the entries with the query's label that are among the first k retrieved.

    Args:
        k: one or several numbers of results to look at.
        **kwargs: passed on to `torchmetrics.Metric`.

    Raises:
        ArgumentError: k is empty, repeated or below 1.

    >>> import torch
    >>> recall = LabelRecallAtK(k=(1, 2))
    >>> recall.update(torch.tensor([[1, 1], [0, -1]]), torch.tensor([1, 1]), torch.tensor([4, 4]))
    >>> recall.compute()
    {'label_recall@1': tensor(0.1250), 'label_recall@2': tensor(0.2500)}
    """

    name = "label_recall"

    def update(self, retrieved_labels: Tensor, labels: Tensor, relevant: Tensor) -> None:
        """Add queries.

        Args:
            retrieved_labels: ``(Q, K)`` int64 labels of what was retrieved, best first; -1 where
                nothing was found, which is never a hit.
            labels: ``(Q,)`` int64 label of each query; one without a label has -1 and does not count.
            relevant: ``(Q,)`` int64 number of database entries with the query's label, the query
                itself left out; queries with none do not count.

        Raises:
            ElipsError: an argument of wrong dtype, shape or device.
        """
        _check_integers("labels", labels, 1)
        _check_integers("relevant", relevant, 1)
        if relevant.shape != labels.shape:
            raise ShapeError(f"relevant has shape {tuple(relevant.shape)}, expected {tuple(labels.shape)}")
        retrieved = _check_retrieved(
            "retrieved_labels", retrieved_labels, len(labels), labels.device, max(self.k)
        )
        self._accumulate(retrieved == labels[:, None], relevant.masked_fill(labels < 0, 0))


def _match_ids(retrieved: Tensor, relevant: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return for ``(Q, K)`` places how many relevant ids they found, and ``(Q,)`` how many there are."""
    if isinstance(relevant, Tensor) and relevant.ndim == 1:
        relevant = relevant[:, None]
    _check_integers("relevant_ids", relevant, 2)
    retrieved = _check_retrieved("retrieved_ids", retrieved, len(relevant), relevant.device, k)
    relevant = _without_repeats(relevant)
    retrieved = _without_repeats(retrieved)
    hit = torch.empty_like(retrieved, dtype=torch.bool)
    step = max(1, _PAIRS_AT_ONCE // max(1, k * relevant.shape[1]))
    for start in range(0, len(hit), step):
        part = slice(start, start + step)
        hit[part] = (retrieved[part, :, None] == relevant[part, None, :]).any(2)
    return hit.logical_and_(retrieved >= 0), (relevant >= 0).sum(1)


def _without_repeats(ids: Tensor) -> Tensor:
    """Return ``(Q, K)`` ids with every one that stands earlier in its row replaced by -1."""
    order = ids.argsort(dim=1, stable=True)
    ordered = ids.gather(1, order)
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    repeated.scatter_(1, order[:, 1:], ordered[:, 1:] == ordered[:, :-1])
    return ids.masked_fill(repeated, -1)


def _check_ks(k: int | Sequence[int]) -> tuple[int, ...]:
    ks = (k,) if isinstance(k, int) else tuple(k)
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in ks):
        raise DtypeError(f"k is {k!r}, expected an int or several")
    if not ks or min(ks) < 1 or len(set(ks)) < len(ks):
        raise ArgumentError(f"k is {k!r}, expected one or several different numbers, each at least 1")
    return ks


def _check_integers(name: str, tensor: Tensor, ndim: int) -> None:
    if not isinstance(tensor, Tensor):
        raise DtypeError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise DtypeError(f"{name} has dtype {tensor.dtype}, expected int64")
    if tensor.ndim != ndim:
        raise ShapeError(f"{name} has shape {tuple(tensor.shape)}, expected {('(Q,)', '(Q, R)')[ndim - 1]}")


def _check_retrieved(name: str, tensor: Tensor, n: int, device: torch.device, k: int) -> Tensor:
    """Return the first k columns, or raise."""
    _check_integers(name, tensor, 2)
    if tensor.shape[0] != n or tensor.shape[1] < k:
        raise ShapeError(f"{name} has shape {tuple(tensor.shape)}, expected ({n}, K) with K at least {k}")
    if tensor.device != device:
        raise DeviceError(f"{name} is on {tensor.device}, what it is compared with is on {device}")
    return tensor[:, :k]
