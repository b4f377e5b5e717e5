"""Exact k-nearest-neighbour search by Triton kernels, on CUDA and ROCm, for every metric.

1. Scan: an upper bound of each score, one maximum per group of rows (`group_max_triton`); the other
   metrics bound a distance from below (`distance_group_min_triton`).
2. Score every row of the k best groups by the definition: the k-th best score is a threshold.
3. Score every row of the other groups whose bound reaches it.
4. Sort by score and id (`merge_triton`).

Codes are those of a plane, or the vectors themselves. Where too many groups survive, a query is left
uncertified, for the next search to answer.
"""

import torch
from torch import Tensor

from elips_torch.core.metric import Metric
from elips_torch.core.tiling import even_cuts
from elips_torch.kernels.distance_bounds import distance_error_bound
from elips_torch.kernels.distance_group_min_triton import distance_group_min_triton
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
# Bytes per surviving group: float64 scores of its rows, twice, and their numbers.
_GROUP_BYTES = 32 * GROUP
# Bytes per query and group of rows: the bound and what is compared with it.
_BOUND_BYTES = 12
# `distance_error_bound` holds for features of such magnitudes.
_LEAST_FEATURE, _LARGEST_FEATURE = 2.0**-100, 2.0**100
# Metrics whose float64 scores are sums of terms of one sign, so that their error is relative.
_ONE_SIGN = ("l2", "l1", "linf", "canberra", "braycurtis", "gower")


def triton_search(
    database: Tensor, metric: Metric, plane: Plane | None, k: int, n_excluded: int, workspace_bytes: int
) -> "TritonSearch | None":
    """Return a search of the database, or None where its values cannot be bounded."""
    if metric.form == "product":
        plane = plain_plane(metric, database) if plane is None else plane
        if plane is None:
            return None
    elif not _bounded(database):
        return None
    search = TritonSearch(database, metric, plane, k + n_excluded, workspace_bytes)
    return search if search.step else None


def _bounded(vectors: Tensor) -> bool:
    """Whether `distance_error_bound` holds for the vectors."""
    size = vectors.abs()
    return bool(((size == 0) | ((size >= _LEAST_FEATURE) & (size <= _LARGEST_FEATURE))).all())


class TritonSearch:
    """Scan bounds of groups, score the rows of those that matter.

    Args:
        database: ``(N, D)`` float32, bfloat16 or float16.
        metric: any.
        plane: codes of the database, for the metrics with a product.
        n_neighbours: k and the number of rows that are excluded per query.
        workspace_bytes: limit on temporary memory, in bytes.
    """

    def __init__(
        self, database: Tensor, metric: Metric, plane: Plane | None, n_neighbours: int, workspace_bytes: int
    ) -> None:
        self.database = database if database.stride(1) == 1 else database.contiguous()
        self.metric = metric
        self.plane = plane
        self.n_groups = -(-database.shape[0] // GROUP)
        self.n_best = min(n_neighbours, self.n_groups)
        self.most_groups = max(_MOST_GROUPS, _GROUPS_PER_NEIGHBOUR * n_neighbours)
        per_query = _BOUND_BYTES * self.n_groups + _GROUP_BYTES * min(self.most_groups, self.n_groups)
        # Per row, the terms of its bound.
        left = workspace_bytes - 32 * database.shape[0]
        self.step = int(max(0, left) // per_query)

    def queries_at_once(self, k: int, workspace_bytes: int) -> int:
        """Return how many queries fit the workspace."""
        return self.step

    def run(
        self, queries: Tensor, k: int, ranks: Tensor | None, selection: Selection, workspace_bytes: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores ``(Q, K)``, rows ``(Q, K)`` and bool ``(Q,)``, which queries are certified."""
        results = [
            self._run(queries[start:stop], k, ranks, selection.narrowed(start, stop), workspace_bytes)
            for start, stop in even_cuts(queries.shape[0], self.step)
        ]
        scores, rows, certified = (torch.cat(each) for each in zip(*results, strict=True))
        return scores, rows, certified

    def _run(
        self, queries: Tensor, k: int, ranks: Tensor | None, selection: Selection, workspace_bytes: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        queries = queries.contiguous()
        n_queries = queries.shape[0]
        upper, rounding, offsets, certified = self._scan(queries, selection)
        best = upper >= kth_largest_triton(upper, self.n_best)[:, None]
        certified = certified & (best.sum(1) <= self.most_groups)
        owners, groups, scores = self._score(queries, best & certified[:, None], selection)
        # The k-th best score of these, if there are k.
        table = table_of_pairs(owners, self._similarities(scores, offsets[owners]), n_queries, -(-k // GROUP))
        limit = threshold(rounding, table.flatten(1).topk(k, dim=1).values[:, -1])
        more = (upper >= limit[:, None]) & ~best
        certified = certified & (more.sum(1) <= self.most_groups)
        others = self._score(queries, more & certified[:, None], selection)
        owners, groups, scores = (
            torch.cat(each) for each in zip((owners, groups, scores), others, strict=True)
        )
        similarities = self._similarities(scores, offsets[owners])
        pairs, members = (similarities >= limit[owners, None].double()).nonzero().unbind(1)
        owners, rows = owners[pairs], groups[pairs] * GROUP + members
        # Minus infinity is no row.
        owners, rows, scores = (
            each[similarities[pairs, members] > -torch.inf] for each in (owners, rows, scores[pairs, members])
        )
        error = self._error(queries, owners, scores)
        rounded = rounded_pair_scores(
            self.metric, queries, self.database, owners, rows, scores, error, workspace_bytes // 4
        )
        smallest = merge_keys_triton if k <= LARGEST_K else smallest_keys
        found = rank_pairs(self.metric, owners, rows, rounded, n_queries, k, ranks, smallest)
        return *found, certified

    def _scan(self, queries: Tensor, selection: Selection) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return bounds ``(Q, M)``, and of each query ``(Q,)`` rounding, offset and whether it is bounded."""
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
        upper = (upper * scales[:, None] + FLOOR).masked_fill_(hidden, -torch.inf)
        # What float64 scores may be off by counts like what rounding them to float32 loses.
        rounding = coded.rounding + self._lost(queries) / (8 * UNIT)
        return upper, rounding, coded.offsets, coded.usable

    def _distance_bounds(self, queries: Tensor, distances: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sums = {}
        rounding = torch.zeros(queries.shape[0], dtype=torch.float64, device=queries.device)
        if self.metric.name == "jensenshannon":
            rows = self.database.double().abs().sum(1)
            rows = torch.nn.functional.pad(rows, (0, self.n_groups * GROUP - rows.numel()))
            sums["row_sums"] = rows.view(-1, GROUP).amax(1)
            sums["query_sums"] = queries.double().abs().sum(1, keepdim=True)
            # Terms of both signs: what a float64 score may be off by does not shrink with the score.
            rounding = (sums["query_sums"][:, 0] + rows.max()) * ((queries.shape[1] + 32) * 2.0**-24)
        bounds = distance_error_bound(self.metric, distances, queries.shape[1], **sums)
        # Rounded up, so that it stays a bound.
        upper = (bounds - distances.double()).float().nextafter(torch.full_like(distances, torch.inf))
        upper = upper.masked_fill_(distances >= -NO_ROW, -torch.inf)
        size = queries.abs()
        bounded = (size == 0) | ((size >= _LEAST_FEATURE) & (size <= _LARGEST_FEATURE))
        bounded &= queries.to(self.database.dtype) == queries
        unknown = upper.isnan()
        upper.masked_fill_(unknown, torch.inf)
        return upper, rounding, torch.zeros_like(rounding), bounded.all(1) & ~unknown.any(1)

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
        return similarities.nan_to_num(-torch.inf, torch.inf, -torch.inf)

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
