"""Exact k-nearest-neighbour search by Triton kernels, on CUDA and ROCm, for every metric.

A scan bounds every score, one maximum per group of rows (`group_max_triton`); for the other metrics it
bounds a distance from below (`distance_group_min_triton`). `group_search_triton` scores what matters.

Codes are those of a plane, or the vectors themselves. Half of the workspace is for bounds, the other half
for what survives.
"""

from typing import ClassVar

import torch
from torch import Tensor

from elips_torch.core.metric import Metric
from elips_torch.core.tiling import even_cuts
from elips_torch.kernels.distance_bounds import distance_error_bound
from elips_torch.kernels.distance_group_min_triton import distance_group_min_triton
from elips_torch.kernels.feature_range import all_in_range, in_range, magnitude_sums
from elips_torch.kernels.group_max_triton import group_max_triton
from elips_torch.kernels.group_search_triton import GroupBounds, GroupSearch
from elips_torch.kernels.plane import Plane, plain_plane
from elips_torch.kernels.screen import code_queries
from elips_torch.kernels.screen_passes import NO_ROW
from elips_torch.kernels.selection import Selection

# Rows of a group.
GROUP = 32
# Bytes per row of the database: the terms of its bound.
_ROW_BYTES = 32
# Bytes per query and group of rows: the bound and what it is made of, in float64 for distances.
_PRODUCT_BYTES, _DISTANCE_BYTES = 16, 48
# Bytes per query: counts of digits; and per feature of it: float64 copies while it is coded.
_QUERY_BYTES, _FEATURE_BYTES = 4096, 64


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


class TritonSearch(GroupSearch):
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
        super().__init__(database, metric, plane, GROUP, n_neighbours)
        n_groups = -(-database.shape[0] // GROUP)
        bound_bytes = _DISTANCE_BYTES if plane is None else _PRODUCT_BYTES
        per_query = _QUERY_BYTES + _FEATURE_BYTES * database.shape[1] + 64 * n_neighbours
        per_query += bound_bytes * n_groups
        left = max(0, workspace_bytes - _ROW_BYTES * database.shape[0])
        self.step = left // 2 // per_query
        self.take_share(left)
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
            results += self.answers(part, self._scan(part, seen), k, ranks, seen)
        scores, rows, certified = (torch.cat(each) for each in zip(*results, strict=True))
        return scores, rows, certified

    def _scan(self, queries: Tensor, selection: Selection) -> GroupBounds:
        """Bound the similarity of every group's rows."""
        mask = selection.visible()
        if self.plane is None:
            distances = distance_group_min_triton(
                queries.to(self.database.dtype), self.database, self.metric, group=GROUP, mask=mask
            )
            return self._distance_bounds(queries, distances)
        coded = code_queries(self.metric, queries, self.plane)
        terms, scales = self.scan_terms(coded)
        maxima = group_max_triton(coded.codes, self.plane.codes, **terms, group=GROUP, mask=mask)
        return self.product_bounds(queries, coded, maxima, scales)

    def _distance_bounds(self, queries: Tensor, distances: Tensor) -> GroupBounds:
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
        return GroupBounds(upper, rounding, torch.zeros_like(rounding), certified)
