"""The scan of certified search in Triton for metrics that are no product.

Distances are computed feature by feature in float32, and only the minimum of every ``group``
consecutive rows leaves the chip. `distance_error_bound` says how far they may be off.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from elips_torch.core.metric import Metric
from elips_torch.kernels.metric_language import definition_terms
from elips_torch.kernels.triton_language import HIGHEST, launch_options, launch_scope

METRICS = ("l1", "linf", "lp", "canberra", "braycurtis", "jensenshannon", "gower")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_GROUP = 128
# One step takes queries x rows x features in registers.
LEAST_ROWS = 64
BLOCK_FEATURES = 16
WARPS = 4
_MOST_ROWS = 2**31 - 512


def queries_at_once(metric: Metric) -> int:
    """Return how many queries a program takes; the registers of logarithms limit it."""
    return 4 if metric.name == "jensenshannon" else 8


@triton.jit
def distance_group_min_kernel(
    queries_ptr,
    database_ptr,
    mask_ptr,
    minima_ptr,
    n_queries,
    n_rows,
    dim,
    n_groups,
    query_stride,
    row_stride,
    mask_stride,
    METRIC: tl.constexpr,
    P: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    PAIR_MASK: tl.constexpr,
):
    """Compute one block of distances and reduce it to the minimum of each group."""
    GROUPS: tl.constexpr = BLOCK_ROWS // GROUP
    query_blocks = tl.cdiv(n_queries, BLOCK_QUERIES)
    # Programs that follow each other share a block of the database.
    query_block = tl.program_id(0) % query_blocks
    row_block = tl.program_id(0) // query_blocks
    query = query_block * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    # Behind the end both sides repeat their last: harmless in a minimum, and not stored.
    real_query = tl.minimum(query, n_queries - 1)
    rows = tl.minimum(row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), n_rows - 1)
    features = tl.arange(0, BLOCK_FEATURES)
    query_ptrs = queries_ptr + real_query.to(tl.int64)[:, None] * query_stride
    row_ptrs = database_ptr + rows.to(tl.int64)[:, None] * row_stride
    distances = tl.zeros((BLOCK_QUERIES, BLOCK_ROWS), tl.float32)
    totals = tl.zeros((BLOCK_QUERIES, BLOCK_ROWS), tl.float32)
    for start in range(0, dim, BLOCK_FEATURES):
        feature = (start + features)[None, :]
        if EVEN:
            q = tl.load(query_ptrs + feature).to(tl.float32)
            x = tl.load(row_ptrs + feature).to(tl.float32)
        else:
            q = tl.load(query_ptrs + feature, mask=feature < dim, other=0).to(tl.float32)
            x = tl.load(row_ptrs + feature, mask=feature < dim, other=0).to(tl.float32)
        terms = definition_terms(q[:, None, :], x[None, :, :], METRIC, P)
        if METRIC == "linf":
            distances = tl.maximum(distances, tl.max(terms, axis=2))
        else:
            distances += tl.sum(terms, axis=2)
        if METRIC == "braycurtis":
            totals += tl.sum(tl.abs(q[:, None, :] + x[None, :, :]), axis=2)
    if METRIC == "braycurtis":
        distances = tl.where(distances == 0, 0.0, distances / tl.where(distances == 0, 1.0, totals))
    elif METRIC == "jensenshannon":
        distances = 0.5 * distances
    elif METRIC == "gower":
        distances = distances / dim
    if mask_ptr is not None:
        if PAIR_MASK:
            keep = tl.load(mask_ptr + real_query.to(tl.int64)[:, None] * mask_stride + rows[None, :])
        else:
            keep = tl.load(mask_ptr + rows)[None, :]
        distances = tl.where(keep != 0, distances, HIGHEST)
    minima = tl.min(tl.reshape(distances, (BLOCK_QUERIES, GROUPS, GROUP)), axis=2)
    groups = row_block * GROUPS + tl.arange(0, GROUPS)
    places = minima_ptr + query.to(tl.int64)[:, None] * n_groups + groups[None, :]
    tl.store(places, minima, mask=(query < n_queries)[:, None] & (groups < n_groups)[None, :])


def distance_group_min_triton(
    queries: Tensor,  # (Q, D)
    database: Tensor,  # (N, D)
    metric: Metric,
    *,
    group: int,
    mask: Tensor | None = None,  # (N,) or (Q, N) bool
) -> Tensor:  # (Q, ceil(N / group)) float32
    """Return the smallest distance of each group of consecutive rows, computed in float32.

    Args:
        queries: float32, bfloat16 or float16; features are contiguous.
        database: the same dtypes; features are contiguous, rows may have any stride.
        metric: one of `METRICS`.
        group: rows per group, a power of two up to 128.
        mask: True keeps a row. One that is dropped counts as `HIGHEST_DISTANCE`.

    Raises:
        ValueError: the arguments are outside what the kernel takes.
    """
    n_queries, (n_rows, dim) = queries.shape[0], database.shape
    if metric.name not in METRICS:
        raise ValueError(f"metric is {metric.name!r}, expected one of {METRICS}")
    if queries.dtype not in DTYPES or database.dtype not in DTYPES:
        raise ValueError(f"queries are {queries.dtype}, database {database.dtype}, expected {DTYPES}")
    if not 1 <= group <= LARGEST_GROUP or group & (group - 1):
        raise ValueError(f"group is {group}, expected a power of two up to {LARGEST_GROUP}")
    if n_rows > _MOST_ROWS:
        raise ValueError(f"database has {n_rows} rows, expected at most {_MOST_ROWS}")
    if queries.stride(1) != 1 or database.stride(1) != 1:
        raise ValueError("the features of queries and database must be contiguous")
    n_groups = triton.cdiv(n_rows, group)
    minima = torch.empty(n_queries, n_groups, dtype=torch.float32, device=database.device)
    if minima.numel() == 0:
        return minima
    if mask is not None:
        mask = (mask if mask.stride(-1) == 1 else mask.contiguous()).view(torch.uint8)
    pair_mask = mask is not None and mask.ndim == 2
    block_queries = queries_at_once(metric)
    block_rows = max(group, LEAST_ROWS)
    programs = triton.cdiv(n_queries, block_queries) * triton.cdiv(n_rows, block_rows)
    with launch_scope(database):
        distance_group_min_kernel[(programs,)](
            *(queries, database, mask, minima, n_queries, n_rows, dim, n_groups),
            *(queries.stride(0), database.stride(0), mask.stride(0) if mask is not None and pair_mask else 0),
            METRIC=metric.name,
            P=metric.p,
            BLOCK_QUERIES=block_queries,
            BLOCK_ROWS=block_rows,
            BLOCK_FEATURES=BLOCK_FEATURES,
            GROUP=group,
            EVEN=dim % BLOCK_FEATURES == 0,
            PAIR_MASK=pair_mask,
            **launch_options(WARPS),
        )
    return minima
