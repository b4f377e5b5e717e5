"""Tiles of a screened search: products of codes, in memory that is used again."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from elips_torch.core.hardware import int8_product_is_fast

# Torch 2.13 multiplies int8 matrices of a single column wrongly.
_LEAST_INT8_DIM = 8


class Buffers:
    """Memory that one part of the queries hands to the next: touching new pages costs as much as the work."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: dict[str, Tensor] = {}

    def get(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return uninitialised memory of a shape; what it held under this name is lost."""
        size = math.prod(shape)
        memory = self._memory.get(name)
        if memory is None or memory.numel() < size or memory.dtype != dtype:
            memory = self._memory[name] = torch.empty(size, dtype=dtype, device=self._device)
        return memory[:size].view(shape)


def _is_int8_product(codes: Tensor) -> bool:
    fast = codes.dtype == torch.int8 and codes.shape[1] >= _LEAST_INT8_DIM
    return fast and int8_product_is_fast(codes.device)


def widened_bytes(codes: Tensor) -> int:
    """Return the bytes per row that `code_products` takes to widen codes ``(N, D)``."""
    if codes.dtype == torch.float32 or _is_int8_product(codes):
        return 0
    return 4 * codes.shape[1]


def code_products(codes: Tensor, query_codes: Tensor, buffers: Buffers) -> Tensor:
    """Return the product ``(R, Q)`` of codes ``(R, D)`` and ``(D, Q)``, as exact as `screen` counts on."""
    shape = (codes.shape[0], query_codes.shape[1])
    if _is_int8_product(codes):
        return torch._int_mm(codes, query_codes, out=buffers.get("products", *shape, dtype=torch.int32))
    # Codes are exact also in TF32 and, for int8, in bfloat16, which a float32 product may be run in.
    return torch.mm(codes.float(), query_codes.float(), out=buffers.get("products", *shape))


def padded(rows: Tensor, missing: int, fill: Sequence[float] = ()) -> Tensor:
    """Return the rows ``(R, M)`` and ``missing`` more, of zeros or of what is given."""
    if not missing:
        return rows.contiguous()
    more = rows.new_tensor(fill).expand(missing, -1) if fill else rows.new_zeros(missing, rows.shape[1])
    return torch.cat([rows, more])
