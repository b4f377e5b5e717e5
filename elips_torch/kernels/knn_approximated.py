"""Exact k-nearest-neighbour search that selects by an approximation in float32 or float64.

1. Select: approximate scores tile by tile, keep the k best and some more of each query.
2. Rescore these candidates by the definition.
3. Certify: no row outside the candidates can beat or tie the k-th, by the error bound.
"""

from typing import ClassVar

import torch
from torch import Tensor

from elips_torch.core.metric import Metric
from elips_torch.core.ordering import EMPTY_KEY, order_keys
from elips_torch.core.tiling import plan_tiles, spans
from elips_torch.kernels.approximate import (
    approximate_scores,
    error_bound,
    prepare_queries,
    query_offset,
    row_norms,
)
from elips_torch.kernels.definition import score_candidates
from elips_torch.kernels.exact_tile import TILE_SHARE
from elips_torch.kernels.selection import Selection


def n_candidates(k: int) -> int:
    """Return how many rows are rescored to find the k best."""
    return k + 16 + k // 8


def certified_best(
    metric: Metric,
    dtype: torch.dtype,
    k: int,
    ranks: Tensor | None,  # (N,) int64, rank of each row's id; None: rows are in the order of ids
    rows: Tensor,  # (Q, C) int64, the candidates; -1 where there are fewer
    values: Tensor,  # (Q, C), their approximate scores in dtype
    scores: Tensor,  # (Q, C) float32, their scores
    all_seen: Tensor,  # (Q,) bool, the candidates are all that there is
    query_norms: Tensor,  # (Q, 1) float64
    largest_norm: Tensor,  # () or (Q, 1), of the rows that the candidates were selected from
    dim: int,
) -> tuple[Tensor, Tensor, Tensor]:  # (Q, K) float32, (Q, K) int64, (Q,) bool
    """Return the scores and rows of the k best candidates, and for which queries they are the k best rows."""
    candidate_ranks = rows if ranks is None else ranks[rows.clamp_min(0)]
    keys = order_keys(scores, candidate_ranks.clamp_min(0), metric.higher_is_better)
    keys = keys.masked_fill_(rows < 0, EMPTY_KEY)
    keys, best = keys.topk(k, dim=1, largest=False)
    scores = scores.gather(1, best).masked_fill_(keys == EMPTY_KEY, metric.worst)
    found = rows.gather(1, best)

    last = values.amin(1, True) if metric.higher_is_better else values.amax(1, True)
    bound = error_bound(metric, last, query_norms, largest_norm, dim, dtype)
    limit = last.double() + query_offset(metric, query_norms)
    kth = scores[:, -1:]
    # The best that a row outside the candidates could score, against the k-th: a tie is not
    # certified, because the lower id wins it. NaN compares False.
    if metric.higher_is_better:
        certified = (limit + bound).float() < kth
    else:
        certified = (limit - bound).float() > kth
    return scores, found, certified.squeeze(1) | all_seen


class ApproximatedSearch:
    """Select by the approximation, rescore, certify."""

    has_overhead: ClassVar[bool] = True

    def __init__(
        self,
        database: Tensor,
        metric: Metric,
        dtype: torch.dtype,
        k: int,
        selection_bytes: int,  # per query
    ) -> None:
        self.database = database
        self.metric = metric
        self.dtype = dtype
        self.n_candidates = n_candidates(k)
        self.selection_bytes = selection_bytes

    def _tiles(self, n_queries: int, workspace_bytes: int) -> tuple[int, int]:
        dim, size = self.database.shape[1], self.dtype.itemsize
        # Scores and their temporaries; a row converted and its norms; a query converted, and its
        # candidates old, new and merged, each with a score and a row.
        tiles = plan_tiles(
            n_queries,
            self.database.shape[0],
            workspace_bytes=int(workspace_bytes * TILE_SHARE),
            cell_bytes=(5 if self.metric.name == "braycurtis" else 3) * size + 2,
            row_bytes=dim * (size + self.database.dtype.itemsize) + 4 * size,
            query_bytes=24 * dim + 8 * self.n_candidates * (size + 8) + self.selection_bytes,
        )
        return tiles.queries, tiles.rows

    def queries_at_once(self, k: int, workspace_bytes: int) -> int:
        """Return how many queries fit the workspace."""
        return self._tiles(2**30, workspace_bytes)[0]

    def run(
        self, queries: Tensor, k: int, ranks: Tensor | None, selection: Selection, workspace_bytes: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores ``(Q, K)``, rows ``(Q, K)`` and bool ``(Q,)``, which queries are certified."""
        metric = self.metric
        prepared, query_norms = self._prepare(queries)
        values, rows, largest_norm, all_seen = self._select(prepared, selection, workspace_bytes)
        rest = int(workspace_bytes * (1 - TILE_SHARE))
        scores = self._rescore(queries, rows.clamp_min(0), rest)
        return certified_best(
            metric,
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

    # What depends on how the rows are stored.

    def _prepare(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `_approximate` takes, with a row per query, and their float64 norms ``(Q, 1)``."""
        return prepare_queries(self.metric, queries, self.dtype)

    def _approximate(self, prepared: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return approximate scores of some rows ``(Q, stop - start)`` and norms, one of them the largest."""
        vectors = self.database[start:stop].to(self.dtype).contiguous()
        norms = row_norms(self.metric, vectors)
        return approximate_scores(self.metric, prepared, vectors, norms), norms

    def _rescore(self, queries: Tensor, rows: Tensor, workspace_bytes: int) -> Tensor:
        """Return the scores of rows ``(Q, C)`` by the definition."""
        return score_candidates(self.metric, queries, self.database, rows, workspace_bytes)

    def _select(
        self, prepared: Tensor, selection: Selection, workspace_bytes: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the candidates and what a certificate needs.

        These are their approximate scores and rows ``(Q, C)``, the largest norm of all rows, and
        bool ``(Q,)``, True where the candidates are all the rows that a query may see.
        """
        metric, device = self.metric, prepared.device
        n_queries, n_rows = prepared.shape[0], self.database.shape[0]
        shape = (n_queries, self.n_candidates)
        values = torch.full(shape, metric.worst, dtype=self.dtype, device=device)
        rows = torch.full(shape, -1, dtype=torch.int64, device=device)
        largest_norm = torch.zeros((), dtype=self.dtype, device=device)
        visible = torch.full((n_queries,), n_rows, device=device)
        for start, stop in spans(n_rows, self._tiles(n_queries, workspace_bytes)[1]):
            scores, norms = self._approximate(prepared, start, stop)
            if norms.numel():
                largest_norm = torch.maximum(largest_norm, norms.max())
            dropped = selection.dropped(n_queries, start, stop)
            if dropped is not None:
                scores.masked_fill_(dropped, metric.worst)
                visible -= dropped.sum(1)
            width = min(self.n_candidates, stop - start)
            tile_values, columns = scores.topk(width, dim=1, largest=metric.higher_is_better, sorted=False)
            tile_rows = columns.add_(start)
            if dropped is not None:
                out = dropped.expand(n_queries, -1).gather(1, tile_rows - start)
                tile_rows.masked_fill_(out, -1)
            merged, best = torch.cat([values, tile_values], 1).topk(
                self.n_candidates, dim=1, largest=metric.higher_is_better, sorted=False
            )
            # Unknown scores sort as best for these metrics, and so they must count.
            values = (
                merged.nan_to_num_(torch.inf, torch.inf, -torch.inf) if metric.higher_is_better else merged
            )
            rows = torch.cat([rows, tile_rows], 1).gather(1, best)
        return values, rows, largest_norm, (rows >= 0).sum(1) == visible
