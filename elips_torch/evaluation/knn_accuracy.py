"""How often the neighbours' labels, by vote, are the query's own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from elips_torch.core.errors import DeviceError, DtypeError, NonFiniteError, ShapeError
from elips_torch.core.validation import describe_rows
from elips_torch.evaluation.averages import QueryAverage, check_ks
from elips_torch.evaluation.relevant import check_integers, check_retrieved


class KNNAccuracy(QueryAverage):
    """Fraction of queries whose label is the most frequent one among the first k retrieved.

    Of several equally frequent labels the one that stands first wins. Queries without a label (-1) do
    not count; one for which nothing was found is wrong.

    Args:
        k: one or several numbers of neighbours that vote.
        **kwargs: passed on to `torchmetrics.Metric`.

    Raises:
        ArgumentError: k is empty, repeated or below 1.

    >>> import torch
    >>> accuracy = KNNAccuracy(k=(1, 3))
    >>> accuracy.update(torch.tensor([[4, 2, 2], [1, 0, 0]]), torch.tensor([2, 1]))
    >>> accuracy.compute()
    {'knn_accuracy@1': tensor(0.5000), 'knn_accuracy@3': tensor(0.5000)}
    """

    def __init__(self, k: int | Sequence[int] = (1, 5, 10), **kwargs: Any) -> None:
        self.k = check_ks(k)
        super().__init__([f"knn_accuracy@{each}" for each in self.k], **kwargs)

    def update(self, retrieved_labels: Tensor, labels: Tensor, *, weights: Tensor | None = None) -> None:
        """Add queries.

        Args:
            retrieved_labels: ``(Q, K)`` int64 labels of what was retrieved, best first, K at least the
                largest k; -1 where nothing was found, which has no vote.
            labels: ``(Q,)`` int64 label of each query, -1 for none.
            weights: ``(Q, K)`` of the votes, such as ``(scores / temperature).exp()``; finite where
                something was found. Default is 1.

        Raises:
            NonFiniteError: the weight of a vote is NaN or infinity.
            ElipsError: an argument of wrong type, dtype, shape or device.
        """
        check_integers("labels", labels, 1)
        retrieved = check_retrieved(
            "retrieved_labels", retrieved_labels, len(labels), labels.device, max(self.k)
        )
        votes = _check_weights(weights, retrieved)
        winners = torch.stack([_winner(retrieved[:, :k], votes[:, :k]) for k in self.k], 1)
        self._add((winners == labels[:, None]).double(), labels >= 0)


def _winner(labels: Tensor, votes: Tensor) -> Tensor:
    """Return the label ``(Q,)`` with most of the votes ``(Q, K)``; the first in its row on ties."""
    ordered, order = labels.sort(dim=1, stable=True)
    changes = torch.zeros_like(ordered)
    changes[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    groups = torch.empty_like(order).scatter_(1, order, changes.cumsum(1))
    totals = torch.zeros_like(votes).scatter_add_(1, groups, votes).gather(1, groups)
    first = totals.masked_fill_(labels < 0, -torch.inf).argmax(1, keepdim=True)
    return labels.gather(1, first)[:, 0].masked_fill_((labels < 0).all(1), -1)


def _check_weights(weights: Tensor | None, retrieved: Tensor) -> Tensor:
    if weights is None:
        return torch.ones_like(retrieved, dtype=torch.float64)
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        got = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise DtypeError(f"weights is {got}, expected a float tensor")
    if weights.shape != retrieved.shape:
        raise ShapeError(f"weights has shape {tuple(weights.shape)}, expected {tuple(retrieved.shape)}")
    if weights.device != retrieved.device:
        raise DeviceError(f"weights is on {weights.device}, retrieved_labels is on {retrieved.device}")
    # What was not found has no vote, whatever its weight: the worst score is often infinite.
    finite = weights.isfinite() | (retrieved < 0)
    if not bool(finite.all()):
        where = describe_rows((~finite.all(1)).nonzero().flatten())
        raise NonFiniteError(f"weights has NaN or infinity in {where}, expected finite votes")
    return weights.double()
