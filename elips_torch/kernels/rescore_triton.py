"""Scores by the metric's definition in Triton: every row of chosen groups, in float64.

List-major: pairs are sorted by group, and one program scores one group for several of its queries,
so a group that many queries chose is read once for all of them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from elips_torch.core.metric import Metric
from elips_torch.kernels.metric_language import definition_terms
from elips_torch.kernels.triton_language import launch_options, launch_scope

LARGEST_GROUP = 128
# Queries, rows and features of one step: as many float64 terms as registers hold.
BLOCKS = {"BLOCK_PAIRS": 4, "BLOCK_ROWS": 32, "BLOCK_FEATURES": 32}
# Warps of a step with so many rows; fewer rows take fewer, so that each reads as wide.
_WARPS = 4


def blocks_for(metric: str, group: int) -> dict[str, int]:
    """Return the blocks for a metric and groups of so many rows.

    "cosine" holds the squares of both sides as well; few rows have fewer threads.
    """
    rows = min(group, BLOCKS["BLOCK_ROWS"])
    pairs = 2 if metric == "cosine" or rows < BLOCKS["BLOCK_ROWS"] else BLOCKS["BLOCK_PAIRS"]
    return BLOCKS | {"BLOCK_PAIRS": pairs, "BLOCK_ROWS": rows}


def warps_for(block_rows: int) -> int:
    """Return the warps of a program that scores so many rows at a time."""
    return max(1, _WARPS * block_rows // BLOCKS["BLOCK_ROWS"])


@triton.jit
def rescore_kernel(
    queries_ptr,
    database_ptr,
    pair_queries_ptr,
    pair_groups_ptr,
    work_ptr,
    rows_ptr,
    scores_ptr,
    n_pairs,
    n_places,
    dim,
    query_stride,
    row_stride,
    METRIC: tl.constexpr,
    P: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    """Score the rows of one group for the queries of one stretch of pairs."""
    first = tl.load(work_ptr + tl.program_id(0))
    if first < n_pairs:
        group = tl.load(pair_groups_ptr + first)
        pair = first + tl.arange(0, BLOCK_PAIRS)
        # The pairs of one group stand together; those of the next one are another program's.
        mine = pair < n_pairs
        mine &= tl.load(pair_groups_ptr + pair, mask=mine, other=-1) == group
        query = tl.load(pair_queries_ptr + pair, mask=mine, other=0)
        member = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        row = group * GROUP + member
        exists = row < n_places
        if rows_ptr is not None:
            row = tl.load(rows_ptr + row, mask=exists, other=-1)
            exists = row >= 0
        features = tl.arange(0, BLOCK_FEATURES)
        query_ptrs = queries_ptr + query[:, None] * query_stride
        row_ptrs = database_ptr + row[:, None] * row_stride
        scores = tl.zeros((BLOCK_PAIRS, BLOCK_ROWS), tl.float64)
        if METRIC == "cosine":
            query_squares = tl.zeros((BLOCK_PAIRS,), tl.float64)
            row_squares = tl.zeros((BLOCK_ROWS,), tl.float64)
        if METRIC == "braycurtis":
            totals = tl.zeros((BLOCK_PAIRS, BLOCK_ROWS), tl.float64)
        for start in range(0, dim, BLOCK_FEATURES):
            feature = start + features
            inside = (feature < dim)[None, :]
            q = tl.load(query_ptrs + feature[None, :], mask=inside & mine[:, None], other=0).to(tl.float64)
            x = tl.load(row_ptrs + feature[None, :], mask=inside & exists[:, None], other=0).to(tl.float64)
            if METRIC == "cosine":
                query_squares += tl.sum(q * q, axis=1)
                row_squares += tl.sum(x * x, axis=1)
            q = q[:, None, :]
            x = x[None, :, :]
            terms = definition_terms(q, x, METRIC, P)
            if METRIC == "linf":
                scores = tl.maximum(scores, tl.max(terms, axis=2))
            else:
                scores += tl.sum(terms, axis=2)
            if METRIC == "braycurtis":
                totals += tl.sum(tl.abs(q + x), axis=2)
        if METRIC == "cosine":
            norms = tl.sqrt(query_squares)[:, None] * tl.sqrt(row_squares)[None, :]
            scores = tl.where(norms == 0, 0.0, scores / tl.where(norms == 0, 1.0, norms))
        elif METRIC == "braycurtis":
            scores = tl.where(scores == 0, 0.0, scores / tl.where(scores == 0, 1.0, totals))
        elif METRIC == "jensenshannon":
            scores = 0.5 * scores
        elif METRIC == "gower":
            scores = scores / dim
        scores = tl.where(exists[None, :], scores, float("nan"))
        places = scores_ptr + pair[:, None] * GROUP + member[None, :]
        tl.store(places, scores, mask=mine[:, None])


def work_items(pair_groups: Tensor, n_groups: int, pairs_at_once: int) -> Tensor:
    """Return int64 ``(W,)``: the first pair of each stretch of at most ``pairs_at_once`` of one group.

    W is a bound known without asking the device; places that are left over hold the number of pairs.
    """
    n_pairs = pair_groups.shape[0]
    n_items = min(n_pairs, n_pairs // pairs_at_once + min(n_pairs, n_groups))
    place = torch.arange(n_pairs, device=pair_groups.device)
    begins = torch.ones(n_pairs, dtype=torch.bool, device=pair_groups.device)
    begins[1:] = pair_groups[1:] != pair_groups[:-1]
    run_start = torch.where(begins, place, 0).cummax(0).values
    begins = (place - run_start) % pairs_at_once == 0
    items = torch.full((n_items + 1,), n_pairs, dtype=torch.int64, device=pair_groups.device)
    # Pairs that begin nothing are sent to the spare last place.
    target = torch.where(begins, begins.cumsum(0) - 1, n_items)
    items.scatter_(0, target, torch.where(begins, place, n_pairs))
    return items[:n_items]


def rescore_triton(
    queries: Tensor,  # (Q, D)
    database: Tensor,  # (N, D)
    pair_queries: Tensor,  # (P,) int64
    pair_groups: Tensor,  # (P,) int64, ascending
    group: int,
    metric: Metric,
    rows: Tensor | None = None,  # (S,) int64
) -> Tensor:  # (P, group) float64
    """Score every row of the group of each (query, group) pair by the metric's definition.

    Args:
        queries: any float dtype; features are contiguous.
        database: the vectors themselves, any float dtype; features are contiguous.
        pair_queries: query of each pair.
        pair_groups: group of each pair, in ascending order; group g holds the rows, or the places, from
            ``g * group`` on.
        group: rows per group, a power of two up to 128.
        metric: what is computed, in float64 throughout; the caller rounds.
        rows: the row in each place, -1 for none; None where the rows are the places.

    Returns:
        Scores; NaN where there is no row: behind the end of the database, or in an empty place.

    Raises:
        ValueError: the arguments are outside what the kernel takes.
    """
    if not 1 <= group <= LARGEST_GROUP or group & (group - 1):
        raise ValueError(f"group is {group}, expected a power of two up to {LARGEST_GROUP}")
    if queries.stride(1) != 1 or database.stride(1) != 1:
        raise ValueError("the features of queries and database must be contiguous")
    n_pairs = pair_queries.shape[0]
    n_places = database.shape[0] if rows is None else rows.shape[0]
    scores = torch.empty(n_pairs, group, dtype=torch.float64, device=database.device)
    if n_pairs == 0:
        return scores
    n_groups = triton.cdiv(n_places, group)
    blocks = blocks_for(metric.name, group)
    # Groups that are chosen about once would leave most of a block of pairs idle.
    at_once = blocks["BLOCK_PAIRS"] if n_pairs >= 2 * n_groups else 1
    work = work_items(pair_groups, n_groups, at_once)
    with launch_scope(database):
        rescore_kernel[(work.shape[0], group // blocks["BLOCK_ROWS"])](
            *(queries, database, pair_queries.contiguous(), pair_groups.contiguous(), work, rows, scores),
            *(n_pairs, n_places, database.shape[1], queries.stride(0), database.stride(0)),
            METRIC=metric.name,
            P=metric.p,
            GROUP=group,
            **blocks | {"BLOCK_PAIRS": at_once},
            **launch_options(warps_for(blocks["BLOCK_ROWS"])),
        )
    return scores
