"""The numbers of an evaluation: of the task, and of the index that served it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from elips_torch.core.errors import ArgumentError
from elips_torch.core.metric import metric_of
from elips_torch.core.tiling import spans
from elips_torch.evaluation.retrieval_metrics import RetrievalMetrics
from elips_torch.indexes.base import Index
from elips_torch.lightning.gather import Processes
from elips_torch.ops.knn import knn

# What may be measured where relevance is by id, and where it is by label.
BY_ID = ("recall", "hit_rate", "precision", "ndcg", "map", "mrr", "r_precision")
BY_LABEL = (*BY_ID, "label_recall")

# Pairs are scored by the definition in float64, a few queries at a time.
_QUERIES = 128


def check_names(metrics: Sequence[str]) -> tuple[str, ...]:
    """Return names of metrics, each of which must be known.

    Raises:
        ArgumentError: none, a repeated or an unknown one.
    """
    names = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    unknown = [name for name in names if name not in BY_LABEL]
    if unknown or not names or len(set(names)) < len(names):
        raise ArgumentError(f"metrics is {metrics!r}, expected different ones of {', '.join(BY_LABEL)}")
    return names


def value_names(metrics: Sequence[str], k: Sequence[int], *, by_label: bool) -> list[str]:
    """Return the names of the numbers that `measured` returns."""
    known = [name for name in metrics if name in (BY_LABEL if by_label else BY_ID)]
    return [
        each for name in known for each in ([name] if name == "r_precision" else [f"{name}@{n}" for n in k])
    ]


def measured(
    metrics: Sequence[str],
    k: Sequence[int],
    retrieved: Tensor,  # (Q, K)
    relevant: Tensor,  # (Q, R) or (Q,)
    processes: Processes,
    *,
    n_relevant: Tensor | None = None,  # (Q,)
) -> dict[str, Tensor]:
    """Return averages over the queries of all processes, by name; must be called by all of them.

    Args:
        metrics: what to measure. By label, "recall" is the Recall@k of metric learning, which asks for any of
            the label, and "label_recall" the fraction found.
        k: numbers of results to look at.
        retrieved: ids that were found, or their labels; -1 where nothing was.
        relevant: ids, padded by -1, or the label of each query.
        processes: who takes part.
        n_relevant: by label, how many documents have the query's; a query with none does not count.
    """
    by_label = n_relevant is not None
    place = processes.device
    counts = {} if n_relevant is None else {"n_relevant": n_relevant.to(place)}
    metric = RetrievalMetrics(k, labels=by_label).to(place)
    metric.update(retrieved.to(place), relevant.to(place), **counts)
    values = metric.compute()
    if by_label:
        values |= {f"recall@{n}": values[f"hit_rate@{n}"] for n in k}
    return {name: values[name] for name in value_names(metrics, k, by_label=by_label)}


def index_recall_names(k: Sequence[int]) -> list[str]:
    """Return the names of what an index finds of the true neighbours."""
    return [f"index_recall@{n}" for n in k]


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
