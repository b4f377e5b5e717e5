"""Averages over queries, kept as two sums; the base of the metrics over ids."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor
from torchmetrics import Metric

from elips_torch.core.errors import ArgumentError, DtypeError
from elips_torch.core.validation import describe_rows
from elips_torch.evaluation.matching import Match, match_ids, match_labels
from elips_torch.evaluation.relevant import RelevantIds

EmptyTargetAction = Literal["neg", "pos", "skip", "error"]

# Scores are counted in this unit, far below what float32 tells apart. Sums of integers are exact: the
# average depends neither on the order of queries nor on the processes, and casts of a module that
# holds the metric (`half`, mixed precision of a trainer) leave integers alone.
_UNIT = 2.0**-30


class QueryAverage(Metric):
    """Averages of one or several scores over queries; memory does not depend on how many there are.

    Args:
        names: of the scores, which are the keys of what `compute` returns.
        **kwargs: passed on to `torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    total: Tensor
    queries: Tensor

    def __init__(self, names: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names = tuple(names)
        self.add_state("total", torch.zeros(len(names), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("queries", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def compute(self) -> dict[str, Tensor]:
        """Return the average over all queries so far, 0-D float32 for each name; NaN for no query."""
        # 0 / 0 is NaN.
        average = (self.total.double() * _UNIT / self.queries).float()
        return dict(zip(self.names, average.unbind(), strict=True))

    def set_dtype(self, dst_type: str | torch.dtype) -> Self:
        """Return the metric as it is: sums in another dtype would not be exact."""
        return self

    def _add(self, scores: Tensor, counted: Tensor) -> None:
        """Add float64 scores ``(Q, len(names))`` of the queries that count, bool ``(Q,)``."""
        units = (scores / _UNIT).round_().masked_fill_(~counted[:, None], 0.0)
        self.total += units.long().sum(0)
        self.queries += counted.sum()


class RetrievalMetric(QueryAverage):
    """An average over queries of what their hits say.

    Args:
        names: of the scores.
        k: numbers of results to look at.
        empty_target_action: what a query without a relevant id counts: "skip" not at all, "neg" 0.0,
            "pos" 1.0; "error" refuses it.
        **kwargs: passed on to `torchmetrics.Metric`.
    """

    # Whether places behind the largest k matter, up to the number of relevant ids.
    _whole: ClassVar[bool] = False

    def __init__(
        self,
        names: Sequence[str],
        k: tuple[int, ...] = (),
        *,
        empty_target_action: EmptyTargetAction = "skip",
        **kwargs: Any,
    ) -> None:
        super().__init__(names, **kwargs)
        if empty_target_action not in get_args(EmptyTargetAction):
            raise ArgumentError(
                f"empty_target_action is {empty_target_action!r}, expected 'neg', 'pos', 'skip' or 'error'"
            )
        self.k = k
        self.empty_target_action = empty_target_action

    def update(
        self,
        retrieved_ids: Tensor,
        relevant_ids: RelevantIds,
        *,
        lims: Tensor | None = None,
        relevance: RelevantIds | None = None,
        n_relevant: Tensor | None = None,
    ) -> None:
        """Add queries.

        Args:
            retrieved_ids: ``(Q, K)`` int64, best first, K at least the largest k; -1 where nothing
                was found, which is never a hit. Of a repeated id, the first counts.
            relevant_ids: ``(Q, R)`` int64, in any order, padded by -1; or ``(Q,)``, one for each; or a list
                of Q tensors ``(R_i,)``; or ``(M,)``, those of all queries, with lims.
            lims: ``(Q + 1,)`` int64: the ids of query i are ``relevant_ids[lims[i]:lims[i + 1]]``.
            relevance: how relevant each id is, in the form of relevant_ids; an id of 0 or less is not.
                The degrees matter to NDCG alone.
            n_relevant: if given, labels stand in place of ids: ``retrieved_ids (Q, K)`` are the labels of
                what was retrieved, ``relevant_ids (Q,)`` is each query's own (-1 for none), and
                this ``(Q,)`` int64 the number of database entries with that label, the query left out.
                Every entry of the label is a hit.

        Raises:
            ElipsError: an argument of wrong type, dtype, shape, device or value; or a query without a
                relevant id, if that is an error. Nothing has been added then.
        """
        k = max(self.k, default=0)
        if n_relevant is None:
            match = match_ids(
                retrieved_ids, relevant_ids, k, lims=lims, relevance=relevance, whole=self._whole
            )
        else:
            if lims is not None or relevance is not None or not isinstance(relevant_ids, Tensor):
                raise ArgumentError("n_relevant says that labels are given: expected relevant_ids (Q,) alone")
            match = match_labels("retrieved_ids", retrieved_ids, relevant_ids, n_relevant, k)
        self._add_match(match)

    def _add_match(self, match: Match) -> None:
        counted = match.n_relevant > 0
        action = self.empty_target_action
        if action == "error" and not bool(counted.all()):
            where = describe_rows((~counted).nonzero().flatten())
            raise ArgumentError(f"no id is relevant in {where}, and empty_target_action is 'error'")
        scores = self._scores(match)
        if action in ("neg", "pos"):
            scores = scores.masked_fill_(~counted[:, None], float(action == "pos"))
            counted = torch.ones_like(counted)
        self._add(scores, counted)

    def _scores(self, match: Match) -> Tensor:
        """Return float64 ``(Q, len(names))``; any number for a query without a relevant id."""
        raise NotImplementedError


class MetricAtK(RetrievalMetric):
    """An average of one measure at several k.

    Args:
        k: one or several numbers of results to look at.
        empty_target_action: as for `RetrievalMetric`.
        **kwargs: passed on to `torchmetrics.Metric`.
    """

    name: ClassVar[str]

    def __init__(
        self,
        k: int | Sequence[int] = (1, 5, 10),
        *,
        empty_target_action: EmptyTargetAction = "skip",
        **kwargs: Any,
    ) -> None:
        ks = check_ks(k)
        names = [f"{self.name}@{each}" for each in ks]
        super().__init__(names, ks, empty_target_action=empty_target_action, **kwargs)

    @staticmethod
    def measure(match: Match, k: int) -> Tensor:
        """Return the score of each query, ``(Q,)`` float64; any number for one without a relevant id."""
        raise NotImplementedError

    def _scores(self, match: Match) -> Tensor:
        return torch.stack([self.measure(match, k) for k in self.k], 1)


def check_ks(k: int | Sequence[int]) -> tuple[int, ...]:
    """Check one or several numbers of results and return them."""
    ks = (k,) if isinstance(k, int) else tuple(k)
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in ks):
        raise DtypeError(f"k is {k!r}, expected an int or several")
    if not ks or min(ks) < 1 or len(set(ks)) < len(ks):
        raise ArgumentError(f"k is {k!r}, expected one or several different numbers, each at least 1")
    return ks
