"""Exact search in C++ by distances of the vectors as they are stored, for metrics that are no products.

What products of codes are to the others, distances in float32 are here: bounded where they are computed,
so that only rows that may matter are kept, and scored by the definition. See `native/distance_scan.h`.
"""

from typing import Any

import torch
from torch import Tensor

from elips_torch.core.metric import Metric
from elips_torch.kernels.difference_plane import lost_share
from elips_torch.kernels.distance_bounds import error_share
from elips_torch.kernels.knn_native import (
    NativeSearch,
    leaves_rows_out,
    native_first,
    native_or_eager,
    native_serves,
)
from elips_torch.kernels.knn_screened import ScreenedSearch
from elips_torch.kernels.plane import LARGEST_NORM, Plane
from elips_torch.kernels.search_native import SOURCE_TYPES

# Bounds that say less than this about a distance would keep too many rows.
_MOST_ERROR = 0.01
# Bytes that a thread takes for rows that are not float32: so many, or rows where these take more. Of codes in
# two bytes a chunk has that many features, or 48 rows, a multiple of those of every tile.
_CONVERTED_BYTES, _CONVERTED_ROWS, _CONVERTED_CODES = 96 * 2**10, 16, 48


def has_distances(metric: Metric, is_plain: bool) -> bool:
    """Whether distances are computed under a metric, where there is nothing but the vectors if ``is_plain``.

    >>> from elips_torch.core.metric import resolve_metric
    >>> has_distances(resolve_metric("l1"), False), has_distances(resolve_metric("l2"), False)
    (True, False)
    """
    return metric.form != "product" or (is_plain and metric.name == "l2")


def product_or_distance(
    database: Tensor, metric: Metric, plane: Plane | None, k: int, n_excluded: int, workspace_bytes: int
) -> "NativeSearch | None":
    """Return a search in C++ by a plane, or by distances where there is none; None where neither serves."""
    if not has_distances(metric, plane is None):
        return native_first(database, metric, plane, k, n_excluded, workspace_bytes)
    if not leaves_rows_out(database.shape[0], k):
        return None
    return distance_first(database, metric, k, n_excluded, workspace_bytes)


def product_or_distance_or_eager(
    database: Tensor, metric: Metric, plane: Plane | None, k: int, n_excluded: int, workspace_bytes: int
) -> "NativeSearch | ScreenedSearch | None":
    """Return the same; a screen in torch where sizes or the compiler are in the way of products."""
    if not has_distances(metric, plane is None):
        return native_or_eager(database, metric, plane, k, n_excluded, workspace_bytes)
    return product_or_distance(database, metric, plane, k, n_excluded, workspace_bytes)


def distance_first(
    database: Tensor,  # (N, D)
    metric: Metric,
    k: int,
    n_excluded: int,
    workspace_bytes: int,
    names: Tensor | None = None,  # (N,) int64
) -> "DistanceSearch | None":
    """Return a search in C++ by distances, or None where it cannot serve.

    ``names`` as for `NativeSearch`.
    """
    if error_share(metric, database.shape[1]) > _MOST_ERROR:
        return None
    search = DistanceSearch(database, metric, k, n_excluded, names)
    serves = search.plan(1, workspace_bytes) is not None and native_serves(database, search.plane, 0)
    return search if serves else None


class DistanceSearch(NativeSearch):
    """Bound the distances of all rows, and rescore what survives.

    Args:
        database: ``(N, D)`` float32, float16 or bfloat16, contiguous, on a CPU.
        metric: one that is no product, or "l2".
        k: number of neighbours.
        n_excluded: rows that are left out for each query, at most.
        names: as for `NativeSearch`.
    """

    def __init__(
        self, database: Tensor, metric: Metric, k: int, n_excluded: int, names: Tensor | None = None
    ) -> None:
        dim = database.shape[1]
        # Nothing is coded.
        nothing = torch.empty(0, dim, dtype=torch.float32, device="cpu")
        terms = torch.empty(0, 4, dtype=torch.float32, device="cpu")
        plane = Plane(nothing, terms, torch.zeros(0, dtype=torch.float32, device="cpu"))
        super().__init__(database, metric, plane, k, n_excluded, names)
        self.thread_bytes += max(_CONVERTED_BYTES, _CONVERTED_ROWS * 4 * dim)

    def _queries(self, queries: Tensor) -> dict[str, Any]:
        return {
            "source": queries.resolve_neg().contiguous(),
            "source_type": SOURCE_TYPES[queries.dtype],
            "rounded": error_share(self.metric, self.dim),
            "power": self.metric.p,
        }

    def _rows(self) -> dict[str, Any]:
        facts = super()._rows()
        del facts["codes"], facts["terms"]
        return facts


class DifferenceSearch(NativeSearch):
    """Screen by codes whose differences are summed, and rescore what survives.

    Args:
        database: ``(N, D)`` float32, float16 or bfloat16, contiguous, on a CPU.
        metric: "l1" or "gower".
        plane: one that has a step.
        k: number of neighbours.
        n_excluded: rows that are left out for each query, at most.
    """

    def __init__(self, database: Tensor, metric: Metric, plane: Plane, k: int, n_excluded: int) -> None:
        super().__init__(database, metric, plane, k, n_excluded)
        if plane.kind == "bf16":
            self.thread_bytes += max(2 * _CONVERTED_BYTES, _CONVERTED_CODES * 4 * self.dim)

    def _queries(self, queries: Tensor) -> dict[str, Any]:
        return {
            "source": queries.resolve_neg().contiguous(),
            "source_type": SOURCE_TYPES[queries.dtype],
            "mean": self.plane.mean,
            "rounded": lost_share(self.plane.kind, self.dim),
            "largest": LARGEST_NORM / self.dim,
            "step": self.plane.step,
        }
