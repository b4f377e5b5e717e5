"""Every metric over ids, from one comparison."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from elips_torch.core.errors import ArgumentError
from elips_torch.core.validation import check_flag
from elips_torch.evaluation import measures
from elips_torch.evaluation.averages import EmptyTargetAction, RetrievalMetric, check_ks
from elips_torch.evaluation.matching import Match
from elips_torch.evaluation.ranking import MAP, MRR, NDCG
from elips_torch.evaluation.recall import HitRateAtK, LabelRecallAtK, PrecisionAtK, RecallAtK
from elips_torch.evaluation.relevant import RelevantIds

_RECALL = {False: RecallAtK, True: LabelRecallAtK}
_OTHERS = (HitRateAtK, PrecisionAtK, NDCG, MAP, MRR)


class RetrievalMetrics(RetrievalMetric):
    """Recall, hit rate, precision, NDCG, MAP and MRR at several k, and R-precision, from one pass.

    Definitions are those of trec_eval; each number is that of the metric of its name (`RecallAtK`,
    `HitRateAtK`, `PrecisionAtK`, `NDCG`, `MAP`, `MRR`, `RPrecision`). Memory does not depend on how many
    queries have been added. Sums are exact: the order of the queries, how they are split into batches,
    and among how many processes, change no digit.

    Args:
        k: one or several numbers of results to look at.
        labels: whether `update` is given labels, and ``n_relevant``, in place of ids. Then
            ``hit_rate@k`` is the Recall@k of metric learning, and the fraction found is called
            ``label_recall@k``.
        empty_target_action: what a query without a relevant id counts: "skip" not at all, "neg" 0.0,
            "pos" 1.0; "error" refuses it.
        **kwargs: passed on to `torchmetrics.Metric`.

    Raises:
        ArgumentError: k is empty, repeated or below 1; an unknown empty_target_action.

    >>> import torch
    >>> metrics = RetrievalMetrics(k=2)
    >>> metrics.update(torch.tensor([[7, 2, 9], [4, 5, -1]]), torch.tensor([[7, 9], [5, -1]]))
    >>> for name, value in metrics.compute().items():
    ...     print(f"{name} {value:.4f}")
    recall@2 0.7500
    hit_rate@2 1.0000
    precision@2 0.5000
    ndcg@2 0.6220
    map@2 0.5000
    mrr@2 0.7500
    r_precision 0.2500

    By label:

    >>> metrics = RetrievalMetrics(k=2, labels=True)
    >>> metrics.update(torch.tensor([[1, 1], [0, 2]]), torch.tensor([1, 2]), n_relevant=torch.tensor([8, 4]))
    >>> metrics.compute()["label_recall@2"]
    tensor(0.2500)
    """

    _whole = True

    def __init__(
        self,
        k: int | Sequence[int] = (1, 10, 100),
        *,
        labels: bool = False,
        empty_target_action: EmptyTargetAction = "skip",
        **kwargs: Any,
    ) -> None:
        ks = check_ks(k)
        self._metrics = (_RECALL[check_flag("labels", labels)], *_OTHERS)
        names = [f"{metric.name}@{each}" for metric in self._metrics for each in ks]
        super().__init__([*names, "r_precision"], ks, empty_target_action=empty_target_action, **kwargs)
        self.labels = labels

    def update(
        self,
        retrieved_ids: Tensor,
        relevant_ids: RelevantIds,
        *,
        lims: Tensor | None = None,
        relevance: RelevantIds | None = None,
        n_relevant: Tensor | None = None,
    ) -> None:
        """Add queries; the arguments are those of `RecallAtK.update`."""
        if self.labels != (n_relevant is not None):
            wanted = "n_relevant (Q,) beside labels" if self.labels else "ids: labels=True takes n_relevant"
            raise ArgumentError(f"labels is {self.labels}, expected {wanted}")
        super().update(retrieved_ids, relevant_ids, lims=lims, relevance=relevance, n_relevant=n_relevant)

    def _scores(self, match: Match) -> Tensor:
        scores = [metric.measure(match, k) for metric in self._metrics for k in self.k]
        return torch.stack([*scores, measures.r_precision(match)], 1)
