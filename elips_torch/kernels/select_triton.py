"""The k-th largest value of each row in Triton, by its digits.

The order of float32 is that of 32-bit integers made from their bits, and these are searched digit by
digit: each pass counts the next eight bits of the values that agree with the digits found so far.
Counting is all that depends on the values, so the result is exact; counts are kept per part of a row
and added up in the next pass, so no atomics on memory are needed.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from elips_torch.kernels.triton_language import (
    floats_of_bits,
    launch_options,
    launch_scope,
    ordered_bits,
    resident_programs,
)

DIGIT_BITS = 8
BINS = 2**DIGIT_BITS
PASSES = 32 // DIGIT_BITS
BLOCK = 2048
WARPS = 8
# Less of a row than this is not worth a program of its own.
_LEAST_PART = 8192
# Counts of that many parts are added up by each program of the next pass.
_MOST_PARTS = 128


@triton.jit
def next_digit(counts_ptr, prefix, wanted, n_parts, BINS: tl.constexpr, DIGIT_BITS: tl.constexpr):
    """Return the digits found so far with one more, and which value it is among those that agree."""
    bins = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    for part in range(n_parts):
        counts += tl.load(counts_ptr + part * BINS + bins)
    at_least = tl.cumsum(counts, axis=0, reverse=True)
    digit = tl.max(tl.where(at_least >= wanted, bins, 0), axis=0)
    larger = tl.sum(tl.where(bins > digit, counts, 0), axis=0)
    return (prefix << DIGIT_BITS) | digit, wanted - larger


@triton.jit
def digit_counts_kernel(
    values_ptr,
    before_ptr,
    after_ptr,
    state_ptr,
    n_columns,
    part_size,
    n_parts,
    row_stride,
    k,
    PASS: tl.constexpr,
    PASSES: tl.constexpr,
    BINS: tl.constexpr,
    DIGIT_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count the next digit in one part of a row, after adding up the counts of the one before.

    ``state`` holds the digits found and the place wanted among the values that have them, per row and
    pass.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if PASS > 0:
        states = state_ptr + row * (2 * (PASSES - 1))
        found = 0
        wanted = k
        if PASS > 1:
            found = tl.load(states + 2 * (PASS - 2))
            wanted = tl.load(states + 2 * (PASS - 2) + 1)
        prefix, wanted = next_digit(
            before_ptr + row * n_parts * BINS, found, wanted, n_parts, BINS, DIGIT_BITS
        )
        if part == 0:
            tl.store(states + 2 * (PASS - 1), prefix)
            tl.store(states + 2 * (PASS - 1) + 1, wanted)
    SHIFT: tl.constexpr = 32 - DIGIT_BITS * (PASS + 1)
    counts = tl.zeros((BINS,), tl.int32)
    end = tl.minimum((part + 1) * part_size, n_columns)
    for start in range(part * part_size, end, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < end
        values = tl.load(values_ptr + row * row_stride + column, mask=inside, other=0.0)
        # The sign bit is turned so that the order is that of unsigned integers.
        bits = (ordered_bits(values) ^ -(2**31)).to(tl.uint32, bitcast=True)
        if PASS > 0:
            inside &= (bits >> (SHIFT + DIGIT_BITS)) == prefix.to(tl.uint32, bitcast=True)
        counts += tl.histogram(((bits >> SHIFT) & (BINS - 1)).to(tl.int32), BINS, mask=inside)
    tl.store(after_ptr + (row * n_parts + part) * BINS + tl.arange(0, BINS), counts)


@triton.jit
def last_digit_kernel(
    counts_ptr,
    state_ptr,
    result_ptr,
    n_parts,
    PASSES: tl.constexpr,
    BINS: tl.constexpr,
    DIGIT_BITS: tl.constexpr,
):
    """Add up the counts of the last digit and write the value."""
    row = tl.program_id(0).to(tl.int64)
    states = state_ptr + row * (2 * (PASSES - 1)) + 2 * (PASSES - 2)
    prefix, _ = next_digit(
        counts_ptr + row * n_parts * BINS,
        tl.load(states),
        tl.load(states + 1),
        n_parts,
        BINS,
        DIGIT_BITS,
    )
    tl.store(result_ptr + row, floats_of_bits(prefix ^ -(2**31)))


def kth_largest_triton(
    values: Tensor,  # (Q, M) float32
    k: int,
) -> Tensor:  # (Q,) float32
    """Return the k-th largest value of each row, equal ones counted as often as they occur.

    Args:
        values: no NaN; infinities are ordinary. Columns are contiguous.
        k: 1 to M.

    Raises:
        ValueError: the arguments are outside what the kernel takes.
    """
    n_rows, n_columns = values.shape
    if not 1 <= k <= n_columns or n_columns >= 2**31 - BLOCK:
        raise ValueError(f"k is {k}, expected 1 to M = {n_columns}, with M below 2**31")
    if values.dtype != torch.float32 or values.stride(1) != 1:
        raise ValueError(f"values are {values.dtype}, expected float32 with contiguous columns")
    result = torch.empty(n_rows, dtype=torch.float32, device=values.device)
    if n_rows == 0:
        return result
    # Few long rows are divided, so that every multiprocessor has a part.
    wanted = triton.cdiv(resident_programs(values.device, 4), n_rows)
    n_parts = max(1, min(wanted, triton.cdiv(n_columns, _LEAST_PART), _MOST_PARTS))
    part_size = triton.cdiv(triton.cdiv(n_columns, n_parts), BLOCK) * BLOCK
    n_parts = triton.cdiv(n_columns, part_size)
    counts = torch.empty(2, n_rows, n_parts, BINS, dtype=torch.int32, device=values.device)
    state = torch.empty(n_rows, PASSES - 1, 2, dtype=torch.int32, device=values.device)
    constants = {"PASSES": PASSES, "BINS": BINS, "DIGIT_BITS": DIGIT_BITS}
    with launch_scope(values):
        for number in range(PASSES):
            digit_counts_kernel[(n_rows, n_parts)](
                *(values, counts[(number + 1) % 2], counts[number % 2], state),
                *(n_columns, part_size, n_parts, values.stride(0), k),
                PASS=number,
                BLOCK=BLOCK,
                **constants,
                **launch_options(WARPS),
            )
        last_digit_kernel[(n_rows,)](
            *(counts[(PASSES - 1) % 2], state, result, n_parts), **constants, **launch_options(1)
        )
    return result
