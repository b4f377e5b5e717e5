"""The k smallest keys of each row in Triton, sorted.

A program walks along a part of a row and keeps the best keys so far in order; each block of new keys
is cut to its own best, and the two sorted lists are merged (Batcher, Sorting networks and their
applications, 1968). Everything depends on the keys alone, so equal inputs give equal outputs.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from elips_torch.core.ordering import EMPTY_KEY
from elips_torch.kernels.triton_language import launch_options, launch_scope, power_of_two

LARGEST_K = 2048
LEAST_BLOCK = 256
# A longer row is first cut into parts of this many blocks.
_BLOCKS_PER_PART = 16


@triton.jit
def merge_keys_kernel(
    keys_ptr,
    best_ptr,
    n_columns,
    part_size,
    key_stride,
    best_stride,
    k,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    EMPTY: tl.constexpr,
):
    """Write the k smallest keys of one part of a row, ascending."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    best = tl.full((K,), EMPTY, tl.int64)
    end = tl.minimum((part + 1) * part_size, n_columns)
    for start in range(part * part_size, end, BLOCK):
        column = start + tl.arange(0, BLOCK)
        keys = tl.load(keys_ptr + row * key_stride + column, mask=column < end, other=EMPTY)
        # Complements reverse the order: the largest of them, descending, are the smallest keys, ascending.
        if BLOCK == K:
            new = tl.sort(keys, descending=True)
        else:
            new = tl.flip(~tl.topk(~keys, K), 0)
        # An ascending and a descending list: the smaller of each pair are the smallest of both.
        best = tl.bitonic_merge(tl.minimum(best, new))
    place = tl.arange(0, K)
    tl.store(best_ptr + row * best_stride + part * k + place, best, mask=place < k)


def blocks_for(k: int) -> tuple[int, int, int]:
    """Return how many keys a program keeps, how many it takes at a time, and its warps."""
    kept = power_of_two(k, 2)
    block = max(kept, LEAST_BLOCK)
    return kept, block, 4 if block <= 1024 else 8


def merge_keys_triton(
    keys: Tensor,  # (Q, C) int64
    k: int,
) -> Tensor:  # (Q, k) int64
    """Return the k smallest keys of each row, ascending; `EMPTY_KEY` where there are fewer.

    Args:
        keys: keys of `order_keys`, or any others; columns are contiguous.
        k: 1 to 2048.

    Raises:
        ValueError: the arguments are outside what the kernel takes.
    """
    if not 1 <= k <= LARGEST_K:
        raise ValueError(f"k is {k}, expected 1 to {LARGEST_K}")
    if keys.dtype != torch.int64 or keys.stride(1) != 1:
        raise ValueError(f"keys are {keys.dtype}, expected int64 with contiguous columns")
    n_rows = keys.shape[0]
    kept, block, warps = blocks_for(k)
    while True:
        n_columns = keys.shape[1]
        n_parts = max(1, triton.cdiv(n_columns, _BLOCKS_PER_PART * block))
        best = torch.empty(n_rows, n_parts * k, dtype=torch.int64, device=keys.device)
        if n_rows == 0:
            return best[:, :k]
        with launch_scope(keys):
            merge_keys_kernel[(n_rows, n_parts)](
                *(keys, best, n_columns, _BLOCKS_PER_PART * block, keys.stride(0), best.stride(0), k),
                K=kept,
                BLOCK=block,
                EMPTY=EMPTY_KEY,
                **launch_options(warps),
            )
        if n_parts == 1:
            return best
        keys = best
