"""Search of lists whose rows are decoded, as many as fit the workspace at a time, for a search of vectors."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from elips_torch.core.metric import Metric
from elips_torch.kernels.ivf_search_eager import Step
from elips_torch.kernels.list_layout import ListLayout, RowDecoder, list_parts
from elips_torch.kernels.ranking import merge_ranked
from elips_torch.kernels.selection import Selection

# Share of the workspace for vectors that are decoded; the rest is for searching them.
_DECODED_SHARE = 0.5
# Bytes that decoding takes per feature, temporaries included.
_FEATURE_BYTES = 16

# Decodes the rows of a part, whose slots hold their numbers, and makes a search of its lists, which are
# numbered from 0, within a workspace; None where it cannot serve.
SearchPart: TypeAlias = Callable[[ListLayout, int], Step | None]


class DecodedLists:
    """Decode the rows of the probed lists, as many as fit the workspace at a time, and search these.

    Args:
        layout: the rows of each list.
        decode: gives the vectors of rows.
        metric: "l2", "ip" or "cosine".
        row_bytes: what a decoded row takes beside its features.
        search_part: makes the search of a part.
    """

    def __init__(
        self,
        layout: ListLayout,
        decode: RowDecoder,
        metric: Metric,
        row_bytes: int,
        search_part: SearchPart,
    ) -> None:
        self.layout = layout
        self.dim = decode.dim
        self.metric = metric
        self.row_bytes = row_bytes + _FEATURE_BYTES * decode.dim
        self.search_part = search_part

    def queries_at_once(self, k: int, workspace_bytes: int) -> int:
        """Return how many queries share what is decoded for them."""
        return max(1, int(workspace_bytes * (1 - _DECODED_SHARE) / 4) // (32 * k + 64 * self.dim))

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
        scores, rows, certified = nothing_found(self.metric, queries, k)
        rest = int(workspace_bytes * (1 - _DECODED_SHARE) * 0.75)
        step = max(1, int(workspace_bytes * _DECODED_SHARE) // self.row_bytes)
        for lists, part in list_parts(self.layout, probes, step):
            search = self.search_part(part, rest)
            if search is None:
                return scores, rows, certified.fill_(False)
            number = torch.full((self.layout.nlist + 1,), -1, dtype=torch.int64, device=probes.device)
            number[lists] = torch.arange(lists.numel(), device=probes.device)
            # -1 is the last entry, which stays -1.
            more = search.run(queries, number[probes], k, ranks, selection, rest)
            certified &= more[2]
            both = torch.cat([scores, more[0]], 1), torch.cat([rows, more[1]], 1)
            scores, rows = merge_ranked(self.metric, *both, k, ranks)
        return scores, rows, certified


def nothing_found(metric: Metric, queries: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `run` does for queries ``(Q, D)`` whose lists hold nothing, all certified."""
    scores = torch.full((queries.shape[0], k), metric.worst, dtype=torch.float32, device=queries.device)
    rows = torch.full_like(scores, -1, dtype=torch.int64)
    return scores, rows, torch.ones(queries.shape[0], dtype=torch.bool, device=queries.device)
