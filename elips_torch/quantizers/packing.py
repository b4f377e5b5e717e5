"""Small numbers packed into bytes, lowest bits first, in the order of faiss."""

import torch
from torch import Tensor


def packed_size(count: int, bits: int) -> int:
    """Return the bytes that hold ``count`` numbers of 4, 6 or 8 bits.

    >>> packed_size(5, 4), packed_size(5, 6)
    (3, 4)
    """
    return (count * bits + 7) // 8


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Pack numbers ``(N, M)`` uint8 below ``2**bits`` into bytes ``(N, packed_size(M, bits))`` uint8.

    >>> pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist()
    [[33, 3]]
    """
    if bits == 8:
        return numbers
    n, count = numbers.shape
    group = 2 if bits == 4 else 4
    padded = torch.nn.functional.pad(numbers, (0, -count % group)).view(n, -(-count // group), group)
    if bits == 4:
        low, high = padded.unbind(2)
        return low | (high << 4)
    # Four numbers of 6 bits fill three bytes. Shifts drop what leaves a byte.
    a, b, c, d = padded.unbind(2)
    packed = torch.stack([a | (b << 6), (b >> 2) | (c << 4), (c >> 4) | (d << 2)], 2)
    return packed.flatten(1)[:, : packed_size(count, bits)].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo `pack`: return numbers ``(N, count)`` uint8.

    >>> unpack(torch.tensor([[33, 3]], dtype=torch.uint8), 4, 3).tolist()
    [[1, 2, 3]]
    """
    if bits == 8:
        return packed
    n = packed.shape[0]
    if bits == 4:
        numbers = torch.stack([packed & 15, packed >> 4], 2)
    else:
        padded = torch.nn.functional.pad(packed, (0, -packed.shape[1] % 3)).view(n, -(-count // 4), 3)
        low, middle, high = padded.unbind(2)
        a, b = low & 63, (low >> 6) | ((middle & 15) << 2)
        c, d = (middle >> 4) | ((high & 3) << 4), high >> 2
        numbers = torch.stack([a, b, c, d], 2)
    return numbers.flatten(1)[:, :count]
