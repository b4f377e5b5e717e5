"""How much memory an index will take, before it holds anything."""

import math
from collections.abc import Iterable

from torch import Tensor

from elips_torch.indexes.base import Index
from elips_torch.indexes.inverted_lists import SLOT_ALIGNMENT
from elips_torch.indexes.listed_rows import ListedRows
from elips_torch.indexes.screened_codes import ScreenedCodes
from elips_torch.indexes.screened_vectors import ScreenedVectors
from elips_torch.indexes.screening_plane import ScreeningPlane
from elips_torch.indexes.wrappers import WrapperIndex
from elips_torch.kernels.plane import CODE_DTYPES
from elips_torch.quantizers.learned import Learned

# Scale, residual, norm and bias of a row in a plane, float32.
_TERM_BYTES = 16
# Row numbers by slot and slots by row are int64.
_SLOT_BYTES = 8
# Start, size and capacity of a list.
_LIST_BYTES = 24


def estimate_memory_bytes(index: Index, n: int) -> int:
    """Return what `memory_bytes` of an index would give with N vectors, which were added at once.

    Exact but for the lists, whose ends are padded by what is usual, and but for room for growth: lists
    that have grown in many steps have about two slots per vector, each of 8 bytes and, where a plane
    screens them, a code of it; and tensors on a GPU take twice as much. Which codes vectors in lists have
    under "l1" and "gower" is known when the index holds some: before, int8 codes are reckoned with, from 64
    features on, where these may turn out to be bfloat16 ones or none.

    Args:
        index: trained or not, with any vectors or none.
        n: N, number of vectors.

    >>> from elips_torch import SQIndex
    >>> estimate_memory_bytes(SQIndex(64, "fp16", screen="none"), 1000)
    136000
    """
    if isinstance(index, WrapperIndex):
        inside = estimate_memory_bytes(index.index, n)
        return inside + _own_bytes(index, n, other=[index.index])
    if isinstance(index, ListedRows):
        padding = index.nlist * (SLOT_ALIGNMENT - 1) // 2
        lists = _SLOT_BYTES * (2 * n + padding) + _LIST_BYTES * index.nlist
        centroids = estimate_memory_bytes(index.coarse, index.nlist)
        return lists + centroids + _own_bytes(index, n, other=[index.coarse], padding=padding)
    return _own_bytes(index, n, other=[])


def _own_bytes(index: Index, n: int, other: Iterable[Index], padding: int = 0) -> int:
    """Return the bytes of N rows of an index and of what it has learned, those of other indexes left out.

    What screens rows that lie in lists is padded, too.
    """
    total = n * sum(_row_bytes(getattr(index, name)) for name in index.held_tensors)
    if isinstance(index, ScreenedVectors):
        total += _plane_bytes(index.plane, index.vectors, n, padding)
    if isinstance(index, ScreenedCodes):
        total += index.screening_bytes(n + padding)
    foreign = {module for each in other for module in each.modules()}
    for module in index.modules():
        if isinstance(module, Learned) and module.learned_buffers and module not in foreign:
            shapes = module._expected_shapes().values()
            total += sum(4 * math.prod(size or 0 for size in shape) for shape in shapes)
    return total


def _plane_bytes(plane: ScreeningPlane, vectors: Tensor, n: int, padding: int) -> int:
    kind = plane.kind if plane.knows(vectors) and len(vectors) else plane.kind_for(vectors)
    if kind == "none":
        return 0
    if kind not in CODE_DTYPES:
        return n * _TERM_BYTES + 4 * plane.dim
    return (n + padding) * (CODE_DTYPES[kind].itemsize * plane.dim + _TERM_BYTES) + 4 * plane.dim


def _row_bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape[1:]) * tensor.itemsize
