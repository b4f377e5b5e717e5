"""Huge pages for memory whose rows are read in any order."""

import ctypes
import functools
import mmap
from collections.abc import Callable

from torch import Tensor

# Below this, the usual pages are few enough for a CPU to know where they lie.
_WORTH_ASKING = 2**22


def ask_for_huge_pages(tensor: Tensor) -> None:
    """Ask Linux to back the memory of a tensor on a CPU by huge pages, before anything is written to it.

    Rows that are read in the order of inverted lists, or because they have survived a screen, each lie on
    another page; finding so many pages takes as long as reading the rows. The kernel is free to ignore
    this, and does where huge pages are switched off.
    """
    advise = _madvise()
    if advise is None or tensor.device.type != "cpu" or tensor.nbytes < _WORTH_ASKING:
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    advise(start, end - start, mmap.MADV_HUGEPAGE)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    advise: Callable[[int, int, int], int] = function
    return advise
