"""Search among product codes that selects by lookup tables, without decoding a row.

The approximate score of a row is the sum of one number per part of its code, taken from a table that
is made of the query (asymmetric distances of Jegou, Douze and Schmid, 2011). The few candidates are
decoded and scored by the definition, and certified as in `knn_approximated`.

The numbers are terms of the same product that approximates the scores of plain vectors: |c|**2 - 2 q.c
or q.c for the centroid c of a part. A part of D / m terms and a sum of m parts add no more roundings
than a product of D terms, so that product's error bound holds.
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from elips_torch.core.metric import Metric
from elips_torch.core.tiling import plan_tiles
from elips_torch.kernels.approximate import SMALLEST_NORM, prepare_queries
from elips_torch.kernels.coded_rows import PartDecoder
from elips_torch.kernels.exact_tile import TILE_SHARE
from elips_torch.kernels.knn_decoded import DecodedSearch

# Tables of so many queries at a time stay in cache (measured).
_PREFERRED_QUERIES = 64


class TableSearch(DecodedSearch):
    """Select by lookup tables, rescore, certify."""

    decoder: PartDecoder

    def __init__(
        self,
        codes: Tensor,  # (N, code_size)
        decoder: PartDecoder,
        metric: Metric,  # "l2", "ip" or "cosine"
        k: int,
        selection_bytes: int,  # per query
    ) -> None:
        super().__init__(codes, decoder, metric, k, selection_bytes)
        # (m, 1, D / m): near the centroids a product loses less.
        self.shift = decoder.codebooks.mean(1, keepdim=True) if metric.name == "l2" else None
        centroids = decoder.codebooks if self.shift is None else decoder.codebooks - self.shift
        self.squares = centroids.square().sum(2)
        # (m, D / m, ksub): sums over the features of a part run along whole rows.
        self.features = centroids.transpose(1, 2).contiguous()
        self.largest_norm = self.squares.amax(1).sum().sqrt()

    def _tiles(self, n_queries: int, workspace_bytes: int) -> tuple[int, int]:
        n_entries = self.squares.numel()
        # Sums in two orders and what selecting takes of them; entries of a row and what unpacking takes;
        # the tables of a query, twice and with their terms, and its candidates old, new and merged.
        tiles = plan_tiles(
            min(n_queries, _PREFERRED_QUERIES),
            self.database.shape[0],
            workspace_bytes=int(workspace_bytes * TILE_SHARE),
            cell_bytes=22,
            row_bytes=12 * self.decoder.m + 8,
            query_bytes=16 * n_entries
            + 24 * self.decoder.dim
            + 96 * self.n_candidates
            + self.selection_bytes,
        )
        return tiles.queries, tiles.rows

    def _prepare(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Return tables ``(Q, m * ksub)``, each column of which lies together, and norms ``(Q, 1)``."""
        if self.shift is not None:
            queries = queries.double() - self.shift.flatten()
        prepared, norms = prepare_queries(self.metric, queries, self.dtype)
        parts = prepared.view(-1, *self.features.shape[:2], 1)
        n_queries = prepared.shape[0]
        tables = torch.empty(self.squares.numel(), n_queries, dtype=torch.float32, device=queries.device)
        for query, part in enumerate(parts.unbind(0)):
            # No matrix product, whose precision is the caller's to set.
            products = (part * self.features).sum(1)
            tables[:, query] = (products if self.shift is None else self.squares - 2.0 * products).flatten()
        return tables.T, norms

    def _approximate(self, prepared: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        entries = self.decoder.entries(self.database[start:stop])
        scores = embedding_bag(entries, prepared.T, mode="sum").T.contiguous()
        if self.metric.name == "cosine":
            norms = embedding_bag(entries, self.squares.view(-1, 1), mode="sum")[:, 0].sqrt_()
            # The norm of a tiny row may have underflowed.
            unknown = norms < SMALLEST_NORM[norms.dtype]
            scores.mul_(torch.where(unknown, torch.nan, norms.reciprocal()))
        return scores, self.largest_norm
