"""One evaluation from the collected rows: search, then measure."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from elips_torch.core.errors import ArgumentError, ShapeError
from elips_torch.core.validation import check_unique
from elips_torch.indexes.base import Index
from elips_torch.lightning.gather import Processes
from elips_torch.lightning.index_choice import IndexChoice, make_index
from elips_torch.lightning.measures import index_hits, index_recall_names, measured, value_names
from elips_torch.lightning.retrieval_rows import RowCollection, Rows
from elips_torch.lightning.sharded_search import fill_on_first, search_shards


class NothingToEvaluateError(ArgumentError):
    """The data holds nothing that could be measured; the same on all processes."""


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """What a few queries of an evaluation found, of all processes or of one.

    Attributes:
        queries: ``(Q,)`` their numbers in the validation data.
        ids: ``(Q, K)`` documents found, best first, -1 for none; a labelled document goes by its number.
        scores: ``(Q, K)``.
        correct: ``(Q, K)`` bool, whether the document is relevant.
        itself: whether queries and documents are the same samples.
    """

    queries: Tensor
    ids: Tensor
    scores: Tensor
    correct: Tensor
    itself: bool


@dataclasses.dataclass(frozen=True)
class Task:
    """What to evaluate, and with what.

    Args:
        k: numbers of neighbours to look at, ascending or not.
        metrics: names of what to measure.
        index: the choice of the index.
        metric: distance kind, where the choice leaves it open.
        shard: whether each process indexes its own documents; None: if that changes no number.
        recall_queries: queries by which the recall of the index itself is measured, about.
        kept: of how many queries to return the neighbours; they are spread evenly over the data.
        said: what need not be said again; more is added to it.
    """

    k: tuple[int, ...]
    metrics: tuple[str, ...]
    index: IndexChoice
    metric: str
    shard: bool | None
    recall_queries: int
    kept: int
    said: set[str]

    def names(self, by_label: bool, dim: int | None, device: torch.device) -> list[str]:
        """Return what an evaluation of rows by label or by id, of a size if that is known, would measure."""
        names = value_names(self.metrics, self.k, by_label=by_label)
        if dim is None:
            exact = self.index is None
        else:
            exact = make_index(self.index, dim, self.metric, device).is_exact
        recall = [] if exact or not self.recall_queries else index_recall_names(self.k)
        return [*names, "retrieval_seconds", *recall]

    def run(
        self, rows: RowCollection, loaders: list[Any], device: torch.device, processes: Processes
    ) -> tuple[dict[str, Tensor], Neighbours]:
        """Evaluate rows, which are given away; must be called by all processes.

        Raises:
            NothingToEvaluateError: there is no query, no document, or nothing to find.
            ElipsError: the rows do not fit together.
        """
        kinds = rows.kinds(processes)
        if not kinds:
            raise NothingToEvaluateError("the validation data has no sample")
        if "embeddings" in kinds and len(kinds) > 1:
            raise ArgumentError("the retrieval step returned labelled embeddings and queries or documents")
        if "embeddings" not in kinds:
            for missing in sorted({"queries", "documents"} - kinds):
                raise NothingToEvaluateError(f"no retrieval step returned {missing!r} during this validation")
        itself = kinds == {"embeddings"}
        queries = rows.take("embeddings" if itself else "queries", loaders, device, processes)
        documents = queries if itself else rows.take("documents", loaders, device, processes)
        if queries.vectors.shape[1] != documents.vectors.shape[1]:
            dims = queries.vectors.shape[1], documents.vectors.shape[1]
            raise ShapeError(f"queries have dim {dims[0]}, documents have dim {dims[1]}")
        if queries.meaning == "relevant":
            return self._by_id(queries, documents, processes)
        return self._by_label(queries, documents, itself, processes)

    def _by_id(
        self, queries: Rows, documents: Rows, processes: Processes
    ) -> tuple[dict[str, Tensor], Neighbours]:
        if documents.meaning != "ids":
            raise ArgumentError("queries come with 'relevant', so documents need 'ids', got 'labels'")
        ids = processes.rows(documents.integers).sort().values
        # No process sees the ids of the others when it adds its own.
        check_unique("ids", ids)
        wanted = queries.integers
        answered = sum(processes.objects(int((wanted >= 0).any(1).sum()) if wanted.numel() else 0))
        if not answered:
            raise NothingToEvaluateError("relevant: no query has a relevant document, all entries are -1")
        self._warn_of_unknown(wanted, ids, processes)
        scores, found, timing = self._search(queries, documents, documents.integers, False, processes)
        values = measured(self.metrics, self.k, found, wanted, processes)
        correct = (found[..., None] == wanted[:, None, :]).any(-1) & (found >= 0) if self.kept else found >= 0
        return {**values, **timing}, self._neighbours(queries, scores, found, correct, False)

    def _warn_of_unknown(self, relevant: Tensor, ids: Tensor, processes: Processes) -> None:
        """Say which relevant ids are none of the ascending ids; must be called by all processes."""
        if "unknown" in self.said:
            return
        found = ids[torch.searchsorted(ids, relevant).clamp_max_(len(ids) - 1)] == relevant
        unknown = processes.rows(relevant[~found & (relevant >= 0)].unique()).unique()
        if len(unknown):
            self.said.add("unknown")
            rank_zero_warn(
                f"relevant: {len(unknown)} ids are those of no document, such as {int(unknown[0])}, and "
                "count as not found; are all documents in the validation data?"
            )

    def _by_label(
        self, queries: Rows, documents: Rows, itself: bool, processes: Processes
    ) -> tuple[dict[str, Tensor], Neighbours]:
        if documents.meaning != "labels":
            raise ArgumentError("queries come with 'labels', so documents need 'labels', got 'ids'")
        labels = torch.empty(documents.total, dtype=torch.int64, device=documents.integers.device)
        labels[processes.rows(documents.places)] = processes.rows(documents.integers)
        known, counts = labels.unique(return_counts=True)
        at = torch.searchsorted(known, queries.integers).clamp_max(len(known) - 1)
        relevant = torch.where(known[at] == queries.integers, counts[at] - int(itself), 0)
        relevant.masked_fill_(queries.integers < 0, 0)
        if not sum(processes.objects(int((relevant > 0).sum()))):
            what = "no label occurs twice" if itself else "no query has the label of any document"
            raise NothingToEvaluateError(
                f"labels: {what} among {documents.total} samples, so there is nothing to find"
            )
        scores, found, timing = self._search(queries, documents, documents.places, itself, processes)
        retrieved = labels[found.clamp_min(0)].masked_fill_(found < 0, -1)
        values = measured(self.metrics, self.k, retrieved, queries.integers, processes, n_relevant=relevant)
        correct = (retrieved == queries.integers[:, None]) & (retrieved >= 0)
        return {**values, **timing}, self._neighbours(queries, scores, found, correct, itself)

    def _neighbours(
        self, queries: Rows, scores: Tensor, ids: Tensor, correct: Tensor, itself: bool
    ) -> Neighbours:
        stride = max(1, queries.total // max(1, self.kept))
        few = (queries.places % stride == 0) & (queries.places < stride * self.kept)
        places, ids, scores, correct = (
            column[few].cpu() for column in (queries.places, ids, scores, correct)
        )
        return Neighbours(places, ids, scores, correct, itself)

    def _search(
        self, queries: Rows, documents: Rows, ids: Tensor, exclude_self: bool, processes: Processes
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return scores and ids ``(Q, K)``, and what was measured of the index."""
        device = documents.vectors.device
        start = _now(device)
        index = make_index(self.index, documents.vectors.shape[1], self.metric, device)
        vectors = documents.vectors
        # What has to be fitted would learn something else from each part.
        changes_nothing = index.is_exact and index.is_trained
        if not (changes_nothing if self.shard is None else self.shard):
            vectors, ids = fill_on_first((vectors, ids), documents.places, processes)
        if len(ids):
            if not index.is_trained:
                index.fit(vectors)
            index.add(vectors, ids=ids)
        exclude = queries.places[:, None] if exclude_self else None
        result = search_shards(index, queries.vectors, max(self.k), exclude, processes)
        values = {"retrieval_seconds": torch.tensor(_now(device) - start)}
        if not index.is_exact and self.recall_queries:
            values |= self._index_recall(index, vectors, ids, queries, exclude_self, processes)
        return result.scores, result.ids, values

    def _index_recall(
        self,
        index: Index,
        vectors: Tensor,
        ids: Tensor,
        queries: Rows,
        exclude_self: bool,
        processes: Processes,
    ) -> dict[str, Tensor]:
        stride = max(1, queries.total // self.recall_queries)
        asked = queries.places % stride == 0
        places, sample = processes.rows(queries.places[asked]), processes.rows(queries.vectors[asked])
        exclude = places[:, None] if exclude_self else None
        hits, possible = _summed(processes.objects(index_hits(index, vectors, ids, sample, self.k, exclude)))
        return {
            name: torch.tensor(hit / there if there else torch.nan)
            for name, hit, there in zip(index_recall_names(self.k), hits, possible, strict=True)
        }


def _summed(counts: Sequence[tuple[list[int], list[int]]]) -> tuple[list[int], list[int]]:
    hits, possible = zip(*counts, strict=True)
    return [sum(each) for each in zip(*hits, strict=True)], [
        sum(each) for each in zip(*possible, strict=True)
    ]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
