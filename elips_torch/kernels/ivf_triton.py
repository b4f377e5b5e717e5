"""Search of the inverted lists that each query probes by Triton kernels, on CUDA and ROCm.

`ivf_scan_triton` bounds groups of slots, list-major for many queries and query-major for few;
`group_search_triton` scores what matters. Lists begin where groups do, so that no group belongs to two.

Codes that lie in the order of the slots are scanned where they are. Of other rows those of the probed lists
are decoded, as many as fit the workspace at a time, and screen themselves.
"""

import torch
from torch import Tensor

from elips_torch.core.metric import Metric
from elips_torch.core.tiling import even_cuts
from elips_torch.kernels.group_search_triton import GroupBounds, GroupSearch
from elips_torch.kernels.ivf_decoded import DecodedLists, nothing_found
from elips_torch.kernels.ivf_scan_triton import ivf_scan_triton
from elips_torch.kernels.ivf_search_eager import Step
from elips_torch.kernels.list_layout import ListLayout, RowDecoder, StoredRows, concatenated_ranges
from elips_torch.kernels.plane import Plane, plain_plane
from elips_torch.kernels.screen import code_queries
from elips_torch.kernels.selection import Selection

# Slots of a group: lists begin at multiples of it.
GROUP = 16
# Bytes per slot: the terms of its bound.
_SLOT_BYTES = 32
# Bytes per query: counts of digits; per feature of it: float64 copies while it is coded; per probe: the pair
# of query and list, sorted; and per group of slots: the bound and what it is made of.
_QUERY_BYTES, _FEATURE_BYTES, _PROBE_BYTES, _GROUP_BYTES = 4096, 64, 160, 16
# Bytes beside its features that a decoded row takes: its number, its slot and the terms of its bound, with
# temporaries.
_ROW_BYTES = 120


def triton_lists(
    layout: ListLayout,
    decode: RowDecoder,
    metric: Metric,
    k: int,
    n_probes: int,
    n_excluded: int,
    workspace_bytes: int,
) -> "ScannedLists | DecodedLists | None":
    """Return a search of lists by kernels, or None where it cannot serve."""
    if metric.form != "product" or decode.dtype == torch.float64:
        return None
    if isinstance(decode, StoredRows) and decode.plane is not None and decode.in_slots:
        vectors, plane = decode.vectors, decode.plane
        if len(plane.codes) != layout.slots.shape[0] or vectors.stride(1) != 1:
            return None
        search = ScannedLists(vectors, metric, plane, layout, k + n_excluded, n_probes, workspace_bytes)
        return search if search.step else None

    def search_part(part: ListLayout, workspace_bytes: int) -> Step | None:
        local, names = _aligned(part)
        vectors = decode(names).contiguous()
        plane = plain_plane(metric, vectors)
        if plane is None:
            return None
        search = ScannedLists(vectors, metric, plane, local, k + n_excluded, n_probes, workspace_bytes, names)
        return search if search.step else None

    return DecodedLists(layout, decode, metric, _ROW_BYTES, search_part)


class ScannedLists(GroupSearch):
    """Scan the codes of the probed lists, score the rows of groups that matter.

    Args:
        database: ``(N, D)`` float32, bfloat16 or float16.
        metric: "l2", "ip" or "cosine".
        plane: codes of the rows, in the order of the slots.
        layout: the rows of each list.
        n_neighbours: k and the number of rows that are excluded per query.
        n_probes: P, lists of a query at most.
        workspace_bytes: limit on temporary memory, in bytes.
        names: ``(N,)`` int64, the number by which masks, ranks and results know each row; None where that is
            its own.
    """

    plane: Plane

    def __init__(
        self,
        database: Tensor,
        metric: Metric,
        plane: Plane,
        layout: ListLayout,
        n_neighbours: int,
        n_probes: int,
        workspace_bytes: int,
        names: Tensor | None = None,
    ) -> None:
        super().__init__(database, metric, plane, GROUP, n_neighbours, layout.slots, names)
        self.layout = layout
        longest = ((layout.sizes + GROUP - 1) // GROUP).topk(min(n_probes, layout.nlist)).values
        per_query = _QUERY_BYTES + _FEATURE_BYTES * database.shape[1] + 64 * n_neighbours
        per_query += _PROBE_BYTES * n_probes + _GROUP_BYTES * int(longest.sum())
        left = max(0, workspace_bytes - _SLOT_BYTES * layout.slots.shape[0])
        self.step = left // 2 // per_query
        self.take_share(left)

    def queries_at_once(self, k: int, workspace_bytes: int) -> int:
        """Return how many queries fit the workspace."""
        return self.step

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
        results = []
        for start, stop in even_cuts(queries.shape[0], self.step):
            part, seen = queries[start:stop].contiguous(), selection.narrowed(start, stop)
            bounds = self._scan(part, probes[start:stop].contiguous(), seen)
            if bounds.upper.shape[1]:
                results += self.answers(part, bounds, k, ranks, seen)
            else:
                results.append(nothing_found(self.metric, part, k))
        scores, rows, certified = (torch.cat(each) for each in zip(*results, strict=True))
        return scores, rows, certified

    def _scan(self, queries: Tensor, probes: Tensor, selection: Selection) -> GroupBounds:
        """Bound the similarity of every group's rows."""
        layout, mask = self.layout, selection.visible()
        coded = code_queries(self.metric, queries, self.plane)
        terms, scales = self.scan_terms(coded)
        names = layout.slots
        if mask is not None and self.names is not None:
            names = self.names[layout.slots.clamp_min(0)]
        found = ivf_scan_triton(
            coded.codes,
            probes,
            self.plane.codes,
            layout.starts,
            layout.sizes,
            **terms,
            group=GROUP,
            mask=mask,
            slots=None if mask is None else names,
        )
        return self.product_bounds(
            queries,
            coded,
            found.maxima,
            scales,
            columns=found.columns,
            first_groups=layout.starts[probes.clamp_min(0)] // GROUP,
        )


def _aligned(part: ListLayout) -> tuple[ListLayout, Tensor]:
    """Return the lists of a part with starts at multiples of a group, and the row to decode for each slot."""
    capacities = (part.sizes + GROUP - 1) // GROUP * GROUP
    ends = capacities.cumsum(0)
    starts = ends - capacities
    filled = concatenated_ranges(starts, part.sizes)
    own = torch.full((int(ends[-1]),), -1, dtype=torch.int64, device=part.slots.device)
    own[filled] = filled
    # Slots without rows decode some row, which nobody looks at.
    names = torch.zeros_like(own)
    names[filled] = part.slots
    return ListLayout(own, starts, part.sizes, own), names
