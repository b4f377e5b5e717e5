"""How much of what is relevant was found, and how much of what was found is relevant."""

from torch import Tensor

from elips_torch.evaluation import measures
from elips_torch.evaluation.averages import MetricAtK
from elips_torch.evaluation.matching import match_labels


class RecallAtK(MetricAtK):
    """Fraction of the relevant ids that are among the first k retrieved, averaged over queries.

    A repeated id counts once.

    Args:
        k: one or several numbers of results to look at.
        empty_target_action: what a query without a relevant id counts: "skip" not at all, "neg" 0.0,
            "pos" 1.0; "error" refuses it.
        **kwargs: passed on to `torchmetrics.Metric`.

    Raises:
        ArgumentError: k is empty, repeated or below 1; an unknown empty_target_action.

    >>> import torch
    >>> recall = RecallAtK(k=(1, 3))
    >>> recall.update(torch.tensor([[7, 2, 9], [4, 5, -1]]), torch.tensor([[7, 9], [3, -1]]))
    >>> recall.compute()
    {'recall@1': tensor(0.2500), 'recall@3': tensor(0.5000)}
    """

    name = "recall"
    measure = staticmethod(measures.recall)


class HitRateAtK(MetricAtK):
    """Fraction of queries with anything relevant among the first k retrieved.

    Given the labels of what was retrieved in place of ids, and each query's own label as what is
    relevant, this is the Recall@k of metric learning.

    Args:
        k: one or several numbers of results to look at.
        empty_target_action: as for `RecallAtK`.
        **kwargs: passed on to `torchmetrics.Metric`.

    Raises:
        ArgumentError: as for `RecallAtK`.

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
    measure = staticmethod(measures.hit_rate)


class PrecisionAtK(MetricAtK):
    """Fraction of the first k places that hold a relevant id; a place without a result is a miss.

    Args:
        k: one or several numbers of results to look at.
        empty_target_action: as for `RecallAtK`.
        **kwargs: passed on to `torchmetrics.Metric`.

    Raises:
        ArgumentError: as for `RecallAtK`.

    >>> import torch
    >>> precision = PrecisionAtK(k=(1, 4))
    >>> precision.update(torch.tensor([[7, 2, 9, -1]]), torch.tensor([[7, 9, 5]]))
    >>> precision.compute()
    {'precision@1': tensor(1.), 'precision@4': tensor(0.5000)}
    """

    name = "precision"
    measure = staticmethod(measures.precision)


class LabelRecallAtK(MetricAtK):
    """Fraction of the entries with the query's label that are among the first k retrieved.

    Args:
        k: one or several numbers of results to look at.
        empty_target_action: as for `RecallAtK`.
        **kwargs: passed on to `torchmetrics.Metric`.

    Raises:
        ArgumentError: as for `RecallAtK`.

    >>> import torch
    >>> recall = LabelRecallAtK(k=(1, 2))
    >>> recall.update(torch.tensor([[1, 1], [0, -1]]), torch.tensor([1, 1]), torch.tensor([4, 4]))
    >>> recall.compute()
    {'label_recall@1': tensor(0.1250), 'label_recall@2': tensor(0.2500)}
    """

    name = "label_recall"
    measure = staticmethod(measures.recall)

    def update(self, retrieved_labels: Tensor, labels: Tensor, relevant: Tensor) -> None:  # type: ignore[override]
        """Add queries.

        Args:
            retrieved_labels: ``(Q, K)`` int64 labels of what was retrieved, best first; -1 where
                nothing was found, which is never a hit.
            labels: ``(Q,)`` int64 label of each query; -1 for one without a label.
            relevant: ``(Q,)`` int64 number of database entries with the query's label, the query
                itself left out.

        Raises:
            ElipsError: an argument of wrong dtype, shape or device.
        """
        self._add_match(match_labels("retrieved_labels", retrieved_labels, labels, relevant, max(self.k)))
