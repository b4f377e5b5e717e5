"""Search by the candidates of faiss, scored by the definition."""

from typing import Protocol

import torch
from torch import Tensor

from elips_torch.core.dispatch import Request
from elips_torch.core.errors import ArgumentError, DeviceError, ImplementationError
from elips_torch.core.execution import plain_arithmetic
from elips_torch.core.metric import Metric
from elips_torch.core.tiling import spans
from elips_torch.core.validation import read_device
from elips_torch.engines.faiss.builds import FaissBuild, load_installed, loaded_build
from elips_torch.engines.faiss.candidates import (
    CONVERTED_BYTES,
    FAISS_METRICS,
    brute_force,
    check_gpu_serves,
    common_dtype,
    converts,
    empty_candidates,
)
from elips_torch.engines.faiss.gpu_resources import MOST_NEIGHBOURS
from elips_torch.engines.faiss.looks import are_finite, are_labels
from elips_torch.engines.faiss.stats import SEARCHES
from elips_torch.kernels.best_candidates import best_candidates, best_candidates_eager, prepare_ranking
from elips_torch.kernels.knn_exact import empty_results
from elips_torch.kernels.plane import Plane
from elips_torch.kernels.ranking import merge_ranked
from elips_torch.kernels.selection import Selection

# Bytes per candidate: scores and rows of two blocks, the keys and places of a merge.
_CANDIDATE_BYTES = 96
# Bytes of a score and a row.
_RESULT_BYTES = 12
_A_GPU = "a GPU such as 'cuda:0'"


class Kept(Protocol):
    """Gives the database of an index ``(N, D)`` as faiss takes it, in float32, or None."""

    def __call__(self, *, make: bool) -> Tensor | None:
        """``make``: whether to make it where it has not been made."""


def uncertified_reasons(request: Request) -> list[str]:
    """Return why nobody who did not ask for faiss gets its candidates."""
    return ["it selects by float32 products and proves nothing, so near ties may be missed; ask by name"]


def gpu_to_go_through(device: torch.device | str, implementation: str, database: Tensor) -> int:
    """Return the number of the GPU that a call asks faiss to take tensors on the CPU through.

    Raises:
        ArgumentError: it asks for another implementation, or the tensors are elsewhere.
        DeviceError: no CUDA device.
    """
    if implementation != "faiss":
        raise ArgumentError(f"device is for implementation='faiss', implementation is {implementation!r}")
    if database.device.type != "cpu":
        raise ArgumentError(f"device is for tensors on the CPU, these are on {database.device}")
    place = read_device("device", device, _A_GPU)
    if place.type != "cuda":
        raise DeviceError(f"device is {str(place)!r}, expected {_A_GPU}")
    if place.index is not None:
        return place.index
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def search_directly(
    queries: Tensor,  # (Q, D)
    database: Tensor,  # (N, D)
    k: int,
    metric: Metric,
    ranks: Tensor | None,  # (N,) int64
    workspace_bytes: int,
    kept: Kept | None = None,
) -> tuple[Tensor, Tensor] | None:  # (Q, K) float32, (Q, K) int64
    """Return what `knn_faiss` does where faiss takes tensors on the CPU at once; None for the long way.

    The same steps without those that would change nothing, which for one query take longer than faiss. All
    that can be done before faiss comes before: its search leaves caches full of vectors.

    Args:
        queries: ``(Q, D)``; those that are not finite go the long way.
        database: ``(N, D)``.
        k: number of neighbours.
        metric: the distance kind.
        ranks: ``(N,)`` int64, place of each row's id among the sorted ids.
        workspace_bytes: limit on temporary memory, in bytes.
        kept: gives the database as faiss takes it, where that has been made before.
    """
    build = loaded_build()
    (n_queries, dim), n_rows = queries.shape, database.shape[0]
    if build is None or database.device.type != "cpu" or metric.name not in FAISS_METRICS or k > n_rows:
        return None
    if torch.float64 in (queries.dtype, database.dtype):
        return None
    copy = None if kept is None else kept(make=False)
    if copy is None and converts(metric, database, torch.float32):
        return None
    if not 0 < n_queries <= _queries_at_once(k, dim, workspace_bytes):
        return None
    found = empty_candidates(n_queries, k, queries.device)
    rows = found[1]
    ranking = prepare_ranking(metric, queries, database, rows, ranks, found)
    brute_force(build, queries, database, k, metric, out=found, kept=copy)
    # Queries that are not finite, and rows that faiss cannot rank, go the long way.
    if ranking is not None:
        if not ranking.is_done():
            return None
    else:
        if not are_labels(build, rows):
            return None
        with plain_arithmetic(queries.device):
            found = best_candidates_eager(metric, queries, database, rows, k, ranks, workspace_bytes // 4)
        if not are_finite(build, found[0]):
            return None
    SEARCHES.count(queries=n_queries, nbytes=queries.nbytes + n_queries * k * _RESULT_BYTES)
    return found


def knn_faiss(
    queries: Tensor,  # (Q, D)
    database: Tensor,  # (N, D)
    k: int,
    metric: Metric,
    ranks: Tensor | None,  # (N,) int64, rank of each row's id; None: rows are in the order of ids
    selection: Selection,
    workspace_bytes: int,
    plane: Plane | None = None,
    gpu: int | None = None,
    kept: Kept | None = None,
) -> tuple[Tensor, Tensor]:  # (Q, K) float32, (Q, K) int64
    """Return the k best of the rows that faiss finds, by the rule of exact search; -1 where there are fewer.

    Rows that a query may not see are dropped from what faiss finds, and more are asked for until k are left
    or none remain. Tensors on the CPU go through a GPU where the number of one is given.
    """
    n_queries, n_rows = queries.shape[0], database.shape[0]
    build = load_installed()
    if gpu is not None:
        check_gpu_serves(build, metric, gpu)
    if n_queries == 0 or n_rows == 0:
        return empty_results(n_queries, k, metric, queries.device)
    SEARCHES.count(queries=n_queries, nbytes=queries.nbytes + n_queries * k * _RESULT_BYTES)
    copy = None if kept is None else kept(make=True)
    scores, rows = empty_results(n_queries, k, metric, queries.device)
    wanted = min(k, n_rows)
    fetch = min(n_rows, wanted + selection.n_excluded)
    pending = torch.arange(n_queries, device=queries.device)
    while True:
        left = []
        step = _queries_at_once(fetch, queries.shape[1], workspace_bytes)
        for start, stop in spans(len(pending), step):
            part = pending[start:stop]
            chosen = selection.for_queries(part)
            *found, is_short = _best(
                build,
                queries[part],
                database,
                wanted,
                fetch,
                metric,
                ranks,
                chosen,
                workspace_bytes,
                gpu,
                copy,
            )
            scores[part, :wanted], rows[part, :wanted] = (each[:, :wanted] for each in found)
            left.append(part[is_short])
        pending = torch.cat(left)
        if fetch == n_rows or not len(pending):
            return scores, rows
        fetch = min(n_rows, 4 * fetch)


def _queries_at_once(fetch: int, dim: int, workspace_bytes: int) -> int:
    return max(1, workspace_bytes // 2 // (_CANDIDATE_BYTES * fetch + CONVERTED_BYTES * dim))


def _best(
    build: FaissBuild,
    queries: Tensor,
    database: Tensor,
    wanted: int,
    fetch: int,
    metric: Metric,
    ranks: Tensor | None,
    selection: Selection,
    workspace_bytes: int,
    gpu: int | None,
    copy: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what is left of faiss's candidates ``(Q, fetch)``, best first, -1 behind; and who wants more.

    That is bool ``(Q,)``: whether a block gave fewer rows than wanted, and faiss was not asked for all of it.
    """
    on_gpu = gpu is not None or queries.device.type != "cpu"
    if on_gpu and fetch > MOST_NEIGHBOURS:
        raise ImplementationError(
            f"knn: 'faiss' cannot: masks and exclusions ask for {fetch} candidates, "
            f"faiss serves {MOST_NEIGHBOURS} on a GPU"
        )
    n_queries, n_rows = len(queries), len(database)
    scores, rows = empty_results(n_queries, fetch, metric, queries.device)
    is_short = torch.zeros(n_queries, dtype=torch.bool, device=queries.device)
    owners = torch.arange(n_queries, device=queries.device)[:, None]
    step = n_rows
    if copy is None and converts(metric, database, common_dtype(queries, database, on_gpu=on_gpu)):
        step = max(1, workspace_bytes // 4 // (CONVERTED_BYTES * database.shape[1]))
    for start, stop in spans(n_rows, step):
        asked = min(fetch, stop - start)
        _, block = brute_force(
            build, queries, database[start:stop], asked, metric, gpu, workspace_bytes, kept=copy
        )
        # What faiss could not rank, it has not found.
        block = torch.where(block < 0, -1, block + start)
        known = block.clamp_min(0)
        hidden = selection.drops(owners.expand_as(block).reshape(-1), known.reshape(-1)).view_as(block)
        block = block.masked_fill_(hidden, -1)
        found = best_candidates(metric, queries, database, block, asked, ranks, workspace_bytes // 4)
        if asked < stop - start:
            # Under "linf" faiss takes NaN for less than anything.
            ranked = (found[1] >= 0) & ~found[0].isnan()
            is_short |= ranked.sum(1) < wanted
        if step >= n_rows:
            return *found, is_short
        scores, rows = merge_ranked(
            metric, torch.cat((scores, found[0]), 1), torch.cat((rows, found[1]), 1), fetch, ranks
        )
    return scores, rows, is_short
