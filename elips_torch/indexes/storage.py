"""Tensors of rows that grow."""

import math
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from elips_torch.core.huge_pages import ask_for_huge_pages

# Doubling costs about one more copy of all rows, however many batches they come in.
_GROWTH = 2
# On a CPU memory that nobody has touched costs nothing: there a reserve grows faster while it is
# small, which saves most of that copy.
_CPU_GROWTH = 64
_CPU_RESERVE_BYTES = 2**28


def durable() -> AbstractContextManager[None]:
    """Allocate ordinary tensors, also while the caller is in inference mode.

    What is stored outlives the caller's mode: an index filled during validation is trained through.
    """
    # Most calls come from within another one, and small batches would mostly wait for these modes.
    modes_are_right = not torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
    return _NOTHING if modes_are_right else _durable()


@contextmanager
def _durable() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


_NOTHING = nullcontext()


def append_rows(tensor: Tensor, reserve: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Append rows to a tensor in amortised constant time per row.

    Args:
        tensor: ``(N, ...)``, all rows so far.
        reserve: ``(capacity, ...)`` whose first N rows are the tensor, as returned last time; None
            or another tensor when there is no such memory.
        rows: ``(M, ...)``.

    Returns:
        The tensor ``(N + M, ...)``, a view of the reserve, and the reserve.
    """
    grown, reserve = extend_rows(tensor, reserve, rows.shape[0])
    # Through `data`, so that autograd does not take the rows before for changed.
    reserve.data[tensor.shape[0] : grown.shape[0]] = rows
    return grown, reserve


def extend_rows(tensor: Tensor, reserve: Tensor | None, n: int) -> tuple[Tensor, Tensor]:
    """Append so many rows, of any values; otherwise as `append_rows`."""
    old, new = tensor.shape[0], tensor.shape[0] + n
    if reserve is None or not _holds(reserve, tensor) or reserve.shape[0] < new:
        reserve = _allocate(max(new, _grown(tensor)), tensor)
        reserve[:old] = tensor
    return reserve[:new], reserve


def _grown(tensor: Tensor) -> int:
    rows, row_bytes = tensor.shape[0], max(1, tensor[:1].nbytes)
    if tensor.device.type != "cpu" or not rows:
        return _GROWTH * rows
    return max(_GROWTH * rows, min(_CPU_GROWTH * rows, _CPU_RESERVE_BYTES // row_bytes))


def _allocate(rows: int, like: Tensor) -> Tensor:
    # Unlike `torch.empty`, a bare storage is not filled in deterministic mode: filling would touch
    # all of the reserve at each growth.
    shape = (rows, *like.shape[1:])
    storage = torch.UntypedStorage(math.prod(shape) * like.itemsize, device=like.device)
    flat = torch.empty(0, dtype=like.dtype, device=like.device).set_(storage)
    ask_for_huge_pages(flat)
    reserve: Tensor = flat.view(shape)
    return reserve


def _holds(reserve: Tensor, tensor: Tensor) -> bool:
    same_kind = reserve.dtype == tensor.dtype and reserve.device == tensor.device
    return same_kind and reserve.data_ptr() == tensor.data_ptr()


def owned(tensor: Tensor) -> Tensor:
    """Return an ordinary tensor that owns exactly its own memory; a copy only where it is none."""
    if tensor.is_inference() or tensor.untyped_storage().nbytes() != tensor.nbytes:
        return tensor.clone()
    return tensor


class Snapshot:
    """Remembers a tensor as it is, to tell later whether somebody wrote into it or replaced it.

    Writes through ``tensor.data`` and by fused optimisers are not seen: torch does not count them.
    """

    def __init__(self, tensor: Tensor) -> None:
        # Another tensor may come to lie at the same address.
        self._tensor = weakref.ref(tensor)
        # Torch does not count what is written into a tensor of inference mode.
        self._version = None if tensor.is_inference() else tensor._version
        self._address, self._dtype, self._shape = tensor.data_ptr(), tensor.dtype, tensor.shape

    def matches(self, tensor: Tensor) -> bool:
        """Whether the tensor is still what it was."""
        return (
            self._tensor() is tensor
            and not tensor.is_inference()
            and self._version == tensor._version
            and self._address == tensor.data_ptr()
            and self._dtype == tensor.dtype
            and self._shape == tensor.shape
        )
