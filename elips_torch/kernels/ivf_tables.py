"""Search of inverted lists of product codes that selects by lookup tables, without decoding a row.

For every list that a query probes there is a table, of what each centroid of a part adds to the score of
a row of that list (Jegou, Douze and Schmid, Product quantization for nearest neighbor search, 2011):
|q - c - e|**2 of the parts of the query q, the centroid c of the list and the centroid e of the part, or
q.e, to which q.c is still to be added. The few candidates are decoded and scored by the definition, and
certified as in `knn_approximated`.

The error bound is that of a product of plain vectors, (D + 16) roundings. A part and the sum of m parts take
D + 1 together; the differences, the rounding of q and of the decoded c + e, and what is subtracted at
the end take fewer than 15.
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from elips_torch.core.metric import Metric
from elips_torch.kernels.approximate import prepare_queries
from elips_torch.kernels.coded_rows import PartRows
from elips_torch.kernels.definition import score_decoded
from elips_torch.kernels.ivf_search_eager import Step
from elips_torch.kernels.knn_approximated import certified_best, n_candidates
from elips_torch.kernels.list_layout import ListLayout, RowDecoder, concatenated_ranges
from elips_torch.kernels.selection import Selection

# Share of the workspace for tables and rows; the rest is for rescoring.
_SHARE = 0.7
# So many queries at a time keep their tables in cache.
_PREFERRED_QUERIES = 8
# The numbers of all entries of a query's tables, of as many queries, are below 2**31.
_MOST_ENTRIES = 2**27


def table_step(
    layout: ListLayout,
    decode: RowDecoder,
    metric: Metric,
    k: int,
    n_probes: int,
    n_excluded: int,
    workspace_bytes: int,
) -> Step | None:
    """Return the search by tables; None where the lists of a query might not fit the workspace."""
    if not isinstance(decode, PartRows) or metric.name not in ("l2", "ip"):
        return None
    if n_probes * decode.codebooks[..., 0].numel() > _MOST_ENTRIES:
        return None
    step = TableLists(layout, decode, metric, k, n_probes)
    return step if step.query_bytes <= int(workspace_bytes * _SHARE) else None


class TableLists:
    """Select by lookup tables, rescore, certify."""

    def __init__(self, layout: ListLayout, decode: PartRows, metric: Metric, k: int, n_probes: int) -> None:
        self.layout = layout
        self.decode = decode
        self.metric = metric
        self.n_candidates = n_candidates(k)
        # (m, D / m, ksub): sums over the features of a part run along whole rows.
        self.features = decode.codebooks.transpose(1, 2).contiguous()
        self.largest_entry = decode.codebooks.square().sum(2).amax(1).sum().sqrt()
        m, ksub, dsub = decode.codebooks.shape
        rows = min(layout.n_rows, n_probes * int(layout.sizes.max()))
        # Rows with their entries; the tables and their terms; what selecting takes.
        self.query_bytes = (
            rows * (12 * m + 120) + n_probes * m * ksub * (8 + 8 * dsub) + 120 * self.n_candidates
        )

    def queries_at_once(self, k: int, workspace_bytes: int) -> int:
        """Return how many queries fit the workspace."""
        return max(1, min(_PREFERRED_QUERIES, int(workspace_bytes * _SHARE) // self.query_bytes))

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
        metric = self.metric
        n_queries, n_probes = probes.shape
        prepared, query_norms = prepare_queries(metric, queries, torch.float32)
        lists = probes.clamp_min(0).flatten()
        sizes = (self.layout.sizes[lists] * (probes >= 0).flatten()).contiguous()
        rows = self.layout.slots[concatenated_ranges(self.layout.starts[lists], sizes)]
        pairs = torch.repeat_interleave(sizes, output_size=rows.shape[0])
        owners = pairs // n_probes
        values, largest_norm = self._approximate(prepared, lists, rows, pairs, owners)
        if metric.name == "l2":
            # What `certified_best` adds again.
            values -= query_norms.square().float()[:, 0][owners]
        if selection.mask is not None or selection.exclude is not None:
            seen = ~selection.drops(owners, rows)
            rows, owners, values = rows[seen], owners[seen], values[seen]
        counts = torch.bincount(owners, minlength=n_queries)
        column = torch.arange(owners.numel(), device=owners.device) - (counts.cumsum(0) - counts)[owners]
        width = max(self.n_candidates, int(counts.max()))
        table = values.new_full((n_queries, width), metric.worst)
        table[owners, column] = values
        found = rows.new_full((n_queries, width), -1)
        found[owners, column] = rows
        best, column = table.topk(self.n_candidates, dim=1, largest=metric.higher_is_better)
        if metric.higher_is_better:
            # Unknown scores sort as best, and so they must count.
            best.nan_to_num_(torch.inf, torch.inf, -torch.inf)
        chosen = found.gather(1, column)
        rest = int(workspace_bytes * (1 - _SHARE))
        return certified_best(
            metric,
            torch.float32,
            k,
            ranks,
            chosen,
            best,
            score_decoded(metric, queries, self.decode, chosen.clamp_min(0), rest),
            counts <= self.n_candidates,
            query_norms,
            largest_norm,
            queries.shape[1],
        )

    def _approximate(
        self,
        queries: Tensor,  # (Q, D) float32
        lists: Tensor,  # (Q * P,)
        rows: Tensor,  # (R,)
        pairs: Tensor,  # (R,), among the lists
        owners: Tensor,  # (R,), among the queries
    ) -> tuple[Tensor, Tensor]:  # (R,) float32, () float32
        """Return approximate scores, and what no row's norm exceeds."""
        m, dsub, ksub = self.features.shape
        parts = queries.view(-1, m, dsub, 1)
        centroids = None if self.decode.centroids is None else self.decode.centroids(lists).float()
        entries = self.decode.entries(rows)
        largest = self.largest_entry
        if self.metric.name == "ip":
            # One table serves all lists. No matrix product, whose precision is the caller's to set.
            tables = (parts * self.features).sum(2)
            entries = entries + (owners * (m * ksub)).to(torch.int32)[:, None]
            scores = embedding_bag(entries, tables.view(-1, 1), mode="sum")[:, 0]
            if centroids is not None:
                n_probes = lists.shape[0] // queries.shape[0]
                offsets = (queries[:, None] * centroids.view(-1, n_probes, m * dsub)).sum(2)
                scores += offsets.flatten()[pairs]
        elif centroids is None:
            tables = (parts - self.features).square_().sum(2)
            entries = entries + (owners * (m * ksub)).to(torch.int32)[:, None]
            scores = embedding_bag(entries, tables.view(-1, 1), mode="sum")[:, 0]
        else:
            n_probes = lists.shape[0] // queries.shape[0]
            differences = queries[:, None] - centroids.view(-1, n_probes, m * dsub)
            tables = (differences.view(-1, m, dsub, 1) - self.features).square_().sum(2)
            entries = entries + (pairs * (m * ksub)).to(torch.int32)[:, None]
            scores = embedding_bag(entries, tables.view(-1, 1), mode="sum")[:, 0]
        if centroids is not None:
            largest = largest + torch.linalg.vector_norm(centroids, dim=1).max()
        # A hair more, for the rounding of the norms themselves.
        return scores, largest * 1.0001
