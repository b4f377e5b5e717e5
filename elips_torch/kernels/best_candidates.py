"""The best of chosen rows: scored by the definition and sorted, in C++ where that serves."""

import torch
from torch import Tensor

from elips_torch.core.metric import Metric
from elips_torch.core.native import native_threads
from elips_torch.kernels.definition import score_candidates
from elips_torch.kernels.ranking import merge_ranked
from elips_torch.kernels.search_native import (
    CERTIFIED,
    DONE,
    METRICS,
    NO_MEMORY,
    SHORT,
    SOURCE_TYPES,
    VECTOR_TYPES,
    Arguments,
    call_rank,
    library_compiles,
    library_is_loaded,
    library_is_ready,
    library_reasons,
    search_arguments,
)

# Features of candidates from which on scoring them in torch takes a tenth of what compiling would.
_WORTH_COMPILING = 2**29


def best_candidates(
    metric: Metric,
    queries: Tensor,  # (Q, D)
    database: Tensor,  # (N, D)
    rows: Tensor,  # (Q, C) int64, each once per query; -1 for none
    k: int,
    ranks: Tensor | None,  # (N,) int64, rank of each row's id; None: rows are in the order of ids
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:  # (Q, K) float32, (Q, K) int64
    """Return the k best of chosen rows by the rule of exact search; -1 where there are fewer.

    Args:
        metric: the distance kind.
        queries: ``(Q, D)`` of any dtype.
        database: ``(N, D)`` of any dtype, on the same device.
        rows: ``(Q, C)`` int64, in any order, each once for a query; -1 for none.
        k: at most C.
        ranks: ``(N,)`` int64, place of each row's id among the sorted ids, which decides ties.
        workspace_bytes: limit on temporary memory, in bytes.
    """
    if rows.device.type == "cpu":
        scores = torch.empty((rows.shape[0], k), dtype=torch.float32, device="cpu")
        found = torch.empty((rows.shape[0], k), dtype=torch.int64, device="cpu")
        ranking = prepare_ranking(metric, queries, database, rows.contiguous(), ranks, (scores, found))
        if ranking is not None:
            left = ranking.run()
            if left is not None:
                scores[left], found[left] = best_candidates_eager(
                    metric, queries[left], database, rows[left], k, ranks, workspace_bytes
                )
            return scores, found
    return best_candidates_eager(metric, queries, database, rows, k, ranks, workspace_bytes)


class CandidateRanking:
    """Scores and sorts candidates in C++ once these are known; what can be settled before is.

    After a search has filled the caches with vectors, each step in Python takes several times as long.

    Args:
        arguments: all that is known; `run` adds the status.
        keeps: tensors that these point to.
    """

    def __init__(self, arguments: Arguments, keeps: tuple[Tensor | None, ...]) -> None:
        self._arguments = arguments
        self._keeps = keeps

    def is_done(self) -> bool:
        """Rank, and return whether every query is finite and has found k rows, whose scores are certain."""
        return call_rank(self._arguments) == DONE

    def run(self) -> Tensor | None:
        """Rank, and return which queries ``(M,)`` have a score in doubt, so that others must rank theirs."""
        n_queries = self._arguments.n_queries
        status = torch.empty((n_queries,), dtype=torch.int32, device="cpu")
        self._arguments.status = status.data_ptr()
        outcome = call_rank(self._arguments)
        if outcome in (DONE, SHORT):
            return None
        if outcome == NO_MEMORY:
            return torch.arange(n_queries, device="cpu")
        return (status != CERTIFIED).nonzero()[:, 0]


def prepare_ranking(
    metric: Metric,
    queries: Tensor,  # (Q, D)
    database: Tensor,  # (N, D)
    rows: Tensor,  # (Q, C) int64
    ranks: Tensor | None,  # (N,) int64
    out: tuple[Tensor, Tensor],  # (Q, K) float32, (Q, K) int64
) -> CandidateRanking | None:
    """Prepare the ranking of rows that need not be known yet; None where C++ does not serve, or repay.

    Args:
        metric: the distance kind.
        queries: ``(Q, D)``, on a CPU.
        database: ``(N, D)``, on a CPU.
        rows: ``(Q, C)`` int64, contiguous; what is no number of a row is none.
        ranks: ``(N,)`` int64, contiguous, place of each row's id among the sorted ids.
        out: contiguous scores and rows ``(Q, K)`` to write; the rows may be the candidates where K is C.
    """
    (n_queries, dim), source_type = queries.shape, SOURCE_TYPES.get(queries.dtype)
    vector_type, (n_rows, _) = VECTOR_TYPES.get(database.dtype), database.shape
    if source_type is None or vector_type is None or not database.is_contiguous() or database.is_neg():
        return None
    # The code counts them in four bytes.
    if not n_rows > 0 or max(*rows.shape, dim) >= 2**31:
        return None
    if not (library_is_loaded() or _is_worth_loading(rows, dim)):
        return None
    queries = queries.resolve_neg().contiguous()
    scores, found = out
    arguments = search_arguments(
        source=queries,
        vectors=database,
        candidates=rows,
        ranks=ranks,
        scores=scores,
        found=found,
        power=metric.p,
        n_rows=n_rows,
        n_candidates=rows.shape[1],
        n_queries=n_queries,
        dim=dim,
        k=found.shape[1],
        n_threads=native_threads(),
        metric=METRICS[metric.name],
        source_type=source_type,
        vector_type=vector_type,
    )
    return CandidateRanking(arguments, (queries, database, rows, ranks, scores, found))


def _is_worth_loading(rows: Tensor, dim: int) -> bool:
    """Whether the C++ code serves here and is compiled or worth it; it is loaded then."""
    place = rows.device
    if library_reasons(place):
        return False
    return (library_is_ready(place) or rows.numel() * dim >= _WORTH_COMPILING) and library_compiles()


def best_candidates_eager(
    metric: Metric,
    queries: Tensor,  # (Q, D)
    database: Tensor,  # (N, D)
    rows: Tensor,  # (Q, C) int64, each once per query; -1 for none
    k: int,
    ranks: Tensor | None,  # (N,) int64
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:  # (Q, K) float32, (Q, K) int64
    """Return what `best_candidates` does, by operators of torch, on any device."""
    scores = score_candidates(metric, queries, database, rows.clamp_min(0), workspace_bytes)
    return merge_ranked(metric, scores, rows, k, ranks)
