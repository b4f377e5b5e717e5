"""Metrics in which the order of the retrieved ids counts."""

from typing import Any

from torch import Tensor

from elips_torch.evaluation import measures
from elips_torch.evaluation.averages import EmptyTargetAction, MetricAtK, RetrievalMetric
from elips_torch.evaluation.matching import Match


class MRR(MetricAtK):
    """Mean reciprocal rank: one over the rank of the first relevant id, 0 if none is among the first k.

    Args:
        k: one or several numbers of results to look at.
        empty_target_action: as for `RecallAtK`.
        **kwargs: passed on to `torchmetrics.Metric`.

    Raises:
        ArgumentError: as for `RecallAtK`.

    >>> import torch
    >>> mrr = MRR(k=(1, 3))
    >>> mrr.update(torch.tensor([[7, 2, 9]]), torch.tensor([[2, 9]]))
    >>> mrr.compute()
    {'mrr@1': tensor(0.), 'mrr@3': tensor(0.5000)}
    """

    name = "mrr"
    measure = staticmethod(measures.reciprocal_rank)


class MAP(MetricAtK):
    """Mean average precision: the precisions at the ranks of the hits, summed over the first k, over R.

    R is the number of relevant ids, also where it is more than k, as in trec_eval. Others divide by
    ``min(R, k)``: the evaluators of sentence-transformers, whose MAP@k is larger where R is more than k.

    Args:
        k: one or several numbers of results to look at.
        empty_target_action: as for `RecallAtK`.
        **kwargs: passed on to `torchmetrics.Metric`.

    Raises:
        ArgumentError: as for `RecallAtK`.

    >>> import torch
    >>> average_precision = MAP(k=4)
    >>> average_precision.update(torch.tensor([[7, 2, 9, 3]]), torch.tensor([[7, 3, 5, 6]]))
    >>> average_precision.compute()
    {'map@4': tensor(0.3750)}
    """

    name = "map"
    measure = staticmethod(measures.average_precision)


class NDCG(MetricAtK):
    """Normalised discounted cumulative gain: what the first k gain, over what the best order would.

    An id at rank r gains its relevance, or 1, times ``1 / log2(r + 1)``. The best order has the
    ``min(R, k)`` most relevant ids first. See Jaervelin and Kekaelaeinen, "Cumulated gain-based evaluation
    of IR techniques" (2002), and trec_eval, whose ndcg_cut this is.

    Args:
        k: one or several numbers of results to look at.
        empty_target_action: as for `RecallAtK`.
        **kwargs: passed on to `torchmetrics.Metric`.

    Raises:
        ArgumentError: as for `RecallAtK`.

    >>> import torch
    >>> ndcg = NDCG(k=3)
    >>> ndcg.update(torch.tensor([[7, 2, 9]]), torch.tensor([[2, 9]]), relevance=torch.tensor([[3, 1]]))
    >>> ndcg.compute()
    {'ndcg@3': tensor(0.6590)}
    """

    name = "ndcg"
    measure = staticmethod(measures.ndcg)


class RPrecision(RetrievalMetric):
    """Fraction of the first R retrieved ids that are relevant, R the number of relevant ids of the query.

    Where fewer than R were retrieved, the rest are misses.

    Args:
        empty_target_action: as for `RecallAtK`.
        **kwargs: passed on to `torchmetrics.Metric`.

    Raises:
        ArgumentError: an unknown empty_target_action.

    >>> import torch
    >>> r_precision = RPrecision()
    >>> r_precision.update(torch.tensor([[7, 2, 9]]), torch.tensor([[2, 9]]))
    >>> r_precision.compute()
    {'r_precision': tensor(0.5000)}
    """

    _whole = True

    def __init__(self, *, empty_target_action: EmptyTargetAction = "skip", **kwargs: Any) -> None:
        super().__init__(["r_precision"], empty_target_action=empty_target_action, **kwargs)

    def _scores(self, match: Match) -> Tensor:
        return measures.r_precision(match)[:, None]
