"""Search in C++ of rows that are stored as codes and decoded where they are searched."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from elips_torch.core.metric import Metric
from elips_torch.kernels.coded_rows import PackedRows
from elips_torch.kernels.definition import score_pairs
from elips_torch.kernels.knn_native import NativeSearch
from elips_torch.kernels.plane import Plane
from elips_torch.kernels.search_facts import ProbedLists
from elips_torch.kernels.search_native import BYTES, NIBBLES, SCALAR, Packed

# What the code unpacks at a time: so many bytes, or rows where these take more.
_UNPACKED_BYTES, _UNPACKED_ROWS = 768 * 2**10, 48


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
        plane = Plane(nothing, nothing[:, :4], torch.zeros(dim, dtype=torch.float32, device="cpu"))
        super().__init__(nothing, metric, plane, k, n_excluded)
        self.n_rows = packed.codes.shape[0]
        # Each thread unpacks a chunk of rows.
        self.thread_bytes += max(_UNPACKED_BYTES, _UNPACKED_ROWS * dim * 4)
        self.packed = packed.contiguous()
        self.decode = decode

    def shares_queries(self, n_queries: int, threads: int, lists: ProbedLists | None) -> bool:
        """Whether threads take queries of their own: no, or each would decode every row."""
        return threads == 1

    def _rows(self) -> dict[str, Any]:
        packed, table = self.packed, self.packed.table
        is_scalar = table.low is not None
        facts = Packed(
            codes=packed.codes.data_ptr(),
            table=table.table.data_ptr(),
            low=table.low.data_ptr() if table.low is not None else None,
            centroids=None if packed.centroids is None else packed.centroids.data_ptr(),
            assignments=None if packed.assignments is None else packed.assignments.data_ptr(),
            packing=SCALAR if is_scalar else BYTES if table.bits == 8 else NIBBLES,
            code_size=packed.codes.shape[1],
            parts=0 if is_scalar else table.table.shape[0],
            ksub=0 if is_scalar else table.table.shape[1],
        )
        return {"packed": facts}

    def _scores(self, queries: Tensor, owners: Tensor, rows: Tensor, workspace_bytes: int) -> Tensor:
        vectors = self.decode(rows)
        return score_pairs(
            self.metric, queries, vectors, owners, torch.arange(rows.numel(), device="cpu"), workspace_bytes
        )
