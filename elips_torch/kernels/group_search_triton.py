"""What searches by Triton kernels do once groups of rows are bounded: score those that matter.

1. Score every row of the k best groups by the definition: the k-th best score is a threshold.
2. Score every row of the other groups whose bound reaches it.
3. Sort by score and id (`merge_triton`).

Where what survives does not fit its share of the workspace, fewer queries are taken at a time. Where
too many groups survive, a query is left uncertified, for the next search to answer.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from elips_torch.core.metric import Metric
from elips_torch.core.tiling import even_cuts
from elips_torch.kernels.merge_triton import LARGEST_K, merge_keys_triton
from elips_torch.kernels.pair_scores import rounded_pair_scores
from elips_torch.kernels.plane import BIAS, NORM, SCALE, UNIT, Plane
from elips_torch.kernels.ranking import rank_pairs, smallest_keys, table_of_pairs
from elips_torch.kernels.rescore_triton import rescore_triton
from elips_torch.kernels.screen import CodedQueries, group_terms, threshold
from elips_torch.kernels.screen_passes import FLOOR, NO_ROW
from elips_torch.kernels.select_triton import kth_largest_triton
from elips_torch.kernels.selection import Selection

# Surviving groups of a query beyond which another search is cheaper, if they are not few per neighbour.
_MOST_GROUPS = 256
_GROUPS_PER_NEIGHBOUR = 4
# Bytes per row of a surviving group: float64 scores and similarities, and temporaries of these.
_ROW_BYTES = 40
# Bytes per row that may be among the k best: its numbers, scores and keys.
_HIT_BYTES = 160
# Metrics whose float64 scores are sums of terms of one sign, so that their error is relative.
_ONE_SIGN = ("l2", "l1", "linf", "canberra", "braycurtis", "gower")


@dataclasses.dataclass(frozen=True)
class GroupBounds:
    """What a scan says of queries.

    Attributes:
        upper: ``(Q, M)`` float32, no row of a group is more similar; minus infinity where a query sees none.
        rounding: ``(Q,)`` float64, what float32 may hide beside what is in proportion to the similarity.
        offsets: ``(Q,)`` float64, the score of similarity zero.
        certified: bool ``(Q,)``, False where nothing is bounded.
        columns: ``(Q, P)`` int64, the first column of each probe; None where columns are groups.
        first_groups: ``(Q, P)`` int64, the group that stands in it.
    """

    upper: Tensor
    rounding: Tensor
    offsets: Tensor
    certified: Tensor
    columns: Tensor | None = None
    first_groups: Tensor | None = None

    def part(self, start: int, stop: int) -> "GroupBounds":
        """Return the bounds of some of the queries."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return dataclasses.replace(
            self, **{name: field[start:stop] for name, field in fields.items() if field is not None}
        )

    def chosen(self, where: Tensor) -> tuple[Tensor, Tensor]:
        """Return groups ``(P,)``, ascending, and owners ``(P,)`` of the bounds that are ``where (Q, M)``."""
        if self.columns is None or self.first_groups is None:
            groups, owners = where.t().nonzero().unbind(1)
            return groups, owners
        owners, columns = where.nonzero().unbind(1)
        # One ascending sequence of all queries' probes; those without rows begin where the next one does,
        # at most behind the last column.
        width = where.shape[1] + 1
        begins = self.columns + width * torch.arange(len(where), device=where.device)[:, None]
        places = width * owners + columns
        probes = torch.searchsorted(begins.flatten(), places, right=True) - 1
        groups = self.first_groups.flatten()[probes] + places - begins.flatten()[probes]
        groups, order = groups.sort(stable=True)
        return groups, owners[order]


class GroupSearch:
    """Score the rows of groups by their bounds.

    Args:
        database: ``(N, D)`` float32, bfloat16 or float16.
        metric: any.
        plane: codes of the rows, for the metrics with a product.
        group: rows of a group.
        n_neighbours: k and the number of rows that are excluded per query.
        rows: ``(S,)`` int64, the row in each place, -1 for none, where groups are of places; None where the
            rows are the places.
        names: ``(N,)`` int64, the number by which masks, ranks and results know each row; None where that is
            its own.
    """

    def __init__(
        self,
        database: Tensor,
        metric: Metric,
        plane: Plane | None,
        group: int,
        n_neighbours: int,
        rows: Tensor | None = None,
        names: Tensor | None = None,
    ) -> None:
        self.database = database
        self.metric = metric
        self.plane = plane
        self.group = group
        self.n_neighbours = n_neighbours
        self.rows = rows
        self.names = names
        self.most_groups = max(_MOST_GROUPS, _GROUPS_PER_NEIGHBOUR * n_neighbours)
        self.answer_bytes = self.definition_bytes = 0

    def take_share(self, left: int) -> None:
        """Take half of the memory that is left: for what survives, and for what the definition scores."""
        self.answer_bytes, self.definition_bytes = left * 3 // 8, left // 8

    def answers(
        self,
        queries: Tensor,
        bounds: GroupBounds,
        k: int,
        ranks: Tensor | None,
        selection: Selection,
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return scores, rows and which queries are certified, of as many at a time as fit."""
        found = self._answer(queries, bounds, k, ranks, selection)
        if found is not None:
            return [found]
        n_queries = queries.shape[0]
        if n_queries == 1:
            scores = queries.new_full((1, k), self.metric.worst, dtype=torch.float32)
            rows = torch.full_like(scores, -1, dtype=torch.int64)
            return [(scores, rows, torch.zeros_like(bounds.certified))]
        answers = []
        for start, stop in even_cuts(n_queries, (n_queries + 1) // 2):
            part, seen = queries[start:stop], selection.narrowed(start, stop)
            answers += self.answers(part, bounds.part(start, stop), k, ranks, seen)
        return answers

    def _answer(
        self,
        queries: Tensor,
        bounds: GroupBounds,
        k: int,
        ranks: Tensor | None,
        selection: Selection,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return scores, rows and which queries are certified; None where that takes too much memory."""
        n_queries = queries.shape[0]
        upper, offsets = bounds.upper, bounds.offsets
        least, group_bytes = -(-k // self.group), _ROW_BYTES * self.group
        sees = upper > -torch.inf
        best = sees & (upper >= kth_largest_triton(upper, min(self.n_neighbours, upper.shape[1]))[:, None])
        certified = bounds.certified & (best.sum(1) <= self.most_groups)
        best &= certified[:, None]
        # A table has room for the longest list in every row.
        if n_queries * max(int(best.sum(1).max()), least) * group_bytes > self.answer_bytes:
            return None
        owners, groups, scores = self._score(queries, bounds, best, selection)
        # The k-th best score of these, if there are k.
        table = table_of_pairs(owners, self._similarities(scores, offsets[owners]), n_queries, least)
        limit = threshold(bounds.rounding, table.flatten(1).topk(k, dim=1).values[:, -1])
        del table
        more = sees & (upper >= limit[:, None]) & ~best
        certified = certified & (more.sum(1) <= self.most_groups)
        more &= certified[:, None]
        if (owners.numel() + int(more.sum())) * group_bytes > self.answer_bytes:
            return None
        others = self._score(queries, bounds, more, selection)
        owners, groups, scores = (
            torch.cat(each) for each in zip((owners, groups, scores), others, strict=True)
        )
        del others, more, best, sees
        similarities = self._similarities(scores, offsets[owners])
        # Minus infinity is no row.
        hits = (similarities >= limit[owners, None].double()) & (similarities > -torch.inf)
        del similarities
        most_hits = int(torch.zeros_like(offsets).index_add_(0, owners, hits.sum(1).double()).max())
        if n_queries * max(most_hits, k) * _HIT_BYTES > self.answer_bytes - owners.numel() * 10 * self.group:
            return None
        pairs, members = hits.nonzero().unbind(1)
        owners, scores = owners[pairs], scores[pairs, members]
        rows = self._rows_of(groups[pairs] * self.group + members)
        del hits, pairs, members, groups
        error = self._error(queries, owners, scores)
        rounded = rounded_pair_scores(
            self.metric, queries, self.database, owners, rows, scores, error, self.definition_bytes
        )
        smallest = merge_keys_triton if k <= LARGEST_K else smallest_keys
        rows = rows if self.names is None else self.names[rows]
        found = rank_pairs(self.metric, owners, rows, rounded, n_queries, k, ranks, smallest)
        return *found, certified

    def scan_terms(self, coded: CodedQueries) -> tuple[dict[str, Any], Tensor]:
        """Return what a scan of the plane adds to products, by keyword, and the scale of each query."""
        assert self.plane is not None
        width, (scales, factors) = group_terms(self.metric, coded, self.plane.terms)
        # In the kernels a similarity is in units of the query's scale.
        has_bias = self.metric.name == "l2"
        terms = {
            "scales": self.plane.terms[:, SCALE].contiguous(),
            "biases": self.plane.terms[:, BIAS].contiguous() if has_bias else None,
            "residuals": width,
            "norms": None,
            "q_bias": 1 / scales if has_bias else None,
            "q_residual": factors / scales,
            "q_norm": None,
        }
        return terms, scales

    def product_bounds(
        self, queries: Tensor, coded: CodedQueries, maxima: Tensor, scales: Tensor, **groups: Tensor
    ) -> GroupBounds:
        """Return the bounds of queries ``(Q, D)`` from the maxima ``(Q, M)`` of a scan, which are taken."""
        hidden = maxima <= NO_ROW / 2
        upper = maxima.mul_(scales[:, None]).add_(FLOOR).masked_fill_(hidden, -torch.inf)
        # What float64 scores may be off by counts like what rounding them to float32 loses.
        rounding = coded.rounding + self._lost(queries) / (8 * UNIT)
        return GroupBounds(upper, rounding, coded.offsets, coded.usable, **groups)

    def _rows_of(self, places: Tensor) -> Tensor:
        return places if self.rows is None else self.rows[places]

    def _score(
        self, queries: Tensor, bounds: GroupBounds, chosen: Tensor, selection: Selection
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return owners ``(P,)``, groups ``(P,)`` and float64 scores ``(P, G)`` of chosen groups ``(Q, M)``.

        Rows that a query does not see, and those that do not exist, are NaN.
        """
        # Ordered by group: its rows are read once for all queries.
        groups, owners = bounds.chosen(chosen)
        scores = rescore_triton(
            queries, self.database, owners, groups, self.group, self.metric, rows=self.rows
        )
        if selection.mask is not None or selection.exclude is not None:
            places = groups[:, None] * self.group + torch.arange(self.group, device=groups.device)
            n_places = self.database.shape[0] if self.rows is None else self.rows.shape[0]
            # Where there is no row there is no score, whatever is asked here.
            rows = self._rows_of(places.clamp_max_(n_places - 1)).clamp_min(0)
            rows = rows if self.names is None else self.names[rows]
            own = owners[:, None].expand_as(rows)
            dropped = selection.drops(own.flatten(), rows.flatten()).view_as(rows)
            scores.masked_fill_(dropped, torch.nan)
        return owners, groups, scores

    def _similarities(self, scores: Tensor, offsets: Tensor) -> Tensor:
        """Return similarities ``(P, G)`` as scans bound them, minus infinity where a score is NaN."""
        if self.metric.name == "l2":
            similarities = (offsets[:, None] - scores) / 2
        elif self.metric.higher_is_better:
            similarities = scores - offsets[:, None]
        else:
            similarities = -scores
        return similarities.nan_to_num_(-torch.inf, torch.inf, -torch.inf)

    def _error(self, queries: Tensor, owners: Tensor, scores: Tensor) -> Tensor:
        """Return how far float64 scores ``(P,)`` may be from the definition's, added in another order."""
        if self.metric.name in _ONE_SIGN:
            return scores.abs() * _lost_share(queries)
        if self.plane is None:
            # Powers and logarithms: the definition decides.
            return torch.full_like(scores, torch.inf)
        return self._lost(queries)[owners]

    def _lost(self, queries: Tensor) -> Tensor:
        """Return how far float64 products of queries ``(Q, D)`` with any row may be off, ``(Q,)``."""
        lost = _lost_share(queries)
        if self.metric.name == "l2":
            # In proportion to the score, which `threshold` allows for.
            return queries.new_zeros(queries.shape[0], dtype=torch.float64)
        if self.metric.name == "cosine":
            return queries.new_full((queries.shape[0],), 2 * lost, dtype=torch.float64)
        assert self.plane is not None
        longest = self.plane.terms[:, NORM].max().double() + torch.linalg.vector_norm(
            self.plane.mean.double()
        )
        error: Tensor = torch.linalg.vector_norm(queries.double(), dim=1) * longest * lost
        return error


def _lost_share(queries: Tensor) -> float:
    """Return the relative error of float64 sums over the features of queries ``(Q, D)``, twice."""
    return 4 * (queries.shape[1] + 16) * 2.0**-53
