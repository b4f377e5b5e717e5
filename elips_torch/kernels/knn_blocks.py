"""Screened search of a database that has no plane yet: one is made block by block, and dropped."""

from collections.abc import Callable

import torch
from torch import Tensor

from elips_torch.core.metric import Metric
from elips_torch.core.ordering import EMPTY_KEY, order_keys
from elips_torch.core.tiling import spans
from elips_torch.kernels.plane import CODE_DTYPES, make_plane
from elips_torch.kernels.selection import Selection

# Share of the workspace for the plane of a block; the rest is for searching it.
_PLANE_SHARE = 0.5
# Bytes of a plane's terms, and of what encoding takes, per row.
_ROW_BYTES = 48


def rows_at_once(dim: int, kind: str, workspace_bytes: int) -> int:
    """Return how many rows' plane fits the workspace."""
    row_bytes = dim * CODE_DTYPES[kind].itemsize + _ROW_BYTES
    return max(1, int(workspace_bytes * _PLANE_SHARE) // row_bytes)


def knn_blocks(
    run: Callable[..., tuple[Tensor, Tensor]],
    kind: str,
    queries: Tensor,  # (Q, D)
    database: Tensor,  # (N, D)
    k: int,
    metric: Metric,
    ranks: Tensor | None,  # (N,) int64
    selection: Selection,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:  # (Q, K) float32, (Q, K) int64
    """Search block by block with a plane of each, and merge.

    Takes an implementation of "knn", the kind of plane, "int8" or "bf16", and what the implementation
    takes.
    """
    rest = workspace_bytes - int(workspace_bytes * _PLANE_SHARE)
    found: tuple[Tensor, Tensor] | None = None
    for start, stop in spans(database.shape[0], rows_at_once(database.shape[1], kind, workspace_bytes)):
        block = database[start:stop]
        scores, rows = run(
            queries,
            block,
            k,
            metric,
            None if ranks is None else ranks[start:stop].argsort().argsort(),
            selection.for_rows(start, stop),
            rest,
            make_plane(metric, block, kind),
        )
        rows = torch.where(rows < 0, rows, rows + start)
        found = (scores, rows) if found is None else merge_results(found, (scores, rows), metric, ranks)
    if found is None:
        return run(queries, database, k, metric, ranks, selection, workspace_bytes, None)
    return found


def merge_results(
    old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], metric: Metric, ranks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the best of two results, each scores and rows ``(Q, K)``, by score and then by rank."""
    scores, rows = (torch.cat(each, dim=1) for each in zip(old, new, strict=True))
    place = rows if ranks is None else ranks[rows.clamp_min(0)]
    keys = order_keys(scores, place.clamp_min(0), metric.higher_is_better)
    keys = keys.masked_fill_(rows < 0, EMPTY_KEY)
    best = keys.topk(old[0].shape[1], dim=1, largest=False).indices
    return scores.gather(1, best), rows.gather(1, best)
