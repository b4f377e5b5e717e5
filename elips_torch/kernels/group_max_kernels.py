"""The kernels of the scan: one product each, for one or two, few and many queries.

Nothing is masked along rows and queries: numbers behind the end repeat the last one, which leaves
every maximum as it is.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from elips_torch.kernels.group_bounds import group_bounds
from elips_torch.kernels.triton_language import dot, zeros_for


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
    maxima_stride,
    TWO: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    PAIR_MASK: tl.constexpr,
    PER_GROUP: tl.constexpr,
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
    groups = row_block * GROUPS + tl.arange(0, GROUPS)[None, :, None]
    rows = tl.minimum(groups * GROUP + tl.arange(0, GROUP)[None, None, :], n_rows - 1)
    for query_row in tl.static_range(2 if TWO else 1):
        products = tl.sum(sums if query_row == 0 else more, axis=1)
        bounds = group_bounds(
            tl.reshape(products, (1, GROUPS, GROUP)),
            2,
            tl.full((1, 1, 1), query_row, tl.int32),
            rows,
            rows,
            tl.minimum(groups, n_groups - 1),
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
            PER_GROUP,
        )
        tl.store(maxima_ptr + query_row * maxima_stride + groups, bounds, mask=groups < n_groups)


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
    query_stride,
    code_stride,
    mask_stride,
    maxima_stride,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    PAIR_MASK: tl.constexpr,
    PER_GROUP: tl.constexpr,
):
    """Few queries: database rows are the first axis of the product, so that tensor cores are filled."""
    GROUPS: tl.constexpr = BLOCK_ROWS // GROUP
    row_block = tl.program_id(0)
    query = tl.program_id(1) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    # As for rows: queries behind the end repeat the last one and are not stored.
    real_query = tl.minimum(query, n_queries - 1)
    rows = tl.minimum(row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), n_rows - 1)
    features = tl.arange(0, BLOCK_FEATURES)
    query_ptrs = queries_ptr + real_query.to(tl.int64)[None, :] * query_stride + features[:, None]
    code_ptrs = codes_ptr + rows.to(tl.int64)[:, None] * code_stride + features[None, :]
    products = zeros_for((BLOCK_ROWS, BLOCK_QUERIES), codes_ptr.dtype.element_ty)
    for start in range(0, dim, BLOCK_FEATURES):
        if EVEN:
            codes = tl.load(code_ptrs)
            queries = tl.load(query_ptrs)
        else:
            inside = start + features < dim
            codes = tl.load(code_ptrs, mask=inside[None, :], other=0)
            queries = tl.load(query_ptrs, mask=inside[:, None], other=0)
        products = dot(codes, queries, products)
        query_ptrs += BLOCK_FEATURES
        code_ptrs += BLOCK_FEATURES
    groups = row_block * GROUPS + tl.arange(0, GROUPS)[:, None, None]
    rows = tl.minimum(groups * GROUP + tl.arange(0, GROUP)[None, :, None], n_rows - 1)
    bounds = group_bounds(
        tl.reshape(products, (GROUPS, GROUP, BLOCK_QUERIES)),
        1,
        real_query[None, None, :],
        rows,
        rows,
        tl.minimum(groups, n_groups - 1),
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
        PER_GROUP,
    )
    places = maxima_ptr + query.to(tl.int64)[None, None, :] * maxima_stride + groups
    tl.store(places, bounds, mask=(query < n_queries)[None, None, :] & (groups < n_groups))


@triton.jit
def group_max_stream_kernel(
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
    maxima_stride,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    PAIR_MASK: tl.constexpr,
    PER_GROUP: tl.constexpr,
):
    """Few queries and few features: the queries stay in place while the database streams by."""
    GROUPS: tl.constexpr = BLOCK_ROWS // GROUP
    query = tl.arange(0, BLOCK_QUERIES)
    real_query = tl.minimum(query, n_queries - 1)
    feature = tl.arange(0, BLOCK_FEATURES)
    query_ptrs = queries_ptr + real_query.to(tl.int64)[None, :] * query_stride + feature[:, None]
    if EVEN:
        queries = tl.load(query_ptrs)
    else:
        queries = tl.load(query_ptrs, mask=(feature < dim)[:, None], other=0)
    places = maxima_ptr + query.to(tl.int64)[None, None, :] * maxima_stride
    for row_block in tl.range(tl.program_id(0), n_blocks, tl.num_programs(0), num_stages=STAGES):
        rows = tl.minimum(row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), n_rows - 1)
        code_ptrs = codes_ptr + rows.to(tl.int64)[:, None] * code_stride + feature[None, :]
        if EVEN:
            codes = tl.load(code_ptrs)
        else:
            codes = tl.load(code_ptrs, mask=(feature < dim)[None, :], other=0)
        products = dot(codes, queries, zeros_for((BLOCK_ROWS, BLOCK_QUERIES), codes_ptr.dtype.element_ty))
        groups = row_block * GROUPS + tl.arange(0, GROUPS)[:, None, None]
        rows = tl.minimum(groups * GROUP + tl.arange(0, GROUP)[None, :, None], n_rows - 1)
        bounds = group_bounds(
            tl.reshape(products, (GROUPS, GROUP, BLOCK_QUERIES)),
            1,
            real_query[None, None, :],
            rows,
            rows,
            tl.minimum(groups, n_groups - 1),
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
            PER_GROUP,
        )
        inside_result = (query < n_queries)[None, None, :] & (groups < n_groups)
        tl.store(places + groups, bounds, mask=inside_result)


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
    maxima_stride,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    SUPERTILE: tl.constexpr,
    PAIR_MASK: tl.constexpr,
    PER_GROUP: tl.constexpr,
):
    """Many queries: one block of a matrix product per program, reduced before it is stored.

    With ``WIDE`` a program takes two blocks of rows beside each other and reads the queries once.
    """
    GROUPS: tl.constexpr = BLOCK_ROWS // GROUP
    PARTS: tl.constexpr = 2 if WIDE else 1
    program = tl.program_id(0)
    query_blocks = tl.cdiv(n_queries, BLOCK_QUERIES)
    row_blocks = tl.cdiv(n_rows, PARTS * BLOCK_ROWS)
    # A supertile of query blocks shares each block of the database while it is in the L2 cache.
    supertile = program // (SUPERTILE * row_blocks)
    within = program % (SUPERTILE * row_blocks)
    height = tl.minimum(query_blocks - supertile * SUPERTILE, SUPERTILE)
    query_block = supertile * SUPERTILE + within % height
    row_block = PARTS * (within // height)
    query = query_block * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    # Behind the end both sides repeat their last: harmless in a maximum, and not stored.
    real_query = tl.minimum(query, n_queries - 1)
    rows = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    more_rows = rows + BLOCK_ROWS
    if not EVEN_ROWS:
        rows = tl.minimum(rows, n_rows - 1)
        more_rows = tl.minimum(more_rows, n_rows - 1)
    features = tl.arange(0, BLOCK_FEATURES)
    query_ptrs = queries_ptr + real_query.to(tl.int64)[:, None] * query_stride + features[None, :]
    code_ptrs = codes_ptr + rows.to(tl.int64)[:, None] * code_stride + features[None, :]
    more_ptrs = codes_ptr + more_rows.to(tl.int64)[:, None] * code_stride + features[None, :]
    products = zeros_for((BLOCK_QUERIES, BLOCK_ROWS), codes_ptr.dtype.element_ty)
    more = zeros_for((BLOCK_QUERIES, BLOCK_ROWS), codes_ptr.dtype.element_ty)
    for start in range(0, dim, BLOCK_FEATURES):
        if EVEN:
            queries = tl.load(query_ptrs)
            codes = tl.load(code_ptrs)
        else:
            inside = (start + features < dim)[None, :]
            queries = tl.load(query_ptrs, mask=inside, other=0)
            codes = tl.load(code_ptrs, mask=inside, other=0)
        products = dot(queries, tl.trans(codes), products)
        if WIDE:
            if EVEN:
                codes = tl.load(more_ptrs)
            else:
                codes = tl.load(more_ptrs, mask=inside, other=0)
            more = dot(queries, tl.trans(codes), more)
            more_ptrs += BLOCK_FEATURES
        query_ptrs += BLOCK_FEATURES
        code_ptrs += BLOCK_FEATURES
    places = maxima_ptr + query.to(tl.int64)[:, None, None] * maxima_stride
    for part in tl.static_range(PARTS):
        groups = (row_block + part) * GROUPS + tl.arange(0, GROUPS)[None, :, None]
        # Numbered anew rather than reshaped: a reshape would move the products between threads.
        rows = groups * GROUP + tl.arange(0, GROUP)[None, None, :]
        inside_result = (query < n_queries)[:, None, None]
        if not EVEN_ROWS:
            rows = tl.minimum(rows, n_rows - 1)
            inside_result &= groups < n_groups
        bounds = group_bounds(
            tl.reshape(products if part == 0 else more, (BLOCK_QUERIES, GROUPS, GROUP)),
            2,
            real_query[:, None, None],
            rows,
            rows,
            groups if EVEN_ROWS else tl.minimum(groups, n_groups - 1),
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
            PER_GROUP,
        )
        tl.store(places + groups, bounds, mask=inside_result)
