"""Searches of an index of faiss in which some rows are out: by faiss's selectors, or by asking for more."""

import dataclasses
import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from elips_torch.core.errors import ImplementationError, ParameterError
from elips_torch.core.metric import Metric
from elips_torch.core.ordering import order_keys
from elips_torch.core.tiling import spans
from elips_torch.engines.faiss.builds import FaissBuild
from elips_torch.engines.faiss.gpu_resources import MOST_NEIGHBOURS
from elips_torch.engines.faiss.looks import are_labels
from elips_torch.engines.faiss.opaque import describe_refusal
from elips_torch.engines.faiss.row_kinds import BITS
from elips_torch.engines.faiss.search import IndexSearch
from elips_torch.engines.faiss.search_parameters import (
    asks_a_graph,
    bitmap_selector,
    may_widen,
    search_parameters,
    widened,
    within_graph,
)
from elips_torch.engines.faiss.stats import SEARCHES
from elips_torch.kernels.selection import Selection

# Bytes per candidate: score, place, row, whether it is out, and the order of those that are not.
_CANDIDATE_BYTES = 48


@dataclasses.dataclass
class RowSearch:
    """Searches an index of faiss for rows.

    Attributes:
        build: the faiss that made the index.
        index: any index whose labels are places 0, 1, ...; it is not to change.
        metric: of the scores.
        row_of: ``(places,)`` int64, the row at each place, -1 for places that are out; None where they are
            the same.
        place_of: ``(N,)`` int64, the place of each row.
        selectors: whether the family takes selectors; turns False when it turns out not to.
    """

    build: FaissBuild
    index: Any
    metric: Metric
    row_of: Tensor | None
    place_of: Tensor
    selectors: bool = True

    def __post_init__(self) -> None:
        # What is asked for once is not asked for in each search.
        self._engine = IndexSearch(self.build, self.index)
        self._total = int(self.index.ntotal)
        self._asks_a_graph = asks_a_graph(self.build, self.index)
        self._widens = may_widen(self.build, self.index)

    def search(
        self, queries: Tensor, k: int, selection: Selection, values: dict[str, Any], workspace_bytes: int
    ) -> tuple[Tensor, Tensor]:
        """Return scores and rows ``(Q, K)`` in the order of faiss; -1 where no more were found."""
        if self.row_of is None and selection.sees_all:
            scores, rows = self._run(queries, k, values)
            # Looking for missing ones would wait for a GPU.
            if self._engine.on_gpu or rows.device.type != "cpu" or not are_labels(self.build, rows):
                scores.masked_fill_(rows < 0, self.metric.worst)
            return scores, rows
        with SEARCHES.as_one(len(queries)):
            return self._search_some(queries, k, selection, values, workspace_bytes)

    def range_search(
        self,
        queries: Tensor,
        radius: Tensor,
        selection: Selection,
        values: dict[str, Any],
        ranks: Tensor | None,  # (N,) rank of each row's id; None where that is the row
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return lims ``(Q + 1,)``, scores and rows ``(M,)``, best first per query, ties by rank."""
        if values and self._engine.kind is BITS:
            name, value = next(iter(values.items()))
            raise ParameterError(f"faiss takes {name} for no search by radius; set index.{name} = {value}")
        params = search_parameters(self.build, self.index, values)
        if not len(self.place_of):
            # faiss ends the process where a graph holds nothing.
            return radius.new_zeros(len(queries) + 1, dtype=torch.int64), radius[:0], self.place_of
        with SEARCHES.as_one(len(queries)):
            found = [
                self._range(queries[start:stop], float(radius[start]), params)
                for start, stop in _equal_spans(radius)
            ]
        counts = torch.cat([lims.diff() for lims, _, _ in found]) if found else radius.new_zeros(0).long()
        scores = torch.cat([each[1] for each in found]) if found else radius.new_zeros(0)
        places = torch.cat([each[2] for each in found]) if found else counts
        owners = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        rows = places if self.row_of is None else self.row_of[places]
        limit = radius[owners]
        within = scores > limit if self.metric.higher_is_better else scores < limit
        within &= (rows >= 0) & ~selection.drops(owners, rows.clamp_min(0))
        scores, rows, owners = scores[within], rows[within], owners[within]
        own_ranks = rows if ranks is None else ranks[rows]
        order = order_keys(scores, own_ranks, self.metric.higher_is_better).argsort(stable=True)
        order = order[owners[order].argsort(stable=True)]
        counts = torch.bincount(owners, minlength=len(queries))
        return torch.cat([counts.new_zeros(1), counts.cumsum(0)]), scores[order], rows[order]

    def _search_some(
        self, queries: Tensor, k: int, selection: Selection, values: dict[str, Any], workspace_bytes: int
    ) -> tuple[Tensor, Tensor]:
        n_queries, n_places = len(queries), self._total
        scores = torch.full((n_queries, k), self.metric.worst, device=queries.device)
        rows = torch.full((n_queries, k), -1, device=queries.device)
        visible = self._visible(n_queries, selection)
        fetch, factor = min(n_places, k + selection.n_excluded), 1
        pending = torch.arange(n_queries, device=queries.device)
        while len(pending) and fetch:
            wider = values
            if factor > 1 and self._widens:
                wider = widened(self.build, self.index, values, fetch, factor)
            left = []
            for start, stop in spans(len(pending), max(1, workspace_bytes // (_CANDIDATE_BYTES * fetch))):
                part = pending[start:stop]
                found = self._survivors(queries[part], fetch, selection.for_queries(part), wider)
                kept = min(k, fetch)
                scores[part, :kept], rows[part, :kept] = (each[:, :kept] for each in found)
                left.append(part[(rows[part] >= 0).sum(1) < visible[part].clamp_max(k)])
            pending = torch.cat(left)
            if fetch == n_places and (factor >= n_places or not self._widens):
                break
            fetch, factor = min(n_places, 2 * fetch), 2 * factor
        return scores, rows

    def _survivors(
        self, queries: Tensor, fetch: int, selection: Selection, values: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Return scores and rows ``(Q, fetch)`` of what queries may see, -1 behind them."""
        scores, places = self._run_selected(queries, fetch, selection, values)
        out = places < 0
        places = places.clamp_min(0)
        rows = places if self.row_of is None else self.row_of[places]
        owners = torch.arange(len(queries), device=rows.device)[:, None].expand_as(rows)
        hidden = selection.drops(owners.reshape(-1), rows.clamp_min(0).reshape(-1)).view_as(rows)
        out |= (rows < 0) | hidden
        order = out.to(torch.uint8).argsort(dim=1, stable=True)
        scores, rows = scores.masked_fill(out, self.metric.worst), rows.masked_fill(out, -1)
        return scores.gather(1, order), rows.gather(1, order)

    def _run_selected(
        self, queries: Tensor, fetch: int, selection: Selection, values: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        keep = self._shared_places(selection) if self.selectors and not self._engine.on_gpus else None
        if keep is not None:
            selector, memory = bitmap_selector(self.build, keep)
            try:
                found = self._ask(queries, fetch, values, selector)
            except RuntimeError:
                # Which families take one, no faiss says; without one more is asked for and sorted out.
                self.selectors = False
            else:
                del memory
                return found
        return self._run(queries, fetch, values)

    def _shared_places(self, selection: Selection) -> Tensor | None:
        """Return bool ``(places,)``, False for places that all queries leave out; None if there are none."""
        mask = selection.mask if selection.own_mask is None else None
        if self.row_of is None:
            return mask
        shown: Tensor = self.row_of >= 0
        return shown if mask is None else shown & mask[self.row_of.clamp_min(0)]

    def _visible(self, n_queries: int, selection: Selection) -> Tensor:
        """Return ``(Q,)``, how many rows each query may see, at least."""
        device, n_rows = self.place_of.device, len(self.place_of)
        if selection.mask is None:
            counts = torch.full((n_queries,), n_rows, device=device)
        else:
            counts = torch.atleast_2d(selection.mask).sum(1).expand(n_queries)
        if selection.exclude is not None:
            counts = counts - _shown(selection.exclude, selection.mask, n_queries)
        return counts.clamp_min(0)

    def _run(self, queries: Tensor, k: int, values: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if self._engine.on_gpu and k > MOST_NEIGHBOURS:
            raise ImplementationError(
                f"{k} candidates are asked for, faiss serves at most {MOST_NEIGHBOURS} on a GPU"
            )
        try:
            if self._total and not values and not self._asks_a_graph:
                return self._engine.search(queries, k)
            return self._ask(queries, k, values)
        except RuntimeError as error:
            raise describe_refusal("search so", self.index, error) from error

    def _ask(
        self, queries: Tensor, k: int, values: dict[str, Any], selector: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Return scores and places ``(Q, K)`` that faiss gives."""
        if not self._total:
            # faiss ends the process where a graph holds nothing.
            scores = torch.full((len(queries), k), self.metric.worst, device=queries.device)
            return scores, torch.full((len(queries), k), -1, device=queries.device)
        limit = k
        if self._asks_a_graph:
            limit, values = within_graph(self.build, self.index, k, values)
        params = search_parameters(self.build, self.index, values, selector)
        scores, places = self._engine.search(queries, limit, params)
        if limit == k:
            return scores, places
        missing = (0, k - limit)
        return pad(scores, missing, value=self.metric.worst), pad(places, missing, value=-1)

    def _range(self, queries: Tensor, radius: float, params: Any) -> tuple[Tensor, Tensor, Tensor]:
        try:
            return self._engine.range_search(queries, radius, params)
        except ImplementationError:
            raise
        except RuntimeError as error:
            raise describe_refusal("search by radius", self.index, error) from error


def _shown(exclude: Tensor, mask: Tensor | None, n_queries: int) -> Tensor:
    """Return ``(Q,)``, how many different rows of ``exclude (Q, M)`` a mask shows."""
    ordered = exclude.sort(1).values
    fresh = ordered >= 0
    fresh[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
    if mask is not None:
        own = torch.atleast_2d(mask).expand(n_queries, -1)
        fresh &= own.gather(1, ordered.clamp_min(0))
    return fresh.sum(1)


def _equal_spans(radius: Tensor) -> list[tuple[int, int]]:
    """Return where runs of one radius start and stop."""
    if not len(radius):
        return []
    cuts = (radius.diff() != 0).nonzero().flatten().add(1).tolist()
    edges = [0, *cuts, len(radius)]
    return list(itertools.pairwise(edges))
