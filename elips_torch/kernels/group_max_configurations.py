"""Block sizes of the group-maximum kernels, per architecture and dtype.

The table is static: nothing is measured when a kernel is first used. It follows from compiling
ahead of time (no spills, shared memory within the device) and from arithmetic; no entry has been
tuned on hardware.
"""

import dataclasses

import torch

FAMILIES = ("sm_80", "sm_90", "sm_100", "gfx942")
# Up to this many queries the database is read at memory speed, whatever is done with it.
SMALL_QUERIES = 2
# Up to this many queries, database rows are the first axis of the product. The threads of sm_100
# hold whole rows of it, and so reduce few of them at a time.
MEDIUM_QUERIES = {"sm_80": 128, "sm_90": 128, "sm_100": 64, "gfx942": 128}
# Up to this many queries, what belongs to them stays in registers while the database streams by.
_STREAM_QUERIES = {"sm_80": 32, "sm_90": 32, "sm_100": 32, "gfx942": 16}
# From this many features on, wider blocks hide more of the work on each score.
_WIDE_FEATURES = 256
_SMALL_FEATURES = {torch.int8: 128, torch.bfloat16: 128, torch.float16: 128, torch.float32: 64}


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What one program computes at a time, and with how many warps and pipeline stages.

    What belongs to rows is loaded in the products' own layout only where a block has fewer rows than
    threads; a wide block is two of such side by side.
    """

    queries: int
    rows: int
    features: int
    warps: int
    stages: int
    wide: bool = False

    @property
    def program_rows(self) -> int:
        """Rows of the database that one program takes."""
        return 2 * self.rows if self.wide else self.rows


# Features are given in bytes per row of a block: 128 bytes is the widest swizzle of shared memory.
_MEDIUM = {
    "sm_80": Blocks(128, 128, 128, 4, 3),
    "sm_90": Blocks(128, 128, 128, 4, 4),
    "sm_100": Blocks(128, 128, 128, 4, 3),
    "gfx942": Blocks(128, 128, 128, 4, 2),
}
_LARGE = {
    "sm_80": Blocks(128, 128, 128, 8, 3),
    "sm_90": Blocks(128, 128, 128, 8, 3),
    "sm_100": Blocks(128, 128, 128, 8, 3),
    "gfx942": Blocks(128, 128, 128, 8, 2),
}
_LARGE_WIDE = {
    **_LARGE,
    "sm_90": Blocks(128, 128, 128, 8, 3, wide=True),
    "sm_100": Blocks(128, 128, 128, 8, 3, wide=True),
}
# Up to this many queries of an inverted list share a program.
_LIST = {
    "sm_80": Blocks(64, 128, 128, 8, 3),
    "sm_90": Blocks(64, 128, 128, 8, 3),
    "sm_100": Blocks(64, 128, 128, 8, 3),
    "gfx942": Blocks(64, 128, 128, 4, 2),
}
# Without tensor cores a score costs one multiply-add per feature, out of registers.
_LARGE_FLOAT32 = Blocks(64, 64, 64, 8, 2)


def _features(dim: int, preferred: int, least: int) -> int:
    """Return the widest block of features that divides the dimension, if one of a fair size does."""
    width = preferred
    while width > least:
        if dim % width == 0:
            return width
        width //= 2
    if dim % least == 0 or dim <= least:
        return least
    return preferred


def small_blocks(dtype: torch.dtype, n_queries: int, dim: int, group: int) -> Blocks:
    """Return the blocks of the kernel for one or two queries."""
    # Sums of two queries take twice the registers.
    features = _features(dim, _SMALL_FEATURES[dtype] // n_queries, 32)
    return Blocks(n_queries, max(group, 64), features, 4 if group <= 64 else 8, 1)


def medium_blocks(family: str, dtype: torch.dtype, n_queries: int, dim: int, group: int) -> Blocks:
    """Return the blocks of the kernel that has database rows on the first axis of the product."""
    base = _MEDIUM[family]
    queries = max(16, 1 << (n_queries - 1).bit_length())
    features = _features(dim, base.features // dtype.itemsize, 32)
    if dtype == torch.float32:
        # Full float32 products run on the ordinary units.
        return Blocks(min(queries, 64), max(group, 64), 32, 4, 2)
    warps = 8 if queries >= 64 else base.warps
    return Blocks(queries, max(group, base.rows), features, warps, base.stages)


def large_blocks(family: str, dtype: torch.dtype, dim: int, group: int) -> Blocks:
    """Return the blocks of the kernel for many queries."""
    if dtype == torch.float32:
        return dataclasses.replace(_LARGE_FLOAT32, rows=max(group, _LARGE_FLOAT32.rows), features=32)
    base = (_LARGE_WIDE if dim >= _WIDE_FEATURES else _LARGE)[family]
    features = _features(dim, base.features // dtype.itemsize, 32)
    return dataclasses.replace(base, rows=max(group, base.rows), features=features)


def list_blocks(family: str, dtype: torch.dtype, dim: int, group: int) -> Blocks:
    """Return the blocks of the kernel for several queries of an inverted list."""
    if dtype == torch.float32:
        return Blocks(32, max(group, 64), 32, 4, 2)
    base = _LIST[family]
    features = _features(dim, base.features // dtype.itemsize, 32)
    return dataclasses.replace(base, rows=max(group, base.rows), features=features)


def streams(family: str, blocks: Blocks, n_queries: int, dim: int) -> bool:
    """Whether few queries with few features stay in place while the database streams by."""
    return dim <= blocks.features and n_queries <= min(blocks.queries, _STREAM_QUERIES[family])
