"""Search among codes that decodes each tile of rows while it selects from it.

As in `knn_approximated`: the tile is in cache when the product reads it, and no more is kept of it than its
candidates, which are decoded again to be scored by the definition.
"""

import torch
from torch import Tensor

from elips_torch.core.metric import Metric
from elips_torch.core.tiling import plan_tiles
from elips_torch.kernels.approximate import approximate_scores, row_norms
from elips_torch.kernels.coded_rows import Decoder
from elips_torch.kernels.definition import score_decoded
from elips_torch.kernels.exact_tile import TILE_SHARE
from elips_torch.kernels.knn_approximated import ApproximatedSearch

# Rows decoded at a time: their vectors stay in cache (measured).
_PREFERRED_FEATURES = 2**20


class DecodedSearch(ApproximatedSearch):
    """Select by an approximation on rows decoded tile by tile, rescore, certify."""

    def __init__(
        self,
        codes: Tensor,  # (N, code_size)
        decoder: Decoder,
        metric: Metric,
        k: int,
        selection_bytes: int,  # per query
    ) -> None:
        super().__init__(codes, metric, torch.float32, k, selection_bytes)
        self.decoder = decoder

    def _tiles(self, n_queries: int, workspace_bytes: int) -> tuple[int, int]:
        dim = self.decoder.dim
        # As in `ApproximatedSearch`, with what decoding takes of a row.
        tiles = plan_tiles(
            n_queries,
            min(self.database.shape[0], max(1, _PREFERRED_FEATURES // dim)),
            workspace_bytes=int(workspace_bytes * TILE_SHARE),
            cell_bytes=22 if self.metric.name == "braycurtis" else 14,
            row_bytes=12 * dim + 16,
            query_bytes=24 * dim + 96 * self.n_candidates + self.selection_bytes,
        )
        return tiles.queries, tiles.rows

    def _approximate(self, prepared: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        vectors = self.decoder.decode(self.database[start:stop])
        norms = row_norms(self.metric, vectors)
        return approximate_scores(self.metric, prepared, vectors, norms), norms

    def _rescore(self, queries: Tensor, rows: Tensor, workspace_bytes: int) -> Tensor:
        def decode(chosen: Tensor) -> Tensor:
            return self.decoder.decode(self.database.index_select(0, chosen))

        return score_decoded(self.metric, queries, decode, rows, workspace_bytes)
