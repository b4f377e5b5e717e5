"""The scan of certified search in Triton: an upper bound of each score, one maximum per group.

With the database held as low-precision codes, the bound of row x for query q is

    scales[x] * <queries[q], codes[x]> + biases[x] * q_bias[q]
        + residuals[x] * q_residual[q] + norms[x] * q_norm[q]

and only the maximum of every ``group`` consecutive rows leaves the chip: the k rows with the best
scores lie in groups whose bound reaches the k-th best score, so nothing else is needed to find them.
Integer products are exact. The other terms are float32, added from left to right; each is rounded
at most five times (conversion, product and the additions that follow).
"""

import dataclasses
from typing import Any

import torch
import triton
from torch import Tensor

from elips_torch.kernels.group_max_configurations import (
    MEDIUM_QUERIES,
    SMALL_QUERIES,
    Blocks,
    large_blocks,
    medium_blocks,
    small_blocks,
    streams,
)
from elips_torch.kernels.group_max_kernels import (
    group_max_large_kernel,
    group_max_medium_kernel,
    group_max_small_kernel,
    group_max_stream_kernel,
)
from elips_torch.kernels.triton_language import (
    device_family,
    launch_options,
    launch_scope,
    resident_programs,
)

# Query blocks that share one block of the database while it is in the L2 cache.
SUPERTILE_QUERIES = 8
LARGEST_GROUP = 128
DTYPES = (torch.int8, torch.bfloat16, torch.float16, torch.float32)
# Rows are numbered in int32 on the device, up to the end of the last block.
_MOST_ROWS = 2**31 - 512


def group_max_triton(
    queries: Tensor,  # (Q, D)
    codes: Tensor,  # (N, D)
    scales: Tensor | None,  # (N,) or (M,) float32
    biases: Tensor | None,  # (N,) float32
    residuals: Tensor | None,  # (N,) or (M,) float32
    norms: Tensor | None,  # (N,) or (M,) float32
    q_bias: Tensor | None,  # (Q,) float32
    q_residual: Tensor | None,  # (Q,) float32
    q_norm: Tensor | None,  # (Q,) float32
    *,
    group: int,
    mask: Tensor | None = None,  # (N,) or (Q, N) bool
) -> Tensor:  # (Q, M) float32, M = ceil(N / group)
    """Return the largest upper bound of each group of consecutive rows.

    Args:
        queries: codes of the queries, int8, bfloat16, float16 or float32, as those of the rows.
        codes: codes of the rows; features are contiguous, rows may have any stride.
        scales: factor of the product, above 0: one per row, or one per group; None for 1.
        biases: see the formula above, always per row; None leaves the term out.
        residuals: per row, or per group like ``scales``; None leaves the term out.
        norms: as ``residuals``.
        q_bias: factor of the biases; None for 1.
        q_residual: given exactly if ``residuals`` are.
        q_norm: given exactly if ``norms`` are.
        group: rows per group, a power of two up to 128.
        mask: True keeps a row. One that is dropped counts as `LOWEST_BOUND`.

    Raises:
        ValueError: the arguments are outside what the kernels take.
    """
    n_queries, (n_rows, dim) = queries.shape[0], codes.shape
    _check(queries, codes, group)
    n_groups = -(-n_rows // group)
    maxima = torch.empty(n_queries, n_groups, dtype=torch.float32, device=codes.device)
    if maxima.numel() == 0:
        return maxima
    if mask is not None:
        mask = (mask if mask.stride(-1) == 1 else mask.contiguous()).view(torch.uint8)
    per_group = _per_group((scales, residuals, norms), n_rows, n_groups)
    scan = _Scan(queries, codes, scales, biases, residuals, norms, q_bias, q_residual, q_norm, mask, maxima)
    options = {"GROUP": group, "PAIR_MASK": mask is not None and mask.ndim == 2, "PER_GROUP": per_group}
    family = device_family(codes.device)
    with launch_scope(codes):
        if n_queries <= SMALL_QUERIES:
            scan.small(small_blocks(codes.dtype, n_queries, dim, group), options)
        elif n_queries <= MEDIUM_QUERIES[family]:
            scan.medium(medium_blocks(family, codes.dtype, n_queries, dim, group), options)
        else:
            blocks = large_blocks(family, codes.dtype, dim, group)
            # Whole blocks first: where none ends early, what belongs to rows is read in wide loads.
            whole = n_rows - n_rows % blocks.program_rows
            for start, stop in ((0, whole), (whole, n_rows)):
                if start < stop:
                    scan.rows(start, stop, options).large(blocks, options)
    return maxima


def _check(queries: Tensor, codes: Tensor, group: int) -> None:
    if codes.dtype not in DTYPES or queries.dtype != codes.dtype:
        raise ValueError(f"codes are {codes.dtype} and queries {queries.dtype}, expected one of {DTYPES}")
    if not 1 <= group <= LARGEST_GROUP or group & (group - 1):
        raise ValueError(f"group is {group}, expected a power of two up to {LARGEST_GROUP}")
    if codes.shape[0] > _MOST_ROWS:
        raise ValueError(f"codes has {codes.shape[0]} rows, expected at most {_MOST_ROWS}")
    if queries.stride(1) != 1 or codes.stride(1) != 1:
        raise ValueError("the features of queries and codes must be contiguous")


def _per_group(vectors: tuple[Tensor | None, ...], n_rows: int, n_groups: int) -> bool:
    lengths = {vector.shape[0] for vector in vectors if vector is not None}
    if not lengths <= {n_rows} and not lengths <= {n_groups}:
        raise ValueError(
            f"scales, residuals and norms have lengths {sorted(lengths)}, "
            f"expected {n_rows}, one per row, or {n_groups}, one per group, of all"
        )
    return lengths <= {n_groups}


@dataclasses.dataclass(frozen=True)
class _Scan:
    """The tensors of one scan, in the order of the kernels' arguments."""

    queries: Tensor
    codes: Tensor
    scales: Tensor | None
    biases: Tensor | None
    residuals: Tensor | None
    norms: Tensor | None
    q_bias: Tensor | None
    q_residual: Tensor | None
    q_norm: Tensor | None
    mask: Tensor | None
    maxima: Tensor

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Q, N, D, M."""
        return self.queries.shape[0], *self.codes.shape, self.maxima.shape[1]

    @property
    def strides(self) -> tuple[int, ...]:
        mask_stride = self.mask.stride(0) if self.mask is not None and self.mask.ndim == 2 else 0
        return self.queries.stride(0), self.codes.stride(0), mask_stride, self.maxima.stride(0)

    def rows(self, start: int, stop: int, options: dict[str, Any]) -> "_Scan":
        """Return the scan of some rows; they start with a group."""
        row, of_group = slice(start, stop), slice(start // options["GROUP"], -(-stop // options["GROUP"]))
        part = of_group if options["PER_GROUP"] else row

        def cut(vector: Tensor | None, which: slice) -> Tensor | None:
            return None if vector is None else vector[..., which]

        return dataclasses.replace(
            self,
            codes=self.codes[row],
            scales=cut(self.scales, part),
            biases=cut(self.biases, row),
            residuals=cut(self.residuals, part),
            norms=cut(self.norms, part),
            mask=cut(self.mask, row),
            maxima=self.maxima[:, of_group],
        )

    def small(self, blocks: Blocks, options: dict[str, Any]) -> None:
        n_queries, n_rows, dim, n_groups = self.sizes
        group_max_small_kernel[(triton.cdiv(n_rows, blocks.rows),)](
            *(*self.tensors, n_rows, dim, n_groups, *self.strides),
            TWO=n_queries == 2,
            BLOCK_ROWS=blocks.rows,
            BLOCK_FEATURES=blocks.features,
            EVEN=dim % blocks.features == 0,
            **options,
            **launch_options(blocks.warps),
        )

    def medium(self, blocks: Blocks, options: dict[str, Any]) -> None:
        n_queries, n_rows, dim, n_groups = self.sizes
        n_blocks = triton.cdiv(n_rows, blocks.rows)
        constants = {
            "BLOCK_QUERIES": blocks.queries,
            "BLOCK_ROWS": blocks.rows,
            "BLOCK_FEATURES": blocks.features,
            "EVEN": dim % blocks.features == 0,
        }
        if streams(device_family(self.codes.device), blocks, n_queries, dim):
            programs = min(n_blocks, resident_programs(self.codes.device, 2))
            group_max_stream_kernel[(programs,)](
                *(*self.tensors, n_queries, n_rows, dim, n_groups, n_blocks, *self.strides),
                STAGES=blocks.stages,
                **constants,
                **options,
                **launch_options(blocks.warps),
            )
            return
        group_max_medium_kernel[(n_blocks, triton.cdiv(n_queries, blocks.queries))](
            *(*self.tensors, n_queries, n_rows, dim, n_groups, *self.strides),
            **constants,
            **options,
            **launch_options(blocks.warps, blocks.stages),
        )

    def large(self, blocks: Blocks, options: dict[str, Any]) -> None:
        n_queries, n_rows, dim, n_groups = self.sizes
        programs = triton.cdiv(n_queries, blocks.queries) * triton.cdiv(n_rows, blocks.program_rows)
        group_max_large_kernel[(programs,)](
            *(*self.tensors, n_queries, n_rows, dim, n_groups, *self.strides),
            BLOCK_QUERIES=blocks.queries,
            BLOCK_ROWS=blocks.rows,
            BLOCK_FEATURES=blocks.features,
            EVEN=dim % blocks.features == 0,
            EVEN_ROWS=n_rows % blocks.program_rows == 0,
            WIDE=blocks.wide,
            SUPERTILE=SUPERTILE_QUERIES,
            **options,
            **launch_options(blocks.warps, blocks.stages),
        )
