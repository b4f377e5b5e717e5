"""Search by the candidates of faiss, scored by the definition."""

import torch
from torch import Tensor

from elips_torch.core.dispatch import Request
from elips_torch.core.errors import ImplementationError
from elips_torch.core.metric import Metric
from elips_torch.core.tiling import spans
from elips_torch.engines.faiss.builds import FaissBuild, load_installed
from elips_torch.engines.faiss.candidates import brute_force, common_dtype, converts
from elips_torch.engines.faiss.gpu_resources import MOST_NEIGHBOURS
from elips_torch.engines.faiss.stats import SEARCHES
from elips_torch.kernels.definition import score_candidates
from elips_torch.kernels.knn_exact import empty_results
from elips_torch.kernels.plane import Plane
from elips_torch.kernels.ranking import merge_ranked
from elips_torch.kernels.selection import Selection

# Bytes per candidate: scores and rows of two blocks, the keys and places of a merge.
_CANDIDATE_BYTES = 96
# Bytes per feature of a converted row: float64, normalised, and float32.
_FEATURE_BYTES = 24


def uncertified_reasons(request: Request) -> list[str]:
    """Return why nobody who did not ask for faiss gets its candidates."""
    return ["it selects by float32 products and proves nothing, so near ties may be missed; ask by name"]


def knn_faiss(
    queries: Tensor,  # (Q, D)
    database: Tensor,  # (N, D)
    k: int,
    metric: Metric,
    ranks: Tensor | None,  # (N,) int64, rank of each row's id; None: rows are in the order of ids
    selection: Selection,
    workspace_bytes: int,
    plane: Plane | None = None,
) -> tuple[Tensor, Tensor]:  # (Q, K) float32, (Q, K) int64
    """Return the k best of the rows that faiss finds, by the rule of exact search; -1 where there are fewer.

    Rows that a query may not see are dropped from what faiss finds, and more are asked for until k are left
    or none remain.
    """
    n_queries, n_rows = len(queries), len(database)
    scores, rows = empty_results(n_queries, k, metric, queries.device)
    if n_queries == 0 or n_rows == 0:
        return scores, rows
    build = load_installed()
    SEARCHES.count(queries=n_queries, nbytes=queries.nbytes + scores.nbytes + rows.nbytes)
    wanted = min(k, n_rows)
    fetch = min(n_rows, wanted + selection.n_excluded)
    pending = torch.arange(n_queries, device=queries.device)
    while True:
        left = []
        step = max(1, workspace_bytes // 2 // (_CANDIDATE_BYTES * fetch + _FEATURE_BYTES * queries.shape[1]))
        for start, stop in spans(len(pending), step):
            part = pending[start:stop]
            chosen = selection.for_queries(part)
            found = _best(build, queries[part], database, fetch, metric, ranks, chosen, workspace_bytes)
            scores[part, :wanted], rows[part, :wanted] = (each[:, :wanted] for each in found)
            left.append(part[(found[1] >= 0).sum(1) < wanted])
        pending = torch.cat(left)
        if fetch == n_rows or not len(pending):
            return scores, rows
        fetch = min(n_rows, 4 * fetch)


def _best(
    build: FaissBuild,
    queries: Tensor,
    database: Tensor,
    fetch: int,
    metric: Metric,
    ranks: Tensor | None,
    selection: Selection,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:
    """Return what is left of faiss's candidates ``(Q, fetch)``, best first, -1 behind them."""
    if queries.device.type != "cpu" and fetch > MOST_NEIGHBOURS:
        raise ImplementationError(
            f"knn: 'faiss' cannot: masks and exclusions ask for {fetch} candidates, "
            f"faiss serves {MOST_NEIGHBOURS} on a GPU"
        )
    n_queries, n_rows = len(queries), len(database)
    scores, rows = empty_results(n_queries, fetch, metric, queries.device)
    owners = torch.arange(n_queries, device=queries.device)[:, None]
    step = n_rows
    if converts(metric, database, common_dtype(queries, database)):
        step = max(1, workspace_bytes // 4 // (_FEATURE_BYTES * database.shape[1]))
    for start, stop in spans(n_rows, step):
        block = brute_force(build, queries, database[start:stop], min(fetch, stop - start), metric)
        # What faiss could not rank, it has not found.
        block = torch.where(block < 0, -1, block + start)
        known = block.clamp_min(0)
        hidden = selection.drops(owners.expand_as(block).reshape(-1), known.reshape(-1)).view_as(block)
        block_scores = score_candidates(metric, queries, database, known, workspace_bytes // 4)
        block = block.masked_fill_(hidden, -1)
        scores, rows = merge_ranked(
            metric, torch.cat((scores, block_scores), 1), torch.cat((rows, block), 1), fetch, ranks
        )
    return scores, rows
