"""Search in C++ of rows that are stored as codes and decoded where they are searched."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from elips_torch.core.hardware import device_facts
from elips_torch.core.metric import Metric
from elips_torch.core.native import native_threads
from elips_torch.kernels.coded_rows import CodeGrid, PackedRows
from elips_torch.kernels.definition import score_pairs
from elips_torch.kernels.knn_native import LEAST_INT8_DIM, NativeSearch
from elips_torch.kernels.plane import Plane
from elips_torch.kernels.screen_choice import LARGEST_INT8_DIM
from elips_torch.kernels.search_facts import ProbedLists
from elips_torch.kernels.search_native import (
    METRICS,
    PACKINGS,
    Grid,
    Packed,
    int8_products_are_right,
    library_reasons,
    native_terms,
)

# What the code unpacks at a time: so many bytes, or float32 rows where these take more.
_GRID_BYTES, _DECODED_BYTES, _UNPACKED_ROWS = 160 * 2**10, 32 * 2**10, 48
# Features of rows whose terms repay a second thread.
_WORTH_THREADS = 2**16


class PackedSearch(NativeSearch):
    """Search of rows that C++ decodes where it needs them.

    Args:
        packed: the rows as they are stored.
        decode: gives the vectors ``(M, D)`` of rows ``(M,)``, the same.
        dim: D.
        metric: "l2", "ip" or "cosine".
        k: number of neighbours.
        n_excluded: rows that are left out for each query, at most.
    """

    def __init__(
        self,
        packed: PackedRows,
        decode: Callable[[Tensor], Tensor],
        dim: int,
        metric: Metric,
        k: int,
        n_excluded: int,
    ) -> None:
        # Stands for vectors that are made where they are needed.
        nothing = torch.empty(0, dim, dtype=torch.float32, device="cpu")
        serves = grid_serves(dim)
        self.grid = packed.grid if serves else None
        self.has_plane = packed.plane is not None and serves
        if packed.plane is not None and serves:
            plane = packed.plane
        elif self.grid is None:
            plane = Plane(nothing, nothing[:, :4], torch.zeros(dim, dtype=torch.float32, device="cpu"))
        else:
            plane = Plane(nothing.to(torch.int8), nothing[:, :4], self.grid.mean)
        super().__init__(nothing, metric, plane, k, n_excluded)
        if self.grid is not None and self.grid.features is not None:
            # Tables of bytes; a thread makes one in float32, and turns the codes of 64 rows.
            parts, _, ksub = self.grid.features.shape
            self.query_bytes += parts * ksub
            self.thread_bytes += parts * (4 * (ksub + 1) + 64)
        self.n_rows = packed.codes.shape[0]
        if not self.has_plane:
            # Each thread unpacks a chunk of rows.
            unpacked_bytes = _DECODED_BYTES if self.grid is None else _GRID_BYTES
            self.thread_bytes += max(unpacked_bytes, _UNPACKED_ROWS * dim * 4)
        self.packed = packed.contiguous()
        self.decode = decode

    def shares_queries(self, n_queries: int, threads: int, lists: ProbedLists | None) -> bool:
        """Whether threads take queries of their own: not where each would decode every row."""
        return super().shares_queries(n_queries, threads, lists) if self.has_plane else threads == 1

    def _queries(self, queries: Tensor) -> dict[str, Any]:
        # On a grid, every row says by how much its bias may err.
        return super()._queries(queries) | ({} if self.grid is None else {"slack": 0.0})

    def _rows(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"packed": packed_facts(self.packed)}
        if self.has_plane:
            facts |= {"codes": self.plane.codes, "terms": self.plane.terms}
        if self.grid is not None:
            facts["grid"] = grid_facts(self.grid, self.packed.terms)
        return facts

    def pair_scores(self, queries: Tensor, owners: Tensor, rows: Tensor, workspace_bytes: int) -> Tensor:
        """Return the scores of pairs ``(P,)`` of query and row by the definition."""
        vectors = self.decode(rows)
        return score_pairs(
            self.metric, queries, vectors, owners, torch.arange(rows.numel(), device="cpu"), workspace_bytes
        )


def has_grids(dim: int, device: torch.device) -> bool:
    """Whether rows of so many features are to be searched on a grid: where int8 products are fast."""
    fits = LEAST_INT8_DIM <= dim <= LARGEST_INT8_DIM
    return fits and not library_reasons(device) and device_facts(device).vnni


def grid_serves(dim: int) -> bool:
    """Whether they can be, now that the code is compiled."""
    return has_grids(dim, torch.device("cpu")) and int8_products_are_right()


def fill_terms(
    metric: Metric,
    packed: PackedRows,  # with a grid
    rows: Tensor,  # (M,) int64
    places: Tensor,  # (M,) int64
    terms: Tensor,  # (S, 2) float32
) -> bool:
    """Write the terms of rows to their places; False where there was no memory for it."""
    grid = packed.grid
    assert grid is not None
    packed = packed.contiguous()
    return native_terms(
        packed=packed_facts(packed),
        grid=grid_facts(grid),
        mean=grid.mean,
        rows=rows,
        places=places,
        terms=terms,
        n=rows.shape[0],
        dim=grid.steps.shape[0],
        metric=METRICS[metric.name],
        n_threads=native_threads() if rows.shape[0] * grid.steps.shape[0] > _WORTH_THREADS else 1,
    )


def packed_facts(packed: PackedRows) -> Packed:
    """Return what the code is to know of rows that are contiguous."""
    table = packed.table
    parts, ksub = table.table.shape[:2] if table.kind == "parts" else (0, 0)
    return Packed(
        codes=packed.codes.data_ptr(),
        places=None if packed.places is None else packed.places.data_ptr(),
        slot_places=None if packed.slot_places is None else packed.slot_places.data_ptr(),
        table=table.table.data_ptr(),
        low=None if table.low is None else table.low.data_ptr(),
        centroids=None if packed.centroids is None else packed.centroids.data_ptr(),
        assignments=None if packed.assignments is None else packed.assignments.data_ptr(),
        packing=PACKINGS[table.kind, table.bits],
        code_size=packed.codes.shape[1],
        parts=parts,
        ksub=ksub,
    )


def grid_facts(grid: CodeGrid, terms: Tensor | None = None) -> Grid:
    """Return what the code is to know of a grid, and of the terms ``(S, 2)`` of rows on it."""
    return Grid(
        steps=grid.steps.data_ptr(),
        zero=grid.zero.data_ptr(),
        table=None if grid.table is None else grid.table.data_ptr(),
        scalars=None if grid.scalars is None else grid.scalars.data_ptr(),
        terms=None if terms is None else terms.data_ptr(),
        features=None if grid.features is None else grid.features.data_ptr(),
        residual=grid.residual,
        rounded=grid.rounded,
    )
