"""The kernels that scan inverted lists: one for many queries of a list, one for a query at a time.

Pairs of a query and a list that it probes are numbered; an item of work is a pair and a row of its list
to begin at. Rows are counted within their list, which lies anywhere among the slots.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from elips_torch.kernels.group_bounds import group_bounds
from elips_torch.kernels.triton_language import dot, zeros_for


@triton.jit
def at_slot(pointer, slot):
    """Return a pointer to what belongs to a slot; None stays None."""
    if pointer is None:
        return None
    else:
        return pointer + slot


@triton.jit
def rows_for_mask(slots_ptr, start, rows):
    """Return the numbers by which a mask is looked up: those of the rows, else those of the slots."""
    if slots_ptr is None:
        return start + rows
    else:
        return tl.load(slots_ptr + start + rows)


@triton.jit
def ivf_scan_lists_kernel(
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
    slots_ptr,
    pair_queries_ptr,
    pair_lists_ptr,
    pair_columns_ptr,
    item_pairs_ptr,
    item_rows_ptr,
    starts_ptr,
    sizes_ptr,
    maxima_ptr,
    n_pairs,
    dim,
    query_stride,
    code_stride,
    mask_stride,
    maxima_stride,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    RANGE: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    PAIR_MASK: tl.constexpr,
):
    """List-major: the pairs of one list that follow each other share every row that is read."""
    GROUPS: tl.constexpr = BLOCK_ROWS // GROUP
    first = tl.load(item_pairs_ptr + tl.program_id(0))
    begin = tl.load(item_rows_ptr + tl.program_id(0)).to(tl.int32)
    number = tl.load(pair_lists_ptr + first)
    start = tl.load(starts_ptr + number)
    size = tl.load(sizes_ptr + number).to(tl.int32)
    pair = first + tl.arange(0, BLOCK_QUERIES)
    mine = pair < n_pairs
    mine &= tl.load(pair_lists_ptr + pair, mask=mine, other=-1) == number
    # Pairs of other lists repeat the first one and are not stored.
    pair = tl.where(mine, pair, first)
    query = tl.load(pair_queries_ptr + pair)
    places = maxima_ptr + (query * maxima_stride + tl.load(pair_columns_ptr + pair))[:, None, None]
    features = tl.arange(0, BLOCK_FEATURES)
    list_codes_ptr = codes_ptr + start * code_stride
    list_scales_ptr = at_slot(scales_ptr, start)
    list_biases_ptr = at_slot(biases_ptr, start)
    list_residuals_ptr = at_slot(residuals_ptr, start)
    list_norms_ptr = at_slot(norms_ptr, start)
    for block in range(begin, tl.minimum(begin + RANGE, size), BLOCK_ROWS):
        # Behind the end of a list its last row is repeated, which leaves every maximum as it is.
        rows = tl.minimum(block + tl.arange(0, BLOCK_ROWS), size - 1)
        query_ptrs = queries_ptr + query[:, None] * query_stride + features[None, :]
        code_ptrs = list_codes_ptr + rows.to(tl.int64)[:, None] * code_stride + features[None, :]
        products = zeros_for((BLOCK_QUERIES, BLOCK_ROWS), codes_ptr.dtype.element_ty)
        for start_feature in range(0, dim, BLOCK_FEATURES):
            if EVEN:
                queries = tl.load(query_ptrs)
                codes = tl.load(code_ptrs)
            else:
                inside = (start_feature + features < dim)[None, :]
                queries = tl.load(query_ptrs, mask=inside, other=0)
                codes = tl.load(code_ptrs, mask=inside, other=0)
            products = dot(queries, tl.trans(codes), products)
            query_ptrs += BLOCK_FEATURES
            code_ptrs += BLOCK_FEATURES
        groups = block // GROUP + tl.arange(0, GROUPS)[None, :, None]
        rows = tl.minimum(groups * GROUP + tl.arange(0, GROUP)[None, None, :], size - 1)
        bounds = group_bounds(
            tl.reshape(products, (BLOCK_QUERIES, GROUPS, GROUP)),
            2,
            query[:, None, None],
            rows,
            rows if mask_ptr is None else rows_for_mask(slots_ptr, start, rows),
            groups,
            list_scales_ptr,
            list_biases_ptr,
            list_residuals_ptr,
            list_norms_ptr,
            q_bias_ptr,
            q_residual_ptr,
            q_norm_ptr,
            mask_ptr,
            mask_stride,
            PAIR_MASK,
            False,
        )
        tl.store(places + groups, bounds, mask=mine[:, None, None] & (groups * GROUP < size))


@triton.jit
def ivf_scan_queries_kernel(
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
    slots_ptr,
    pair_queries_ptr,
    pair_lists_ptr,
    pair_columns_ptr,
    item_pairs_ptr,
    item_rows_ptr,
    starts_ptr,
    sizes_ptr,
    maxima_ptr,
    dim,
    query_stride,
    code_stride,
    mask_stride,
    maxima_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    RANGE: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    PAIR_MASK: tl.constexpr,
):
    """Query-major: every row of a stretch of a list is read for one query and multiplied in registers."""
    GROUPS: tl.constexpr = BLOCK_ROWS // GROUP
    pair = tl.load(item_pairs_ptr + tl.program_id(0))
    begin = tl.load(item_rows_ptr + tl.program_id(0)).to(tl.int32)
    number = tl.load(pair_lists_ptr + pair)
    start = tl.load(starts_ptr + number)
    size = tl.load(sizes_ptr + number).to(tl.int32)
    query = tl.load(pair_queries_ptr + pair)
    places = maxima_ptr + query * maxima_stride + tl.load(pair_columns_ptr + pair)
    features = tl.arange(0, BLOCK_FEATURES)
    query_ptrs = queries_ptr + query * query_stride + features
    list_codes_ptr = codes_ptr + start * code_stride
    list_scales_ptr = at_slot(scales_ptr, start)
    list_biases_ptr = at_slot(biases_ptr, start)
    list_residuals_ptr = at_slot(residuals_ptr, start)
    list_norms_ptr = at_slot(norms_ptr, start)
    for block in range(begin, tl.minimum(begin + RANGE, size), BLOCK_ROWS):
        rows = tl.minimum(block + tl.arange(0, BLOCK_ROWS), size - 1)
        code_ptrs = list_codes_ptr + rows.to(tl.int64)[:, None] * code_stride + features[None, :]
        sums = zeros_for((BLOCK_ROWS, BLOCK_FEATURES), codes_ptr.dtype.element_ty)
        for start_feature in range(0, dim, BLOCK_FEATURES):
            if EVEN:
                codes = tl.load(code_ptrs + start_feature)
                values = tl.load(query_ptrs + start_feature)
            else:
                inside = start_feature + features < dim
                codes = tl.load(code_ptrs + start_feature, mask=inside[None, :], other=0)
                values = tl.load(query_ptrs + start_feature, mask=inside, other=0)
            sums += codes.to(sums.dtype) * values.to(sums.dtype)[None, :]
        groups = block // GROUP + tl.arange(0, GROUPS)[None, :, None]
        rows = tl.minimum(groups * GROUP + tl.arange(0, GROUP)[None, None, :], size - 1)
        bounds = group_bounds(
            tl.reshape(tl.sum(sums, axis=1), (1, GROUPS, GROUP)),
            2,
            tl.full((1, 1, 1), 0, tl.int64) + query,
            rows,
            rows if mask_ptr is None else rows_for_mask(slots_ptr, start, rows),
            groups,
            list_scales_ptr,
            list_biases_ptr,
            list_residuals_ptr,
            list_norms_ptr,
            q_bias_ptr,
            q_residual_ptr,
            q_norm_ptr,
            mask_ptr,
            mask_stride,
            PAIR_MASK,
            False,
        )
        tl.store(places + groups, bounds, mask=groups * GROUP < size)
