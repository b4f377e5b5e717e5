"""The scan of inverted lists in Triton: upper bounds of scores, one maximum per group of a list's slots.

The bound of the row in slot s for query q is that of `group_max_triton`,

    scales[s] * <queries[q], codes[s]> + biases[s] * q_bias[q]
        + residuals[s] * q_residual[q] + norms[s] * q_norm[q]

and of every ``group`` slots that follow each other in a list only the largest leaves the chip.

Many queries are served list-major: pairs of query and list are sorted by list, and up to 64 queries of
a list share each row that is read. Few queries are served query-major, a stretch of a list at a time.
Long lists are divided into stretches of a fixed length, so that no program takes longer than others.
Neither order changes a result beyond the rounding of float products, and none for int8.
"""

import dataclasses

import torch
from torch import Tensor

from elips_torch.kernels.group_max_configurations import list_blocks, small_blocks
from elips_torch.kernels.group_max_triton import DTYPES, LARGEST_GROUP
from elips_torch.kernels.ivf_scan_kernels import ivf_scan_lists_kernel, ivf_scan_queries_kernel
from elips_torch.kernels.triton_language import (
    LOWEST_BOUND,
    device_family,
    launch_options,
    launch_scope,
)

# Rows of a stretch: of one that many queries share, and of one for a single query.
LIST_RANGE, QUERY_RANGE = 1024, 256
# Pairs per list from which on sorting them repays.
_PAIRS_PER_LIST = 8


@dataclasses.dataclass(frozen=True)
class ListBounds:
    """Bounds of the groups of each query's lists.

    Attributes:
        maxima: ``(Q, W)`` float32: the groups of the first list that a query probes, those of the second, and
            so on; `LOWEST_BOUND` behind them.
        columns: ``(Q, P)`` int64, the column of each probe's first group. Column c of probe p is the group
            that begins at slot ``starts[probes[q, p]] + (c - columns[q, p]) * group``.
    """

    maxima: Tensor
    columns: Tensor


def ivf_scan_triton(
    queries: Tensor,  # (Q, D)
    probes: Tensor,  # (Q, P) int64
    codes: Tensor,  # (capacity, D)
    starts: Tensor,  # (nlist,) int64
    sizes: Tensor,  # (nlist,) int64
    scales: Tensor | None = None,  # (capacity,) float32
    biases: Tensor | None = None,  # (capacity,) float32
    residuals: Tensor | None = None,  # (capacity,) float32
    norms: Tensor | None = None,  # (capacity,) float32
    q_bias: Tensor | None = None,  # (Q,) float32
    q_residual: Tensor | None = None,  # (Q,) float32
    q_norm: Tensor | None = None,  # (Q,) float32
    *,
    group: int,
    mask: Tensor | None = None,  # (N,) or (Q, N) bool
    slots: Tensor | None = None,  # (capacity,) int64
    list_major: bool | None = None,
) -> ListBounds:
    """Return the largest upper bound of each group of slots in the lists that each query probes.

    Args:
        queries: codes of the queries, int8, bfloat16, float16 or float32, as those of the slots.
        probes: numbers of lists; -1 for none. A list that a query names twice is scanned twice.
        codes: what the slots hold; features are contiguous, slots may have any stride.
        starts: first slot of each list.
        sizes: number of slots of each list that hold rows, from the first on; less than 2**31.
        scales: factor of the product; None for 1.
        biases: see the formula above; None leaves the term out.
        residuals: None leaves the term out.
        norms: None leaves the term out.
        q_bias: factor of the biases; None for 1.
        q_residual: given exactly if ``residuals`` are.
        q_norm: given exactly if ``norms`` are.
        group: slots per group, a power of two up to 128.
        mask: True keeps a row. One that is dropped counts as `LOWEST_BOUND`.
        slots: the number, in ``mask``, of the row in each slot; None where masks are given by slot.
        list_major: whether to sort the work by list; None for what is likely faster.

    Raises:
        ValueError: the arguments are outside what the kernels take.
    """
    _check(queries, probes, codes, group)
    flat = probes.flatten()
    pair_sizes = (
        torch.where(flat >= 0, sizes[flat.clamp_min(0)], 0) if sizes.numel() else torch.zeros_like(flat)
    )
    n_groups = ((pair_sizes + group - 1) // group).view_as(probes)
    totals = n_groups.sum(1)
    width = int(totals.max()) if totals.numel() else 0
    columns = n_groups.cumsum(1) - n_groups
    maxima = torch.full((probes.shape[0], width), LOWEST_BOUND, dtype=torch.float32, device=codes.device)
    if not maxima.numel():
        return ListBounds(maxima, columns)
    if list_major is None:
        list_major = flat.numel() >= _PAIRS_PER_LIST * sizes.numel()
    owners = torch.arange(probes.shape[0], device=codes.device).repeat_interleave(probes.shape[1])
    pairs = [owners, flat, columns.flatten(), pair_sizes]
    if list_major:
        order = flat.argsort(stable=True)
        pairs = [each[order] for each in pairs]
    if mask is not None:
        mask = (mask if mask.stride(-1) == 1 else mask.contiguous()).view(torch.uint8)
    pair_mask = mask is not None and mask.ndim == 2
    family, dim = device_family(codes.device), codes.shape[1]
    blocks = (
        list_blocks(family, codes.dtype, dim, group)
        if list_major
        else small_blocks(codes.dtype, 1, dim, group)
    )
    # A stretch begins with a block.
    length = max(LIST_RANGE if list_major else QUERY_RANGE, blocks.rows)
    items = work_items(pairs[1], pairs[3], blocks.queries, length)
    terms = (scales, biases, residuals, norms, q_bias, q_residual, q_norm)
    tensors = (queries, codes, *terms, mask, slots, *pairs[:3], *items, starts, sizes, maxima)
    strides = (
        *(queries.stride(0), codes.stride(0)),
        *(mask.stride(0) if mask is not None and pair_mask else 0, maxima.stride(0)),
    )
    constants = {
        "BLOCK_ROWS": blocks.rows,
        "BLOCK_FEATURES": blocks.features,
        "RANGE": length,
        "GROUP": group,
        "EVEN": dim % blocks.features == 0,
        "PAIR_MASK": pair_mask,
    }
    options = launch_options(blocks.warps, blocks.stages)
    grid = (items[0].shape[0],)
    with launch_scope(codes):
        if list_major:
            ivf_scan_lists_kernel[grid](
                *(*tensors, flat.numel(), dim, *strides), BLOCK_QUERIES=blocks.queries, **constants, **options
            )
        else:
            ivf_scan_queries_kernel[grid](*(*tensors, dim, *strides), **constants, **options)
    return ListBounds(maxima, columns)


def work_items(
    pair_lists: Tensor,  # (W,) int64
    pair_sizes: Tensor,  # (W,) int64
    pairs_at_once: int,
    rows_at_once: int,
) -> tuple[Tensor, Tensor]:  # (I,) int64, (I,) int64
    """Divide the scan of pairs into items of at most so many pairs of one list and so many of its rows.

    Args:
        pair_lists: the list of each pair; pairs of one list stand together if more than one are taken.
        pair_sizes: number of rows in that list; pairs with none are no work.
        pairs_at_once: pairs per item, at most.
        rows_at_once: rows per item, at most.

    Returns:
        The first pair and the first row of each item.
    """
    place = torch.arange(pair_lists.shape[0], device=pair_lists.device)
    begins = pair_sizes > 0
    if pairs_at_once > 1:
        changes = torch.ones_like(begins)
        changes[1:] = pair_lists[1:] != pair_lists[:-1]
        run_start = torch.where(changes, place, 0).cummax(0).values
        begins &= (place - run_start) % pairs_at_once == 0
    first = begins.nonzero()[:, 0]
    n_ranges = (pair_sizes[first] + rows_at_once - 1) // rows_at_once
    item_pairs = first.repeat_interleave(n_ranges)
    number = torch.arange(item_pairs.shape[0], device=first.device)
    before = (n_ranges.cumsum(0) - n_ranges).repeat_interleave(n_ranges)
    return item_pairs, (number - before) * rows_at_once


def _check(queries: Tensor, probes: Tensor, codes: Tensor, group: int) -> None:
    if codes.dtype not in DTYPES or queries.dtype != codes.dtype:
        raise ValueError(f"codes are {codes.dtype} and queries {queries.dtype}, expected one of {DTYPES}")
    if not 1 <= group <= LARGEST_GROUP or group & (group - 1):
        raise ValueError(f"group is {group}, expected a power of two up to {LARGEST_GROUP}")
    if probes.dtype != torch.int64 or probes.ndim != 2 or probes.shape[0] != queries.shape[0]:
        raise ValueError(
            f"probes are {probes.dtype} {tuple(probes.shape)}, expected int64 ({queries.shape[0]}, P)"
        )
    if queries.stride(1) != 1 or codes.stride(1) != 1:
        raise ValueError("the features of queries and codes must be contiguous")
