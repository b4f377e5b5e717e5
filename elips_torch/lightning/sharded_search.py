"""One search over what all processes hold, and rows brought together on one of them."""

import torch
from torch import Tensor

from elips_torch.core.results import SearchResult
from elips_torch.core.tiling import spans
from elips_torch.indexes.base import Index
from elips_torch.lightning.gather import Processes

# Queries that travel at once.
_QUERIES = 4096
# Bytes that one process receives at once.
_ROUND_BYTES = 2**26


def search_shards(
    index: Index,
    queries: Tensor,  # (Q, D)
    k: int,
    exclude: Tensor | None,  # (Q, M)
    processes: Processes,
) -> SearchResult:
    """Search the indexes of all processes as if they were one; must be called by all processes.

    Queries visit every process, and each process gets back the k best of all for its own: no vector of a
    database travels.

    Args:
        index: what this process holds, perhaps nothing.
        queries: this process's own; Q may differ between processes, or be 0.
        k: number of neighbours.
        exclude: ids to leave out, for all processes or for none.
        processes: who takes part.

    Returns:
        SearchResult: for the process's own queries; the order is by score, then by the lower id.
    """
    if processes.count == 1:
        return index.search(queries, k, exclude=exclude)
    parts = []
    for owner, size in enumerate(processes.objects(len(queries))):
        own = owner == processes.rank
        for start, stop in spans(size, _QUERIES):
            here = processes.sent(owner, queries[start:stop] if own else None, queries, stop - start)
            left_out = None
            if exclude is not None:
                left_out = processes.sent(owner, exclude[start:stop] if own else None, exclude, stop - start)
            scores, ids = _searched(index, here, k, left_out)
            sizes = [stop - start] * processes.count
            all_scores = processes.rows_on(owner, scores, sizes)
            all_ids = processes.rows_on(owner, ids, sizes)
            if all_scores is not None and all_ids is not None:
                parts.append(_merged(torch.cat(all_scores, 1), torch.cat(all_ids, 1), k, index))
    if not parts:
        return SearchResult(*_nothing(index, queries, k))
    return SearchResult(torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]))


def fill_on_first(tensors: tuple[Tensor, ...], places: Tensor, processes: Processes) -> tuple[Tensor, ...]:
    """Return on the first process the rows of all, by their places, and none on the others.

    Must be called by all processes. Rows travel a few at a time.

    Args:
        tensors: each ``(N, ...)``, rows that belong together.
        places: ``(N,)``, which over all processes are the numbers from 0 on, each once.
        processes: who takes part.
    """
    sizes = processes.objects(len(places))
    total = sum(sizes)
    if processes.count == 1:
        if (places[1:] >= places[:-1]).all():
            return tensors
        order = places.argsort()
        return tuple(tensor[order] for tensor in tensors)
    row_bytes = sum(tensor[:1].numel() * tensor.element_size() for tensor in tensors)
    row_bytes = max(processes.objects(row_bytes)) or 1
    step = max(1, _ROUND_BYTES // (row_bytes * processes.count))
    first = processes.rank == 0
    whole = tuple(tensor.new_empty(total if first else 0, *tensor.shape[1:]) for tensor in tensors)
    for start, stop in spans(max(sizes), step):
        counts = [max(0, min(stop, size) - start) for size in sizes]
        where = processes.rows_on(0, places[start:stop], counts)
        for out, tensor in zip(whole, tensors, strict=True):
            received = processes.rows_on(0, tensor[start:stop], counts)
            if where is not None and received is not None:
                out[torch.cat(where)] = torch.cat(received)
    return whole


def _searched(index: Index, queries: Tensor, k: int, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
    if not index.ntotal:
        # Where there is nothing to learn from, an index may not have been fitted.
        return _nothing(index, queries, k)
    return index.search(queries, k, exclude=exclude)


def _nothing(index: Index, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    worst = -torch.inf if index.higher_is_better else torch.inf
    scores = torch.full((len(queries), k), worst, device=queries.device)
    return scores, torch.full((len(queries), k), -1, device=queries.device)


def _merged(scores: Tensor, ids: Tensor, k: int, index: Index) -> tuple[Tensor, Tensor]:
    """Return the k best of ``(Q, W k)`` results."""
    # What is missing goes behind what is infinitely far.
    order = torch.where(ids < 0, torch.iinfo(torch.int64).max, ids).argsort(dim=1)
    scores, ids = scores.gather(1, order), ids.gather(1, order)
    best = scores.argsort(dim=1, descending=index.higher_is_better, stable=True)[:, :k]
    return scores.gather(1, best), ids.gather(1, best)
