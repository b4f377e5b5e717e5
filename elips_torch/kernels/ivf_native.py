"""Search of inverted lists in C++: the first step of a search, which answers almost every query."""

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from elips_torch.core.metric import Metric
from elips_torch.kernels.distance_native import DifferenceSearch, distance_first
from elips_torch.kernels.ivf_decoded import DecodedLists
from elips_torch.kernels.ivf_search_eager import Step
from elips_torch.kernels.knn_native import NativeSearch, native_serves
from elips_torch.kernels.list_layout import ListLayout, RowDecoder, StoredRows
from elips_torch.kernels.packed_native import PackedSearch
from elips_torch.kernels.plane import plain_plane
from elips_torch.kernels.search_facts import ProbedLists
from elips_torch.kernels.search_native import library_compiles
from elips_torch.kernels.selection import Selection

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
        n_places = layout.slots.shape[0] if decode.in_slots else None
        if not native_serves(decode.vectors, decode.plane, n_places):
            if decode.plane.step is None:
                return None
            return _distance_lists(layout, decode, metric, k, n_excluded, workspace_bytes)
        kind, otherwise = NativeSearch, None
        if decode.plane.step is not None:
            # Rows that are much longer than most, or many near ties, may leave codes nothing to say.
            kind = DifferenceSearch
            otherwise = functools.partial(
                distance_first, decode.vectors, metric, k, n_excluded, workspace_bytes
            )
        search = kind(decode.vectors, metric, decode.plane, k, n_excluded)
        if not search.plan(1, workspace_bytes):
            return None
        return ScreenedLists(search, layout, decode.in_slots, otherwise)
    if metric.form != "product":
        return _distance_lists(layout, decode, metric, k, n_excluded, workspace_bytes)
    if not library_compiles():
        return None
    packed = getattr(decode, "packed", None)
    if packed is not None:
        search = PackedSearch(packed, decode, decode.dim, metric, k, n_excluded)
        return ScreenedLists(search, layout, search.has_plane) if search.plan(1, workspace_bytes) else None

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
        otherwise: makes the search of queries that this one does not certify; it reads no codes. None where
            there is none.
    """

    def __init__(
        self,
        search: NativeSearch,
        layout: ListLayout,
        in_slots: bool = False,
        otherwise: Callable[[], NativeSearch | None] | None = None,
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
        if second is not None:
            left = (~certified).nonzero()[:, 0]
            chosen, lists = selection.for_queries(left), ProbedLists(self.layout, probes[left])
            scores[left], rows[left], certified[left] = second.run(
                queries[left], k, ranks, chosen, workspace_bytes, lists
            )
        return scores, rows, certified
