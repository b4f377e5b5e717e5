"""Search of inverted lists in C++: the first step of a search, which answers almost every query."""

import torch
from torch import Tensor

from elips_torch.core.metric import Metric
from elips_torch.kernels.knn_native import NativeSearch, native_serves
from elips_torch.kernels.list_layout import ListLayout, RowDecoder, StoredRows, list_parts
from elips_torch.kernels.packed_native import PackedSearch
from elips_torch.kernels.plane import plain_plane
from elips_torch.kernels.ranking import merge_ranked
from elips_torch.kernels.search_facts import ProbedLists
from elips_torch.kernels.search_native import library_compiles
from elips_torch.kernels.selection import Selection

# Share of the workspace for vectors that are decoded; the rest is for searching them.
_DECODED_SHARE = 0.5
# Bytes beside its features that a decoded row takes: its number, its slot and the terms of its bound, with
# temporaries; and what decoding takes per feature.
_ROW_BYTES, _FEATURE_BYTES = 80, 16


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
    if metric.form != "product" or decode.dtype == torch.float64:
        return None
    if isinstance(decode, StoredRows) and decode.plane is not None:
        n_places = layout.slots.shape[0] if decode.in_slots else None
        if not native_serves(decode.vectors, decode.plane, n_places):
            return None
        search = NativeSearch(decode.vectors, metric, decode.plane, k, n_excluded)
        return ScreenedLists(search, layout, decode.in_slots) if search.plan(1, workspace_bytes) else None
    if not library_compiles():
        return None
    packed = getattr(decode, "packed", None)
    if packed is not None:
        search = PackedSearch(packed, decode, decode.dim, metric, k, n_excluded)
        return ScreenedLists(search, layout) if search.plan(1, workspace_bytes) else None
    return DecodedLists(layout, decode, metric, k, n_excluded)


class ScreenedLists:
    """Screen the rows of the probed lists by a plane, and rescore what survives.

    Args:
        search: of all rows.
        layout: the rows of each list.
        in_slots: the plane lies in the order of the slots.
    """

    def __init__(self, search: NativeSearch, layout: ListLayout, in_slots: bool = False) -> None:
        self.search = search
        self.layout = layout
        self.in_slots = in_slots

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
        return self.search.run(queries, k, ranks, selection, workspace_bytes, self.lists(probes))


class DecodedLists:
    """Decode the rows of the probed lists, as many as fit the workspace at a time, and search these.

    Args:
        layout: the rows of each list.
        decode: gives the vectors of rows.
        metric: "l2", "ip" or "cosine".
        k: number of neighbours.
        n_excluded: rows that are left out for each query, at most.
    """

    def __init__(
        self, layout: ListLayout, decode: RowDecoder, metric: Metric, k: int, n_excluded: int
    ) -> None:
        self.layout = layout
        self.decode = decode
        self.metric = metric
        self.k = k
        self.n_excluded = n_excluded

    def queries_at_once(self, k: int, workspace_bytes: int) -> int:
        """Return how many queries share what is decoded for them."""
        return max(1, int(workspace_bytes * (1 - _DECODED_SHARE) / 4) // (32 * k + 64 * self.decode.dim))

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
        n_queries = queries.shape[0]
        scores = torch.full((n_queries, k), self.metric.worst, dtype=torch.float32, device="cpu")
        rows = torch.full((n_queries, k), -1, dtype=torch.int64, device="cpu")
        certified = torch.ones(n_queries, dtype=torch.bool, device="cpu")
        rest = int(workspace_bytes * (1 - _DECODED_SHARE) * 0.75)
        row_bytes = _FEATURE_BYTES * self.decode.dim + _ROW_BYTES
        step = max(1, int(workspace_bytes * _DECODED_SHARE) // row_bytes)
        for lists, part in list_parts(self.layout, probes, step):
            vectors = self.decode(part.slots).contiguous()
            plane = plain_plane(self.metric, vectors)
            search = None
            if plane is not None and native_serves(vectors, plane):
                search = NativeSearch(vectors, self.metric, plane, self.k, self.n_excluded, part.slots)
            if search is None:
                return scores, rows, certified.fill_(False)
            local = ListLayout(
                torch.arange(vectors.shape[0], device="cpu"), part.starts, part.sizes, part.places
            )
            number = torch.full((self.layout.nlist + 1,), -1, dtype=torch.int64, device="cpu")
            number[lists] = torch.arange(lists.numel(), device="cpu")
            # -1 is the last entry, which stays -1.
            own = ProbedLists(local, number[probes])
            more = search.run(queries, k, ranks, selection, rest, own)
            certified &= more[2]
            both = torch.cat([scores, more[0]], 1), torch.cat([rows, more[1]], 1)
            scores, rows = merge_ranked(self.metric, *both, k, ranks)
        return scores, rows, certified
