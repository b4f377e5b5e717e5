"""The scan of certified search in Triton: an upper bound of each score, one maximum per group.

With the database held as low-precision codes, the bound of row x for query q is

    scales[x] * <queries[q], codes[x]> + biases[x] * q_bias[q]
        + residuals[x] * q_residual[q] + norms[x] * q_norm[q]

and only the maximum of every ``group`` consecutive rows leaves the chip: the k rows with the best
scores lie in groups whose bound reaches the k-th best score, so nothing else is needed to find them.
Integer products are exact. The other terms are float32, added from left to right; each is rounded
at most five times (conversion, product and the additions that follow).
"""

# mypy: allow-untyped-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from elips_torch.kernels.group_max_configurations import (
    MEDIUM_QUERIES,
    SMALL_QUERIES,
    large_blocks,
    medium_blocks,
    small_blocks,
)
from elips_torch.kernels.triton_language import (
    LOWEST,
    device_family,
    dot,
    launch_scope,
    resident_programs,
    zeros_for,
)

# Query blocks that share one block of the database while it is in the L2 cache.
SUPERTILE_QUERIES = 8
LARGEST_GROUP = 128
DTYPES = (torch.int8, torch.bfloat16, torch.float16, torch.float32)
# Rows are numbered in int32 on the device, up to the end of the last block.
_MOST_ROWS = 2**31 - 512


@triton.jit
def upper_bounds(
    products,
    queries,
    rows,
    scales_ptr,
    biases_ptr,
    residuals_ptr,
    norms_ptr,
    q_bias_ptr,
    q_residual_ptr,
    q_norm_ptr,
    mask_ptr,
    mask_stride,
    PAIR_MASK: tl.constexpr,
):
    """Turn products into upper bounds; queries and rows are numbers that broadcast with them."""
    bounds = products.to(tl.float32)
    if scales_ptr is not None:
        bounds = bounds * tl.load(scales_ptr + rows)
    if biases_ptr is not None:
        bounds += tl.load(biases_ptr + rows) * tl.load(q_bias_ptr + queries)
    if residuals_ptr is not None:
        bounds += tl.load(residuals_ptr + rows) * tl.load(q_residual_ptr + queries)
    if norms_ptr is not None:
        bounds += tl.load(norms_ptr + rows) * tl.load(q_norm_ptr + queries)
    if mask_ptr is not None:
        if PAIR_MASK:
            keep = tl.load(mask_ptr + queries.to(tl.int64) * mask_stride + rows)
        else:
            keep = tl.load(mask_ptr + rows)
        bounds = tl.where(keep != 0, bounds, LOWEST)
    return bounds


@triton.jit
def group_max_small_kernel(
    queries_ptr,
    codes_ptr,
    scales_ptr,
    biases_ptr,
    residuals_ptr,
    norms_ptr,
    q_bias_ptr,
    q_residual_ptr,
    q_norm_ptr,
    mask_ptr,
    maxima_ptr,
    n_rows,
    dim,
    n_groups,
    query_stride,
    code_stride,
    mask_stride,
    TWO: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    PAIR_MASK: tl.constexpr,
):
    """One or two queries: every code is read once and multiplied in registers."""
    GROUPS: tl.constexpr = BLOCK_ROWS // GROUP
    row_block = tl.program_id(0)
    # Rows behind the end repeat the last row, which leaves the maximum of its group as it is.
    rows = tl.minimum(row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), n_rows - 1)
    features = tl.arange(0, BLOCK_FEATURES)
    code_ptrs = codes_ptr + rows.to(tl.int64)[:, None] * code_stride
    sums = zeros_for((BLOCK_ROWS, BLOCK_FEATURES), codes_ptr.dtype.element_ty)
    more = zeros_for((BLOCK_ROWS, BLOCK_FEATURES), codes_ptr.dtype.element_ty)
    for start in range(0, dim, BLOCK_FEATURES):
        feature = start + features
        if EVEN:
            codes = tl.load(code_ptrs + feature[None, :]).to(sums.dtype)
            query = tl.load(queries_ptr + feature).to(sums.dtype)
        else:
            inside = feature < dim
            codes = tl.load(code_ptrs + feature[None, :], mask=inside[None, :], other=0).to(sums.dtype)
            query = tl.load(queries_ptr + feature, mask=inside, other=0).to(sums.dtype)
        sums += codes * query[None, :]
        if TWO:
            if EVEN:
                query = tl.load(queries_ptr + query_stride + feature).to(sums.dtype)
            else:
                query = tl.load(queries_ptr + query_stride + feature, mask=inside, other=0).to(sums.dtype)
            more += codes * query[None, :]
    groups = row_block * GROUPS + tl.arange(0, GROUPS)
    for query_row in tl.static_range(2 if TWO else 1):
        products = tl.sum(sums if query_row == 0 else more, axis=1)
        bounds = upper_bounds(
            products,
            tl.full((1,), query_row, tl.int32),
            rows,
            scales_ptr,
            biases_ptr,
            residuals_ptr,
            norms_ptr,
            q_bias_ptr,
            q_residual_ptr,
            q_norm_ptr,
            mask_ptr,
            mask_stride,
            PAIR_MASK,
        )
        maxima = tl.max(tl.reshape(bounds, (GROUPS, GROUP)), axis=1)
        places = maxima_ptr + query_row * n_groups + groups
        tl.store(places, maxima, mask=groups < n_groups)


@triton.jit
def group_max_medium_kernel(
    queries_ptr,
    codes_ptr,
    scales_ptr,
    biases_ptr,
    residuals_ptr,
    norms_ptr,
    q_bias_ptr,
    q_residual_ptr,
    q_norm_ptr,
    mask_ptr,
    maxima_ptr,
    n_queries,
    n_rows,
    dim,
    n_groups,
    n_blocks,
    query_stride,
    code_stride,
    mask_stride,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    RESIDENT: tl.constexpr,
    STAGES: tl.constexpr,
    PAIR_MASK: tl.constexpr,
):
    """Few queries: database rows are the first axis of the product, so that tensor cores are filled.

    With all features in one block (``RESIDENT``) the queries stay in place while the database
    streams by.
    """
    GROUPS: tl.constexpr = BLOCK_ROWS // GROUP
    query = tl.program_id(1) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    # As for rows: queries behind the end repeat the last one and are not stored.
    real_query = tl.minimum(query, n_queries - 1)
    features = tl.arange(0, BLOCK_FEATURES)
    query_ptrs = queries_ptr + real_query.to(tl.int64)[None, :] * query_stride
    places = maxima_ptr + query.to(tl.int64)[None, :] * n_groups
    if RESIDENT:
        if EVEN:
            queries = tl.load(query_ptrs + features[:, None])
        else:
            queries = tl.load(query_ptrs + features[:, None], mask=(features < dim)[:, None], other=0)
    for row_block in tl.range(
        tl.program_id(0), n_blocks, tl.num_programs(0), num_stages=STAGES if RESIDENT else 1
    ):
        rows = tl.minimum(row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), n_rows - 1)
        code_ptrs = codes_ptr + rows.to(tl.int64)[:, None] * code_stride
        products = zeros_for((BLOCK_ROWS, BLOCK_QUERIES), codes_ptr.dtype.element_ty)
        if RESIDENT:
            if EVEN:
                codes = tl.load(code_ptrs + features[None, :])
            else:
                codes = tl.load(code_ptrs + features[None, :], mask=(features < dim)[None, :], other=0)
            products = dot(codes, queries, products)
        else:
            for start in tl.range(0, dim, BLOCK_FEATURES, num_stages=STAGES):
                feature = start + features
                if EVEN:
                    codes = tl.load(code_ptrs + feature[None, :])
                    queries = tl.load(query_ptrs + feature[:, None])
                else:
                    inside = feature < dim
                    codes = tl.load(code_ptrs + feature[None, :], mask=inside[None, :], other=0)
                    queries = tl.load(query_ptrs + feature[:, None], mask=inside[:, None], other=0)
                products = dot(codes, queries, products)
        bounds = upper_bounds(
            products,
            real_query[None, :],
            rows[:, None],
            scales_ptr,
            biases_ptr,
            residuals_ptr,
            norms_ptr,
            q_bias_ptr,
            q_residual_ptr,
            q_norm_ptr,
            mask_ptr,
            mask_stride,
            PAIR_MASK,
        )
        maxima = tl.max(tl.reshape(bounds, (GROUPS, GROUP, BLOCK_QUERIES)), axis=1)
        groups = row_block * GROUPS + tl.arange(0, GROUPS)
        inside_result = (query < n_queries)[None, :] & (groups < n_groups)[:, None]
        tl.store(places + groups[:, None], maxima, mask=inside_result)


@triton.jit
def group_max_large_kernel(
    queries_ptr,
    codes_ptr,
    scales_ptr,
    biases_ptr,
    residuals_ptr,
    norms_ptr,
    q_bias_ptr,
    q_residual_ptr,
    q_norm_ptr,
    mask_ptr,
    maxima_ptr,
    n_queries,
    n_rows,
    dim,
    n_groups,
    query_stride,
    code_stride,
    mask_stride,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    SUPERTILE: tl.constexpr,
    PAIR_MASK: tl.constexpr,
):
    """Many queries: one block of a matrix product per program, reduced before it is stored."""
    GROUPS: tl.constexpr = BLOCK_ROWS // GROUP
    program = tl.program_id(0)
    query_blocks = tl.cdiv(n_queries, BLOCK_QUERIES)
    row_blocks = tl.cdiv(n_rows, BLOCK_ROWS)
    # A supertile of query blocks shares each block of the database while it is in the L2 cache.
    supertile = program // (SUPERTILE * row_blocks)
    within = program % (SUPERTILE * row_blocks)
    height = tl.minimum(query_blocks - supertile * SUPERTILE, SUPERTILE)
    query_block = supertile * SUPERTILE + within % height
    row_block = within // height
    query = query_block * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    # Behind the end both sides repeat their last: harmless in a maximum, and not stored.
    real_query = tl.minimum(query, n_queries - 1)
    rows = tl.minimum(row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), n_rows - 1)
    features = tl.arange(0, BLOCK_FEATURES)
    query_ptrs = queries_ptr + real_query.to(tl.int64)[:, None] * query_stride + features[None, :]
    code_ptrs = codes_ptr + rows.to(tl.int64)[:, None] * code_stride + features[None, :]
    products = zeros_for((BLOCK_QUERIES, BLOCK_ROWS), codes_ptr.dtype.element_ty)
    for start in range(0, dim, BLOCK_FEATURES):
        if EVEN:
            queries = tl.load(query_ptrs)
            codes = tl.load(code_ptrs)
        else:
            inside = (start + features < dim)[None, :]
            queries = tl.load(query_ptrs, mask=inside, other=0)
            codes = tl.load(code_ptrs, mask=inside, other=0)
        products = dot(queries, tl.trans(codes), products)
        query_ptrs += BLOCK_FEATURES
        code_ptrs += BLOCK_FEATURES
    bounds = upper_bounds(
        products,
        real_query[:, None],
        rows[None, :],
        scales_ptr,
        biases_ptr,
        residuals_ptr,
        norms_ptr,
        q_bias_ptr,
        q_residual_ptr,
        q_norm_ptr,
        mask_ptr,
        mask_stride,
        PAIR_MASK,
    )
    maxima = tl.max(tl.reshape(bounds, (BLOCK_QUERIES, GROUPS, GROUP)), axis=2)
    groups = row_block * GROUPS + tl.arange(0, GROUPS)
    places = maxima_ptr + query.to(tl.int64)[:, None] * n_groups + groups[None, :]
    tl.store(places, maxima, mask=(query < n_queries)[:, None] & (groups < n_groups)[None, :])


def group_max_triton(
    queries: Tensor,  # (Q, D)
    codes: Tensor,  # (N, D)
    scales: Tensor | None,  # (N,) float32
    biases: Tensor | None,  # (N,) float32
    residuals: Tensor | None,  # (N,) float32
    norms: Tensor | None,  # (N,) float32
    q_bias: Tensor | None,  # (Q,) float32
    q_residual: Tensor | None,  # (Q,) float32
    q_norm: Tensor | None,  # (Q,) float32
    *,
    group: int,
    mask: Tensor | None = None,  # (N,) or (Q, N) bool
) -> Tensor:  # (Q, ceil(N / group)) float32
    """Return the largest upper bound of each group of consecutive rows.

    Args:
        queries: codes of the queries, int8, bfloat16, float16 or float32, as those of the rows.
        codes: codes of the rows; features are contiguous, rows may have any stride.
        scales: factor of each row's product; None for 1.
        biases: see the formula above; a term whose vector is None is left out, on both sides.
        residuals: as ``biases``.
        norms: as ``biases``.
        q_bias: as ``biases``.
        q_residual: as ``biases``.
        q_norm: as ``biases``.
        group: rows per group, a power of two up to 128.
        mask: True keeps a row. One that is dropped counts as `LOWEST_BOUND`.

    Raises:
        ValueError: the arguments are outside what the kernels take.
    """
    n_queries, n_rows, dim = queries.shape[0], codes.shape[0], codes.shape[1]
    if codes.dtype not in DTYPES or queries.dtype != codes.dtype:
        raise ValueError(f"codes are {codes.dtype} and queries {queries.dtype}, expected one of {DTYPES}")
    if not 1 <= group <= LARGEST_GROUP or group & (group - 1):
        raise ValueError(f"group is {group}, expected a power of two up to {LARGEST_GROUP}")
    if n_rows > _MOST_ROWS:
        raise ValueError(f"codes has {n_rows} rows, expected at most {_MOST_ROWS}")
    if queries.stride(1) != 1 or codes.stride(1) != 1:
        raise ValueError("the features of queries and codes must be contiguous")
    n_groups = -(-n_rows // group)
    maxima = torch.empty(n_queries, n_groups, dtype=torch.float32, device=codes.device)
    if maxima.numel() == 0:
        return maxima
    if mask is not None:
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    tensors = (
        *(queries, codes, scales, biases, residuals, norms, q_bias, q_residual, q_norm),
        None if mask is None else mask.view(torch.uint8),
        maxima,
    )
    pair_mask = mask is not None and mask.ndim == 2
    mask_stride = mask.stride(0) if mask is not None and pair_mask else 0
    strides = (queries.stride(0), codes.stride(0), mask_stride)
    family = device_family(codes.device)
    with launch_scope(codes):
        if n_queries <= SMALL_QUERIES:
            blocks = small_blocks(codes.dtype, dim, group)
            group_max_small_kernel[(triton.cdiv(n_rows, blocks.rows),)](
                *tensors,
                *(n_rows, dim, n_groups),
                *strides,
                TWO=n_queries == 2,
                BLOCK_ROWS=blocks.rows,
                BLOCK_FEATURES=blocks.features,
                GROUP=group,
                EVEN=dim % blocks.features == 0,
                PAIR_MASK=pair_mask,
                num_warps=blocks.warps,
            )
        elif n_queries <= MEDIUM_QUERIES:
            blocks = medium_blocks(family, codes.dtype, n_queries, dim, group)
            resident = dim <= blocks.features
            n_blocks = triton.cdiv(n_rows, blocks.rows)
            programs = min(n_blocks, resident_programs(codes.device, 2)) if resident else n_blocks
            group_max_medium_kernel[(programs, triton.cdiv(n_queries, blocks.queries))](
                *tensors,
                *(n_queries, n_rows, dim, n_groups, n_blocks),
                *strides,
                BLOCK_QUERIES=blocks.queries,
                BLOCK_ROWS=blocks.rows,
                BLOCK_FEATURES=blocks.features,
                GROUP=group,
                EVEN=dim % blocks.features == 0,
                RESIDENT=resident,
                STAGES=blocks.stages,
                PAIR_MASK=pair_mask,
                num_warps=blocks.warps,
            )
        else:
            blocks = large_blocks(family, codes.dtype, dim, group)
            programs = triton.cdiv(n_queries, blocks.queries) * triton.cdiv(n_rows, blocks.rows)
            group_max_large_kernel[(programs,)](
                *tensors,
                *(n_queries, n_rows, dim, n_groups),
                *strides,
                BLOCK_QUERIES=blocks.queries,
                BLOCK_ROWS=blocks.rows,
                BLOCK_FEATURES=blocks.features,
                GROUP=group,
                EVEN=dim % blocks.features == 0,
                SUPERTILE=SUPERTILE_QUERIES,
                PAIR_MASK=pair_mask,
                num_warps=blocks.warps,
                num_stages=blocks.stages,
            )
    return maxima
