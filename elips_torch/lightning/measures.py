"""The numbers of an evaluation: of the task, and of the index that served it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from elips_torch.core.errors import ArgumentError
from elips_torch.core.metric import metric_of
from elips_torch.core.tiling import spans
from elips_torch.evaluation.recall import HitRateAtK, LabelRecallAtK, RecallAtK
from elips_torch.indexes.base import Index
from elips_torch.lightning.gather import Processes
from elips_torch.ops.knn import knn

# What may be measured, and whether that is by ids, by labels or by both.
BY_ID = ("recall", "hit_rate")
BY_LABEL = ("recall", "hit_rate", "label_recall")
NAMES = tuple(dict.fromkeys((*BY_ID, *BY_LABEL)))

# Pairs are scored by the definition in float64, a few queries at a time.
_QUERIES = 128


def check_names(metrics: Sequence[str]) -> tuple[str, ...]:
    """Return names of metrics, each of which must be known.

    Raises:
        ArgumentError: none, a repeated or an unknown one.
    """
    names = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names or len(set(names)) < len(names):
        raise ArgumentError(f"metrics is {metrics!r}, expected different ones of {', '.join(NAMES)}")
    return names


def measured_by_id(
    names: Sequence[str],
    k: Sequence[int],
    retrieved: Tensor,  # (Q, K)
    relevant: Tensor,  # (Q, R)
    processes: Processes,
) -> dict[str, Tensor]:
    """Return averages over the queries of all processes, by name; must be called by all of them."""
    values: dict[str, Tensor] = {}
    for name, metric in (("recall", RecallAtK(k)), ("hit_rate", HitRateAtK(k))):
        if name in names:
            metric.to(processes.device)
            metric.update(retrieved.to(processes.device), relevant.to(processes.device))
            values |= metric.compute()
    return values


def measured_by_label(
    names: Sequence[str],
    k: Sequence[int],
    retrieved: Tensor,  # (Q, K)
    labels: Tensor,  # (Q,)
    relevant: Tensor,  # (Q,)
    processes: Processes,
) -> dict[str, Tensor]:
    """Return averages over the queries of all processes; must be called by all of them.

    Args:
        names: "recall" and "hit_rate" are the Recall@k of metric learning, "label_recall" is the fraction
            found.
        k: numbers of results to look at.
        retrieved: the labels of what was found, -1 where nothing was.
        labels: of the queries, -1 for none.
        relevant: how many documents have the query's label; a query with none does not count.
        processes: who takes part.
    """
    place = processes.device
    hit_rate, label_recall = HitRateAtK(k).to(place), LabelRecallAtK(k).to(place)
    retrieved, labels, relevant = retrieved.to(place), labels.to(place), relevant.to(place)
    values: dict[str, Tensor] = {}
    if "recall" in names or "hit_rate" in names:
        hit_rate.update(retrieved, labels.masked_fill(relevant == 0, -1))
        hits = hit_rate.compute()
        for name in ("recall", "hit_rate"):
            if name in names:
                values |= {f"{name}@{each}": hits[f"hit_rate@{each}"] for each in k}
    if "label_recall" in names:
        label_recall.update(retrieved, labels, relevant)
        values |= label_recall.compute()
    return values


def index_hits(
    index: Index,
    vectors: Tensor,  # (N, D)
    ids: Tensor,  # (N,)
    queries: Tensor,  # (Q, D)
    k: Sequence[int],
    exclude: Tensor | None,  # (Q, M)
) -> tuple[list[int], list[int]]:
    """Count how many of the true neighbours an index finds.

    What is as near as the k-th true neighbour counts as one: among equals no choice is wrong.

    Args:
        index: what was filled with the vectors.
        vectors: as they were added.
        ids: their ids.
        queries: to search for.
        k: numbers of neighbours.
        exclude: ids to leave out.

    Returns:
        For each k, the neighbours found, and those there are; over all queries.
    """
    hits, possible = [0] * len(k), [0] * len(k)
    if not len(ids) or not len(queries):
        return hits, possible
    metric = metric_of(index.metric, index._metric.p)
    order = ids.argsort()
    ordered = ids[order]

    def rows_of(wanted: Tensor) -> Tensor:
        at = torch.searchsorted(ordered, wanted).clamp_max(len(ids) - 1)
        return torch.where(ordered[at] == wanted, order[at], -1)

    for start, stop in spans(len(queries), _QUERIES):
        part = queries[start:stop]
        left_out = None if exclude is None else exclude[start:stop]
        found = rows_of(index.search(part, max(k), exclude=left_out).ids)
        own = metric.rounded_score(part.double()[:, None], vectors[found.clamp_min(0)].double())
        truth = knn(
            part,
            vectors,
            max(k),
            metric=index.metric,
            p=index.p,
            exclude=None if left_out is None else rows_of(left_out),
        )
        true = truth.scores
        for column, each in enumerate(k):
            available = (truth.ids[:, :each] >= 0).sum(1)
            last = true.gather(1, (available - 1).clamp_min(0)[:, None])
            near = own[:, :each] >= last if index.higher_is_better else own[:, :each] <= last
            # A search may return fewer than there are, never more.
            hits[column] += int((near & (found[:, :each] >= 0)).sum())
            possible[column] += int(available.sum())
    return hits, possible
