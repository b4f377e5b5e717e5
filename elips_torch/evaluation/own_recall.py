"""How much of what exact search finds an index finds."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from elips_torch.core.errors import ArgumentError, DtypeError, ShapeError, UnknownIdError
from elips_torch.core.metric import resolve_metric
from elips_torch.core.tiling import DEFAULT_WORKSPACE_BYTES, spans
from elips_torch.core.validation import check_count, check_vectors
from elips_torch.evaluation.relevant import check_retrieved
from elips_torch.indexes.base import Index
from elips_torch.kernels.definition import score_decoded
from elips_torch.ops.knn import knn

# Vectors of an index are rebuilt in blocks of so many bytes.
_BLOCK_BYTES = 64 * 2**20


def index_recall(
    index: Index,
    queries: Tensor,  # (Q, D)
    k: int,
    *,
    database: Tensor | None = None,  # (ntotal, D)
    ground_truth: Tensor | None = None,  # (Q, K)
    sample: int | None = None,
    seed: int = 0,
    **parameters: Any,
) -> float:
    """Return the recall of an index against exact search over the same vectors.

    It is the fraction of the k nearest vectors of each query that a search returns. Of vectors that tie
    for the last place any will do: a result counts if its exact score is as good as that of the k-th best.

    Args:
        index: any index that can reconstruct, or any at all with database.
        queries: ``(Q, D)``, on the index's device.
        k: number of neighbours; of an index that holds fewer, all.
        database: ``(ntotal, D)``, the vectors as they were added, in the order of ``index.ids``; default
            is what the index reconstructs, block by block. Of codes that is what was decoded: without
            the originals the recall leaves out what coding lost.
        ground_truth: ``(Q, K)`` ids of the true neighbours, best first, K at least k, if they are known:
            saves the exact search.
        sample: how many of the queries to take, at random; default is all.
        seed: of the sample.
        **parameters: search parameters, such as ``nprobe=16``.

    Returns:
        A number from 0 to 1.

    Raises:
        ElipsError: an argument of wrong type, shape, device or value; an empty index; no query.

    >>> import torch
    >>> from elips_torch import IVFFlatIndex
    >>> vectors = torch.arange(400.0).view(200, 2)
    >>> index = IVFFlatIndex(dim=2, nlist=4, nprobe=4).fit(vectors)
    >>> ids = index.add(vectors)
    >>> index_recall(index, vectors[:20], k=5)
    1.0
    """
    exact = ExactScores(
        index, queries, k, database=database, ground_truth=ground_truth, sample=sample, seed=seed
    )
    with torch.no_grad():
        return exact.recall(index.search(exact.queries, k, **parameters).ids)


class ExactScores:
    """The exact score of the k-th nearest vector of each query, to hold searches against.

    Args:
        index: as for `index_recall`, and so are the others.
        queries: see there.
        k: see there.
        database: see there.
        ground_truth: see there.
        sample: see there.
        seed: see there.

    Attributes:
        queries: ``(Q, D)``, those that were taken.
        limits: ``(Q,)`` float32.
    """

    def __init__(
        self,
        index: Index,
        queries: Tensor,
        k: int,
        *,
        database: Tensor | None = None,
        ground_truth: Tensor | None = None,
        sample: int | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(index, Index):
            raise DtypeError(f"index is a {type(index).__name__}, expected an Index")
        check_vectors("queries", queries, dim=index.dim, device=index.device)
        if database is not None:
            check_vectors("database", database, dim=index.dim, device=index.device)
            if len(database) != index.ntotal:
                raise ShapeError(f"database has {len(database)} rows, the index holds {index.ntotal}")
        if not len(queries):
            raise ArgumentError("queries has no row, expected at least one")
        if not index.ntotal:
            raise ArgumentError("the index is empty, expected vectors to search among")
        self._k = min(check_count("k", k), index.ntotal)
        self._metric = resolve_metric(index.metric, index.p)
        if ground_truth is not None:
            ground_truth = check_retrieved("ground_truth", ground_truth, len(queries), index.device, self._k)
        if sample is not None and check_count("sample", sample) < len(queries):
            chosen = torch.randperm(len(queries), generator=torch.Generator().manual_seed(seed))[:sample]
            chosen = chosen.to(queries.device)
            queries = queries[chosen]
            ground_truth = None if ground_truth is None else ground_truth[chosen]
        self.queries = queries.detach()
        self._some_id = index.ids[:1]
        self._vectors_of: Callable[[Tensor], Tensor]
        self._vectors_of = index.reconstruct if database is None else _by_id(index.ids, database)
        with torch.no_grad():
            if ground_truth is None:
                self.limits = self._search(_blocks(index, database))
            else:
                self.limits = self._score(ground_truth[:, self._k - 1, None])[:, 0]

    def recall(self, ids: Tensor) -> float:
        """Return the recall of ``(Q, K)`` ids that were found, -1 for none."""
        found = ids >= 0
        scores = self._score(ids.where(found, self._some_id))
        limits = self.limits[:, None]
        good = (scores >= limits) if self._metric.higher_is_better else (scores <= limits)
        return int((good & found).sum()) / (len(ids) * self._k)

    def _score(self, ids: Tensor) -> Tensor:
        return score_decoded(self._metric, self.queries, self._vectors_of, ids, DEFAULT_WORKSPACE_BYTES)

    def _search(self, blocks: Iterator[Tensor]) -> Tensor:
        """Return the exact score of the k-th best of all blocks."""
        metric = self._metric
        p = metric.p if metric.name == "lp" else None
        best = self.queries.new_empty(len(self.queries), 0, dtype=torch.float32)
        for block in blocks:
            here = knn(self.queries, block, min(self._k, len(block)), metric=metric.name, p=p).scores
            both = torch.cat([best, here], 1)
            best = both.topk(min(self._k, both.shape[1]), largest=metric.higher_is_better).values
        return best[:, -1]


def _blocks(index: Index, database: Tensor | None) -> Iterator[Tensor]:
    step = max(1, _BLOCK_BYTES // (4 * index.dim))
    for start, stop in spans(index.ntotal, step):
        yield index.reconstruct(index.ids[start:stop]) if database is None else database[start:stop]


def _by_id(ids: Tensor, database: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what gives the vectors ``(M, D)`` of ids ``(M,)``, for the ids of the rows of a database."""
    ordered, order = ids.sort()

    def vectors_of(wanted: Tensor) -> Tensor:
        places = torch.searchsorted(ordered, wanted).clamp_max_(len(ordered) - 1)
        unknown = ordered[places] != wanted
        if bool(unknown.any()):
            raise UnknownIdError(f"the index holds no id {int(wanted[unknown][0])}")
        return database.index_select(0, order[places])

    return vectors_of
