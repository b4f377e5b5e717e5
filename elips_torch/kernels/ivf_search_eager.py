"""Search of the lists that each query probes, in plain torch, exact inside these lists.

As in exact search, each step answers the queries for which it can prove the answer:

1. a float32 product selects candidates, which are rescored and certified; then a float64 product;
2. every row of the probed lists is scored, which always answers.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from elips_torch.core.hardware import float32_product_is_exact
from elips_torch.core.metric import Metric
from elips_torch.core.ordering import EMPTY_KEY, order_keys
from elips_torch.core.tiling import plan_tiles, spans
from elips_torch.kernels.approximate import approximate_scores, has_approximation, prepare_queries, row_norms
from elips_torch.kernels.definition import score_decoded
from elips_torch.kernels.exact_tile import plan_exact_tiles, score_tile
from elips_torch.kernels.knn_approximated import certified_best, n_candidates
from elips_torch.kernels.list_layout import (
    ListLayout,
    ListSelection,
    ListTile,
    RowDecoder,
    list_major_tiles,
    query_major_tiles,
)
from elips_torch.kernels.selection import Selection

# Shares of the workspace: what every query keeps, and a tile; the rest is for rescoring, which comes after.
BLOCK_SHARE = 0.4
_TILE_SHARE = 0.3
# Until then, probes sorted by list take a share of that rest, and so many bytes each.
PROBE_SHARE = 0.1
PROBE_BYTES = 48
# Features of pairs up to which scoring all by the definition is cheaper than anything else.
_FEW_FEATURES = 2**17
# Milliseconds that the steps of a tile take, and a million features gathered for it, by list and by
# query: the latter are scattered, and leave the cache (measured on an AVX-512 core).
_LIST_MS, _LIST_FEATURES_MS = 0.15, 1.5
_QUERY_MS, _QUERY_FEATURES_MS = 0.4, 3.0

Tiling = Callable[[ListLayout, Tensor, int], Iterator[ListTile]]


def choose_tiling(n_queries: int, n_probes: int, layout: ListLayout, dim: int) -> Tiling:
    """Return the order in which fewest steps and fewest bytes answer the queries."""
    n_lists = min(layout.nlist, n_queries * n_probes)
    features = layout.n_rows / layout.nlist * dim / 1e6
    by_list = n_lists * (_LIST_MS + features * _LIST_FEATURES_MS)
    by_query = n_queries * (_QUERY_MS + n_probes * features * _QUERY_FEATURES_MS)
    return list_major_tiles if by_list < by_query else query_major_tiles


class Step(Protocol):
    """One of the searches that are tried in turn."""

    def queries_at_once(self, k: int, workspace_bytes: int) -> int:
        """Return how many queries `run` takes at a time."""

    def run(
        self,
        queries: Tensor,
        probes: Tensor,
        k: int,
        ranks: Tensor | None,
        selection: Selection,
        workspace_bytes: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores ``(Q, K)``, rows ``(Q, K)`` and bool ``(Q,)``, which queries are certified."""


# Makes a step from the layout, the decoder, the metric, k, the number of probes and the workspace; None
# where it cannot serve.
FirstStep = Callable[[ListLayout, RowDecoder, Metric, int, int, int], Step | None]


class _ApproximatedLists:
    """Select by the approximation, rescore, certify."""

    def __init__(
        self,
        layout: ListLayout,
        decode: RowDecoder,
        metric: Metric,
        dtype: torch.dtype,
        k: int,
        tiling: Tiling,
    ) -> None:
        self.layout = layout
        self.decode = decode
        self.metric = metric
        self.dtype = dtype
        self.tiling = tiling
        self.n_candidates = n_candidates(k)

    def queries_at_once(self, k: int, workspace_bytes: int) -> int:
        """Return how many queries fit the workspace."""
        # The query twice, and its candidates with what their rescoring and ranking takes.
        taken = 32 * self.decode.dim + self.n_candidates * (self.dtype.itemsize + 64)
        return max(1, int(workspace_bytes * BLOCK_SHARE) // taken)

    def run(
        self,
        queries: Tensor,
        probes: Tensor,
        k: int,
        ranks: Tensor | None,
        selection: Selection,
        workspace_bytes: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores ``(Q, K)``, rows ``(Q, K)`` and bool ``(Q,)``, which queries are certified."""
        prepared, query_norms = prepare_queries(self.metric, queries, self.dtype)
        values, rows, largest_norm, all_seen = self._select(prepared, probes, selection, workspace_bytes)
        rest = int(workspace_bytes * (1 - BLOCK_SHARE - _TILE_SHARE))
        scores = score_decoded(self.metric, queries, self.decode, rows.clamp_min(0), rest)
        return certified_best(
            self.metric,
            self.dtype,
            k,
            ranks,
            rows,
            values,
            scores,
            all_seen,
            query_norms,
            largest_norm,
            queries.shape[1],
        )

    def _select(
        self, prepared: Tensor, probes: Tensor, selection: Selection, workspace_bytes: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the candidates and what a certificate needs, as `ApproximatedSearch` does.

        The largest norm is that of the rows that a query has met, ``(Q, 1)``.
        """
        metric, device, size = self.metric, prepared.device, self.dtype.itemsize
        n_queries, dim = prepared.shape
        width = self.n_candidates
        values = torch.full((n_queries, width), metric.worst, dtype=self.dtype, device=device)
        rows = torch.full((n_queries, width), -1, dtype=torch.int64, device=device)
        largest_norm = torch.zeros(n_queries, dtype=self.dtype, device=device)
        visible = torch.zeros(n_queries, dtype=torch.int64, device=device)
        tiles = plan_tiles(
            n_queries,
            self.layout.n_rows,
            workspace_bytes=int(workspace_bytes * _TILE_SHARE),
            cell_bytes=(6 if metric.name == "braycurtis" else 4) * size + 6,
            row_bytes=dim * (size + self.decode.dtype.itemsize) + 4 * size + 16,
            query_bytes=dim * size + width * (3 * size + 32) + 24 * selection.n_excluded,
        )
        hidden = ListSelection(selection, self.layout)
        for tile in self.tiling(self.layout, probes, tiles.rows):
            vectors = self.decode(tile.rows).to(self.dtype).contiguous()
            norms = row_norms(metric, vectors)
            for start, stop in spans(tile.owners.shape[0], tiles.queries):
                owners = tile.owners[start:stop]
                scores = approximate_scores(metric, prepared[owners], vectors, norms)
                dropped = hidden.dropped(tile, owners)
                seen: Tensor | int = tile.rows.shape[0]
                if dropped is not None:
                    scores.masked_fill_(dropped, metric.worst)
                    seen = seen - dropped.sum(1)
                visible[owners] += seen
                if norms.numel():
                    largest_norm[owners] = torch.maximum(largest_norm[owners], norms.max())
                # Most lists hold nothing better than what a query has; NaN compares False.
                kept = values[owners]
                if metric.higher_is_better:
                    improved = ~(scores.amax(1) < kept.amin(1))
                else:
                    improved = ~(scores.amin(1) > kept.amax(1))
                better = improved.nonzero()[:, 0]
                owners, kept, scores = owners[better], kept[better], scores[better]
                merged, best = torch.cat([kept, scores], 1).topk(
                    width, dim=1, largest=metric.higher_is_better, sorted=False
                )
                # Unknown scores sort as best for these metrics, and so they must count.
                values[owners] = (
                    merged.nan_to_num_(torch.inf, torch.inf, -torch.inf)
                    if metric.higher_is_better
                    else merged
                )
                column = (best - width).clamp_min_(0)
                found = tile.rows[column]
                if dropped is not None:
                    dropped = dropped[better] if dropped.shape[0] > 1 else dropped.expand(better.shape[0], -1)
                    found.masked_fill_(dropped.gather(1, column), -1)
                before = rows[owners].gather(1, best.clamp_max(width - 1))
                rows[owners] = torch.where(best < width, before, found)
        return values, rows, largest_norm[:, None], (rows >= 0).sum(1) == visible


class _CompleteLists:
    """Score every row of the probed lists exactly and keep the best by key; certifies every query."""

    def __init__(self, layout: ListLayout, decode: RowDecoder, metric: Metric, tiling: Tiling) -> None:
        self.layout = layout
        self.decode = decode
        self.metric = metric
        self.tiling = tiling

    def queries_at_once(self, k: int, workspace_bytes: int) -> int:
        """Return how many queries fit the workspace."""
        return max(1, int(workspace_bytes * BLOCK_SHARE) // (40 * k))

    def run(
        self,
        queries: Tensor,
        probes: Tensor,
        k: int,
        ranks: Tensor | None,
        selection: Selection,
        workspace_bytes: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores ``(Q, K)``, rows ``(Q, K)`` and bool ``(Q,)``, all True."""
        metric, device, shape = self.metric, queries.device, (queries.shape[0], k)
        keys = torch.full(shape, EMPTY_KEY, dtype=torch.int64, device=device)
        rows = torch.full(shape, -1, dtype=torch.int64, device=device)
        scores = torch.full(shape, metric.worst, dtype=torch.float32, device=device)
        share = int(workspace_bytes * (1 - BLOCK_SHARE - PROBE_SHARE))
        tiles = plan_exact_tiles(
            queries.shape[0],
            self.layout.n_rows,
            self.decode.dim,
            share,
            cell_bytes=40,
            query_bytes=8 * queries.shape[1] + 60 * k + 24 * selection.n_excluded,
        )
        hidden = ListSelection(selection, self.layout)
        for tile in self.tiling(self.layout, probes, tiles.rows):
            vectors = self.decode(tile.rows)
            tile_ranks = tile.rows if ranks is None else ranks[tile.rows]
            for start, stop in spans(tile.owners.shape[0], tiles.queries):
                owners = tile.owners[start:stop]
                tile_scores = score_tile(metric, queries[owners], vectors, share)
                tile_keys = order_keys(tile_scores, tile_ranks, metric.higher_is_better)
                dropped = hidden.dropped(tile, owners)
                if dropped is not None:
                    tile_keys.masked_fill_(dropped, EMPTY_KEY)
                best_keys, best = torch.cat([keys[owners], tile_keys], 1).topk(k, dim=1, largest=False)
                keys[owners] = best_keys
                scores[owners] = torch.cat([scores[owners], tile_scores], 1).gather(1, best)
                tile_rows = tile.rows.expand(owners.shape[0], -1)
                rows[owners] = torch.cat([rows[owners], tile_rows], 1).gather(1, best)
        empty = keys == EMPTY_KEY
        certified = torch.ones(queries.shape[0], dtype=torch.bool, device=device)
        return scores.masked_fill_(empty, metric.worst), rows.masked_fill_(empty, -1), certified


def ivf_search_eager(
    queries: Tensor,  # (Q, D)
    probes: Tensor,  # (Q, P) int64, -1 for none
    layout: ListLayout,
    decode: RowDecoder,
    k: int,
    metric: Metric,
    ranks: Tensor | None,  # (N,) int64, rank of each row's id; None: rows are in the order of ids
    selection: Selection,
    workspace_bytes: int,
    first_step: FirstStep | None = None,
) -> tuple[Tensor, Tensor]:  # (Q, K) float32, (Q, K) int64
    """Return the scores and rows of the k best rows of the probed lists; -1 where there are fewer.

    ``first_step`` makes what is tried first; implementations differ by it.
    """
    n_queries, n_rows = queries.shape[0], layout.n_rows
    scores = torch.full((n_queries, k), metric.worst, dtype=torch.float32, device=queries.device)
    rows = torch.full((n_queries, k), -1, dtype=torch.int64, device=queries.device)
    if n_rows == 0 or n_queries == 0 or probes.shape[1] == 0:
        return scores, rows
    found = min(k, n_rows)
    probes_at_once = max(1, int(workspace_bytes * PROBE_SHARE) // (PROBE_BYTES * probes.shape[1]))
    pending: Tensor | None = None
    steps = _steps(queries, probes, layout, decode, k, metric)
    if first_step is not None:
        first = first_step(layout, decode, metric, found, probes.shape[1], workspace_bytes)
        steps = steps if first is None else [first, *steps]
    for step in steps:
        left = []
        at_once = min(probes_at_once, step.queries_at_once(found, workspace_bytes))
        for start, stop in spans(n_queries if pending is None else pending.numel(), at_once):
            part: slice | Tensor = slice(start, stop) if pending is None else pending[start:stop]
            chosen = selection.for_queries(part)
            result = step.run(queries[part], probes[part], found, ranks, chosen, workspace_bytes)
            scores[part, :found], rows[part, :found], certified = result
            unsure = (~certified).nonzero()[:, 0]
            left.append(unsure + start if pending is None else pending[start:stop][unsure])
        pending = torch.cat(left)
        if not pending.numel():
            break
    return scores, rows


def _steps(
    queries: Tensor, probes: Tensor, layout: ListLayout, decode: RowDecoder, k: int, metric: Metric
) -> list[Step]:
    """Return the searches to try in turn; the last one certifies every query."""
    tiling = choose_tiling(queries.shape[0], probes.shape[1], layout, decode.dim)
    steps: list[Step] = []
    rows_per_query = probes.shape[1] * layout.n_rows / layout.nlist
    small = queries.shape[0] * rows_per_query * decode.dim <= _FEW_FEATURES
    if 2 * n_candidates(k) <= rows_per_query and not small:
        wide = torch.float64 in (queries.dtype, decode.dtype)
        for dtype in (torch.float32, torch.float64):
            if dtype == torch.float32 and (wide or not float32_product_is_exact(queries.device)):
                continue
            if has_approximation(metric, dtype):
                steps.append(_ApproximatedLists(layout, decode, metric, dtype, k, tiling))
    return [*steps, _CompleteLists(layout, decode, metric, tiling)]
