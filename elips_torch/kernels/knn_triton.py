"""Exact k-nearest-neighbour search by Triton kernels, on CUDA and ROCm, for every metric.

1. Scan: an upper bound of each score, one maximum per group of rows (`group_max_triton`); the other
   metrics bound a distance from below (`distance_group_min_triton`).
2. Score every row of the k best groups by the definition: the k-th best score is a threshold.
3. Score every row of the other groups whose bound reaches it.
4. Sort by score and id (`merge_triton`).

Codes are those of a plane, or the vectors themselves. Half of the workspace is for bounds; where what
survives does not fit the other half, fewer queries are taken at a time. Where too many groups survive,
a query is left uncertified, for the next search to answer.
"""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from elips_torch.core.metric import Metric
from elips_torch.core.tiling import even_cuts
from elips_torch.kernels.distance_bounds import distance_error_bound
from elips_torch.kernels.distance_group_min_triton import distance_group_min_triton
from elips_torch.kernels.feature_range import all_in_range, in_range, magnitude_sums
from elips_torch.kernels.group_max_triton import group_max_triton
from elips_torch.kernels.merge_triton import LARGEST_K, merge_keys_triton
from elips_torch.kernels.pair_scores import rounded_pair_scores
from elips_torch.kernels.plane import BIAS, NORM, SCALE, UNIT, Plane, plain_plane
from elips_torch.kernels.ranking import rank_pairs, smallest_keys, table_of_pairs
from elips_torch.kernels.rescore_triton import rescore_triton
from elips_torch.kernels.screen import code_queries, group_terms, threshold
from elips_torch.kernels.screen_passes import FLOOR, NO_ROW
from elips_torch.kernels.select_triton import kth_largest_triton
from elips_torch.kernels.selection import Selection

# Rows of a group.
GROUP = 32
# Surviving groups of a query beyond which another search is cheaper, if they are not few per neighbour.
_MOST_GROUPS = 256
_GROUPS_PER_NEIGHBOUR = 4
# Bytes per row of the database: the terms of its bound.
_ROW_BYTES = 32
# Bytes per query and group of rows: the bound and what it is made of, in float64 for distances.
_PRODUCT_BYTES, _DISTANCE_BYTES = 16, 48
# Bytes per query: counts of digits; and per feature of it: float64 copies while it is coded.
_QUERY_BYTES, _FEATURE_BYTES = 4096, 64
# Bytes per surviving group: float64 scores and similarities of its rows, and temporaries of these.
_GROUP_BYTES = 40 * GROUP
# Bytes per row that may be among the k best: its numbers, scores and keys.
_HIT_BYTES = 160
# Metrics whose float64 scores are sums of terms of one sign, so that their error is relative.
_ONE_SIGN = ("l2", "l1", "linf", "canberra", "braycurtis", "gower")


def triton_search(
    database: Tensor, metric: Metric, plane: Plane | None, k: int, n_excluded: int, workspace_bytes: int
) -> "TritonSearch | None":
    """Return a search of the database, or None where its values cannot be bounded or it does not fit."""
    if database.stride(1) != 1:
        # Kernels read rows; a copy counts.
        workspace_bytes -= database.numel() * database.element_size()
        if workspace_bytes <= 0:
            return None
        database = database.contiguous()
    if metric.form == "product":
        plane = plain_plane(metric, database) if plane is None else plane
        if plane is None:
            return None
    elif not all_in_range(database, workspace_bytes):
        return None
    search = TritonSearch(database, metric, plane, k + n_excluded, workspace_bytes)
    return search if search.step else None


@dataclasses.dataclass(frozen=True)
class _Bounds:
    """What a scan says of queries.

    Attributes:
        upper: ``(Q, M)`` float32, no row of a group is more similar.
        rounding: ``(Q,)`` float64, what float32 may hide beside what is in proportion to the similarity.
        offsets: ``(Q,)`` float64, the score of similarity zero.
        certified: bool ``(Q,)``, False where nothing is bounded.
    """

    upper: Tensor
    rounding: Tensor
    offsets: Tensor
    certified: Tensor

    def part(self, start: int, stop: int) -> "_Bounds":
        """Return the bounds of some of the queries."""
        fields = (self.upper, self.rounding, self.offsets, self.certified)
        return _Bounds(*(field[start:stop] for field in fields))


class TritonSearch:
    """Scan bounds of groups, score the rows of those that matter.

    Args:
        database: ``(N, D)`` float32, bfloat16 or float16.
        metric: any.
        plane: codes of the database, for the metrics with a product.
        n_neighbours: k and the number of rows that are excluded per query.
        workspace_bytes: limit on temporary memory, in bytes.
    """

    has_overhead: ClassVar[bool] = True

    def __init__(
        self, database: Tensor, metric: Metric, plane: Plane | None, n_neighbours: int, workspace_bytes: int
    ) -> None:
        self.database = database
        self.metric = metric
        self.plane = plane
        self.n_groups = -(-database.shape[0] // GROUP)
        self.n_best = min(n_neighbours, self.n_groups)
        self.most_groups = max(_MOST_GROUPS, _GROUPS_PER_NEIGHBOUR * n_neighbours)
        bound_bytes = _DISTANCE_BYTES if plane is None else _PRODUCT_BYTES
        per_query = _QUERY_BYTES + _FEATURE_BYTES * database.shape[1] + 64 * n_neighbours
        per_query += bound_bytes * self.n_groups
        left = max(0, workspace_bytes - _ROW_BYTES * database.shape[0])
        self.step = left // 2 // per_query
        # For what survives, and for rows that the definition scores.
        self.answer_bytes, self.definition_bytes = left * 3 // 8, left // 8
        self.row_sums: Tensor | None = None
        if self.step and metric.name == "jensenshannon":
            self.row_sums = self._largest_of_groups(magnitude_sums(database, left))

    def _largest_of_groups(self, values: Tensor) -> Tensor:
        """Return the largest value of each group, ``(M,)``, of values ``(N,)`` of at least 0."""
        return torch.nn.functional.pad(values, (0, -values.numel() % GROUP)).view(-1, GROUP).amax(1)

    def queries_at_once(self, k: int, workspace_bytes: int) -> int:
        """Return how many queries fit the workspace."""
        return self.step

    def run(
        self, queries: Tensor, k: int, ranks: Tensor | None, selection: Selection, workspace_bytes: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores ``(Q, K)``, rows ``(Q, K)`` and bool ``(Q,)``, which queries are certified."""
        results = []
        for start, stop in even_cuts(queries.shape[0], self.step):
            part, seen = queries[start:stop].contiguous(), selection.narrowed(start, stop)
            results += self._answers(part, self._scan(part, seen), k, ranks, seen)
        scores, rows, certified = (torch.cat(each) for each in zip(*results, strict=True))
        return scores, rows, certified

    def _answers(
        self,
        queries: Tensor,
        bounds: _Bounds,
        k: int,
        ranks: Tensor | None,
        selection: Selection,
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return what `run` does, for as many queries at a time as fit."""
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
            answers += self._answers(part, bounds.part(start, stop), k, ranks, seen)
        return answers

    def _answer(
        self,
        queries: Tensor,
        bounds: _Bounds,
        k: int,
        ranks: Tensor | None,
        selection: Selection,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return scores, rows and which queries are certified; None where that takes too much memory."""
        n_queries = queries.shape[0]
        upper, offsets = bounds.upper, bounds.offsets
        best = upper >= kth_largest_triton(upper, self.n_best)[:, None]
        certified = bounds.certified & (best.sum(1) <= self.most_groups)
        best &= certified[:, None]
        # A table has room for the longest list in every row.
        if n_queries * max(int(best.sum(1).max()), -(-k // GROUP)) * _GROUP_BYTES > self.answer_bytes:
            return None
        owners, groups, scores = self._score(queries, best, selection)
        # The k-th best score of these, if there are k.
        table = table_of_pairs(owners, self._similarities(scores, offsets[owners]), n_queries, -(-k // GROUP))
        limit = threshold(bounds.rounding, table.flatten(1).topk(k, dim=1).values[:, -1])
        del table
        more = (upper >= limit[:, None]) & ~best
        certified = certified & (more.sum(1) <= self.most_groups)
        more &= certified[:, None]
        if (owners.numel() + int(more.sum())) * _GROUP_BYTES > self.answer_bytes:
            return None
        others = self._score(queries, more, selection)
        owners, groups, scores = (
            torch.cat(each) for each in zip((owners, groups, scores), others, strict=True)
        )
        del others, more, best
        similarities = self._similarities(scores, offsets[owners])
        # Minus infinity is no row.
        hits = (similarities >= limit[owners, None].double()) & (similarities > -torch.inf)
        del similarities
        most_hits = int(torch.zeros_like(offsets).index_add_(0, owners, hits.sum(1).double()).max())
        if n_queries * max(most_hits, k) * _HIT_BYTES > self.answer_bytes - owners.numel() * 10 * GROUP:
            return None
        pairs, members = hits.nonzero().unbind(1)
        owners, rows, scores = owners[pairs], groups[pairs] * GROUP + members, scores[pairs, members]
        del hits, pairs, members, groups
        error = self._error(queries, owners, scores)
        rounded = rounded_pair_scores(
            self.metric, queries, self.database, owners, rows, scores, error, self.definition_bytes
        )
        smallest = merge_keys_triton if k <= LARGEST_K else smallest_keys
        found = rank_pairs(self.metric, owners, rows, rounded, n_queries, k, ranks, smallest)
        return *found, certified

    def _scan(self, queries: Tensor, selection: Selection) -> _Bounds:
        """Bound the similarity of every group's rows."""
        mask = selection.visible()
        if self.plane is None:
            distances = distance_group_min_triton(
                queries.to(self.database.dtype), self.database, self.metric, group=GROUP, mask=mask
            )
            return self._distance_bounds(queries, distances)
        coded = code_queries(self.metric, queries, self.plane)
        width, (scales, factors) = group_terms(self.metric, coded, self.plane.terms)
        scale, bias = self.plane.terms[:, SCALE].contiguous(), self.plane.terms[:, BIAS].contiguous()
        upper = group_max_triton(
            coded.codes,
            self.plane.codes,
            scale,
            bias if self.metric.name == "l2" else None,
            width,
            None,
            1 / scales if self.metric.name == "l2" else None,
            factors / scales,
            None,
            group=GROUP,
            mask=mask,
        )
        # In the kernel a similarity is in units of the query's scale.
        hidden = upper <= NO_ROW / 2
        upper.mul_(scales[:, None]).add_(FLOOR).masked_fill_(hidden, -torch.inf)
        # What float64 scores may be off by counts like what rounding them to float32 loses.
        rounding = coded.rounding + self._lost(queries) / (8 * UNIT)
        return _Bounds(upper, rounding, coded.offsets, coded.usable)

    def _distance_bounds(self, queries: Tensor, distances: Tensor) -> _Bounds:
        sums = {}
        rounding = torch.zeros(queries.shape[0], dtype=torch.float64, device=queries.device)
        if self.row_sums is not None:
            sums["row_sums"] = self.row_sums
            sums["query_sums"] = queries.double().abs_().sum(1, keepdim=True)
            # Terms of both signs: what a float64 score may be off by does not shrink with the score.
            largest = sums["query_sums"][:, 0] + self.row_sums.max()
            rounding = largest * ((queries.shape[1] + 32) * 2.0**-24)
        bounds = distance_error_bound(self.metric, distances, queries.shape[1], **sums)
        # Rounded up, so that it stays a bound.
        upper = bounds.sub_(distances).float()
        del bounds
        upper = upper.nextafter(upper.new_full((), torch.inf)).masked_fill_(distances >= -NO_ROW, -torch.inf)
        bounded = in_range(queries) & (queries.to(self.database.dtype) == queries)
        unknown = upper.isnan()
        upper.masked_fill_(unknown, torch.inf)
        certified = bounded.all(1) & ~unknown.any(1)
        return _Bounds(upper, rounding, torch.zeros_like(rounding), certified)

    def _score(self, queries: Tensor, chosen: Tensor, selection: Selection) -> tuple[Tensor, Tensor, Tensor]:
        """Return owners ``(P,)``, groups ``(P,)`` and float64 scores ``(P, G)`` of chosen groups ``(Q, M)``.

        Rows that a query does not see, and those that do not exist, are NaN.
        """
        # Ordered by group: its rows are read once for all queries.
        groups, owners = chosen.t().nonzero().unbind(1)
        scores = rescore_triton(queries, self.database, owners, groups, GROUP, self.metric)
        if selection.mask is not None or selection.exclude is not None:
            rows = groups[:, None] * GROUP + torch.arange(GROUP, device=groups.device)
            rows = rows.clamp_max_(self.database.shape[0] - 1)
            own = owners[:, None].expand_as(rows)
            dropped = selection.drops(own.flatten(), rows.flatten()).view_as(rows)
            scores.masked_fill_(dropped, torch.nan)
        return owners, groups, scores

    def _similarities(self, scores: Tensor, offsets: Tensor) -> Tensor:
        """Return similarities ``(P, G)`` as `_scan` bounds them, minus infinity where a score is NaN."""
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
