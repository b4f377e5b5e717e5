"""Search of inverted lists in C++: the first step of a search, which answers almost every query."""

import dataclasses
import functools
from collections.abc import Callable, MutableMapping

import torch
from torch import Tensor

from elips_torch.core.metric import Metric
from elips_torch.core.tiling import spans
from elips_torch.kernels.distance_native import DifferenceSearch, distance_first
from elips_torch.kernels.ivf_decoded import DecodedLists
from elips_torch.kernels.ivf_search_eager import Step
from elips_torch.kernels.knn_native import NativeSearch, native_serves
from elips_torch.kernels.list_layout import ListLayout, RowDecoder, StoredRows
from elips_torch.kernels.packed_native import PackedSearch
from elips_torch.kernels.plane import Plane, plain_plane
from elips_torch.kernels.search_facts import ProbedLists
from elips_torch.kernels.search_native import library_compiles
from elips_torch.kernels.selection import Selection

# Where it is a distance that is summed, its float32 sums are as close as their size allows.
_DISTANCES = ("l2", "l1", "gower")
# Bytes beside its features that a decoded row takes: its number, its slot and the terms of its bound, with
# temporaries.
_ROW_BYTES = 80


def native_lists(
    layout: ListLayout,
    decode: RowDecoder,
    metric: Metric,
    k: int,
    n_probes: int,
    n_excluded: int,
    workspace_bytes: int,
) -> "ScreenedLists | DecodedLists | None":
    """Return a search of lists in C++, or None where it cannot serve."""
    if decode.dtype == torch.float64:
        return None
    if isinstance(decode, StoredRows) and decode.plane is not None:
        plane = decode.plane
        # Where codes have nothing to say: of rows that are much longer than most, or many near ties.
        otherwise = functools.partial(_distance_lists, layout, decode, metric, k, n_excluded, workspace_bytes)
        if not native_serves(decode.vectors, plane, layout.slots.shape[0] if decode.in_slots else None):
            return None if plane.step is None else otherwise()
        kind = NativeSearch if plane.step is None else DifferenceSearch
        search = kind(decode.vectors, metric, plane, k, n_excluded)
        if not search.plan(1, workspace_bytes):
            return None
        # Products would have to copy the vectors first: scoring near ties is mostly faster.
        search.is_hasty = metric.name in _DISTANCES
        return ScreenedLists(search, layout, decode.in_slots, otherwise if search.is_hasty else None)
    if metric.form != "product":
        return _distance_lists(layout, decode, metric, k, n_excluded, workspace_bytes)
    if not library_compiles():
        return None
    packed = getattr(decode, "packed", None)
    if packed is not None:
        search = PackedSearch(packed, decode, decode.dim, metric, k, n_excluded)
        return ScreenedLists(search, layout, search.has_plane) if search.plan(1, workspace_bytes) else None
    return _decoded_lists(layout, decode, metric, k, n_excluded, workspace_bytes)


def vector_lists(
    layout: ListLayout,
    vectors: Tensor,  # (N, D)
    metric: Metric,
    k: int,
    workspace_bytes: int,
    shared: MutableMapping[str, Plane],
) -> "ScreenedLists | None":
    """Return a search of lists by the vectors as they are stored, or None where it cannot serve.

    What it makes of all vectors, 16 bytes of each, it puts into or takes from what searches share.
    """
    if metric.name in _DISTANCES:
        search: NativeSearch | None = distance_first(vectors, metric, k, 0, workspace_bytes)
        return None if search is None else ScreenedLists(search, layout)
    if vectors.dtype != torch.float32:
        # There is no product of these.
        return None
    plane = shared.get("plain")
    if plane is None:
        plane = plain_plane(metric, vectors)
        if plane is None:
            return None
        shared["plain"] = plane
    if not native_serves(vectors, plane):
        return None
    search = NativeSearch(vectors, metric, plane, k, 0)
    return ScreenedLists(search, layout) if search.plan(1, workspace_bytes) else None


def _decoded_lists(
    layout: ListLayout, decode: RowDecoder, metric: Metric, k: int, n_excluded: int, workspace_bytes: int
) -> DecodedLists:
    """Return a search of lists by products in float32, of copies of the vectors that lie together."""

    def search_part(part: ListLayout, workspace_bytes: int) -> Step | None:
        vectors = decode(part.slots).contiguous()
        plane = plain_plane(metric, vectors)
        if plane is None or not native_serves(vectors, plane):
            return None
        search = NativeSearch(vectors, metric, plane, k, n_excluded, part.slots)
        return ScreenedLists(search, _renumbered(part))

    return DecodedLists(layout, decode, metric, _ROW_BYTES, search_part)


def _distance_lists(
    layout: ListLayout, decode: RowDecoder, metric: Metric, k: int, n_excluded: int, workspace_bytes: int
) -> "ScreenedLists | DecodedLists | None":
    """Return a search of lists by distances, of vectors as they are stored or decoded."""
    if isinstance(decode, StoredRows):
        search = distance_first(decode.vectors, metric, k, n_excluded, workspace_bytes)
        return None if search is None else ScreenedLists(search, layout)

    def search_part(part: ListLayout, workspace_bytes: int) -> Step | None:
        vectors = decode(part.slots).contiguous()
        search = distance_first(vectors, metric, k, n_excluded, workspace_bytes, part.slots)
        return None if search is None else ScreenedLists(search, _renumbered(part))

    return DecodedLists(layout, decode, metric, _ROW_BYTES, search_part) if library_compiles() else None


def _renumbered(part: ListLayout) -> ListLayout:
    """Return the layout of rows that have been decoded in the order of the slots."""
    return dataclasses.replace(part, slots=torch.arange(part.slots.shape[0], device="cpu"))


class ScreenedLists:
    """Screen the rows of the probed lists by a plane, and rescore what survives.

    Args:
        search: of all rows.
        layout: the rows of each list.
        in_slots: the plane lies in the order of the slots.
        otherwise: makes the search of queries that this one does not certify, by distances of the vectors
            themselves; None where there is none.
    """

    def __init__(
        self,
        search: NativeSearch,
        layout: ListLayout,
        in_slots: bool = False,
        otherwise: Callable[[], Step | None] | None = None,
    ) -> None:
        self.search = search
        self.layout = layout
        self.in_slots = in_slots
        self.otherwise = otherwise

    def lists(self, probes: Tensor) -> ProbedLists:
        """Return the lists ``(Q, P)`` of queries as the code is told of them."""
        return ProbedLists(self.layout, probes, self.in_slots)

    def queries_at_once(self, k: int, workspace_bytes: int) -> int:
        """Return how many queries `run` takes; it splits them itself."""
        return self.search.queries_at_once(k, workspace_bytes)

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
        lists = self.lists(probes)
        scores, rows, certified = self.search.run(queries, k, ranks, selection, workspace_bytes, lists)
        if self.otherwise is None or bool(certified.all()):
            return scores, rows, certified
        second = self.otherwise()
        left = (~certified).nonzero()[:, 0]
        if second is None:
            return scores, rows, certified
        for start, stop in spans(left.numel(), second.queries_at_once(k, workspace_bytes)):
            part = left[start:stop]
            scores[part], rows[part], certified[part] = second.run(
                queries[part], probes[part], k, ranks, selection.for_queries(part), workspace_bytes
            )
        return scores, rows, certified
