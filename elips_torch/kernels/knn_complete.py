"""Exact k-nearest-neighbour search by the score of every row: the last resort, and small searches."""

from typing import ClassVar

import torch
from torch import Tensor

from elips_torch.core.metric import Metric
from elips_torch.core.ordering import EMPTY_KEY, order_keys
from elips_torch.core.tiling import spans
from elips_torch.kernels.exact_tile import plan_exact_tiles, score_tile
from elips_torch.kernels.selection import Selection


class CompleteSearch:
    """Score every row exactly and keep the best by key; certifies every query."""

    has_overhead: ClassVar[bool] = False

    def __init__(self, database: Tensor, metric: Metric, selection_bytes: int) -> None:
        self.database = database
        self.metric = metric
        self.selection_bytes = selection_bytes

    def _tiles(self, n_queries: int, k: int, workspace_bytes: int) -> tuple[int, int]:
        # Beside the tile's scores: keys and rows of the tile, and of the best old, new and merged.
        tiles = plan_exact_tiles(
            n_queries,
            self.database.shape[0],
            self.database.shape[1],
            workspace_bytes,
            cell_bytes=40,
            query_bytes=96 * k + self.selection_bytes,
        )
        return tiles.queries, tiles.rows

    def queries_at_once(self, k: int, workspace_bytes: int) -> int:
        """Return how many queries fit the workspace."""
        return self._tiles(2**30, k, workspace_bytes)[0]

    def run(
        self, queries: Tensor, k: int, ranks: Tensor | None, selection: Selection, workspace_bytes: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores ``(Q, K)``, rows ``(Q, K)`` and bool ``(Q,)``, all True."""
        metric, device = self.metric, queries.device
        n_queries, n_rows = queries.shape[0], self.database.shape[0]
        keys = torch.empty(n_queries, 0, dtype=torch.int64, device=device)
        rows = torch.empty(n_queries, 0, dtype=torch.int64, device=device)
        scores = torch.empty(n_queries, 0, dtype=torch.float32, device=device)
        for start, stop in spans(n_rows, self._tiles(n_queries, k, workspace_bytes)[1]):
            tile = score_tile(metric, queries, self.database[start:stop], workspace_bytes)
            positions = torch.arange(start, stop, device=device)
            tile_ranks = positions if ranks is None else ranks[start:stop]
            tile_keys = order_keys(tile, tile_ranks, metric.higher_is_better)
            dropped = selection.dropped(n_queries, start, stop)
            if dropped is not None:
                tile_keys.masked_fill_(dropped, EMPTY_KEY)
            keys = torch.cat([keys, tile_keys], 1)
            keys, best = keys.topk(min(k, keys.shape[1]), dim=1, largest=False)
            rows = torch.cat([rows, positions.expand(n_queries, -1)], 1).gather(1, best)
            scores = torch.cat([scores, tile], 1).gather(1, best)
        empty = keys == EMPTY_KEY
        scores = scores.masked_fill_(empty, metric.worst)
        certified = torch.ones(n_queries, dtype=torch.bool, device=device)
        return scores, rows.masked_fill_(empty, -1), certified
