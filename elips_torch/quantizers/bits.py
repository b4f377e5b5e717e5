"""Vectors of zeros and ones, packed into bytes as faiss's indexes of bits keep them."""

import torch
from torch import Tensor

from elips_torch.core.errors import ArgumentError, DtypeError, ShapeError
from elips_torch.core.validation import FLOAT_DTYPES, describe_rows

_BITS = 8


def unpack_bits(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Unpack bytes into vectors of zeros and ones, the lowest bit of a byte first, as faiss orders them.

    The squared distance of two such vectors is the Hamming distance of their codes. Each bit takes as
    much memory as a value of the dtype: 32 times that of the codes in float32, 16 times in float16.

    Args:
        codes: ``(N, D / 8)`` uint8, or ``(D / 8,)`` for one vector.
        dtype: of the vectors: float32, float16, bfloat16 or float64.

    Returns:
        ``(N, D)`` or ``(D,)``, on the device of the codes.

    Raises:
        DtypeError: codes are no uint8 tensor, or the dtype is none of these.
        ShapeError: codes have another number of dimensions.

    >>> unpack_bits(torch.tensor([[6], [129]], dtype=torch.uint8)).tolist()
    [[0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]]
    """
    if not isinstance(codes, Tensor) or codes.dtype != torch.uint8:
        raise DtypeError(f"codes is {_name(codes)}, expected a uint8 tensor")
    if codes.ndim not in (1, 2):
        raise ShapeError(f"codes has shape {tuple(codes.shape)}, expected (N, D / 8) or (D / 8,)")
    if dtype not in FLOAT_DTYPES:
        raise DtypeError(
            f"dtype is {dtype!r}, expected torch.float32, torch.float16, torch.bfloat16 or torch.float64"
        )
    vectors = torch.empty(*codes.shape, _BITS, dtype=dtype, device=codes.device)
    for bit in range(_BITS):
        vectors[..., bit] = (codes >> bit) & 1
    return vectors.flatten(-2)


def pack_bits(vectors: Tensor) -> Tensor:
    """Undo `unpack_bits`: pack vectors of zeros and ones into bytes.

    Args:
        vectors: ``(N, D)``, or ``(D,)`` for one vector, of floats, uint8 or bool, all 0 or 1; D is a multiple
            of 8.

    Returns:
        ``(N, D / 8)`` or ``(D / 8,)`` uint8, on the device of the vectors.

    Raises:
        DtypeError: vectors are no tensor of these dtypes.
        ShapeError: another number of dimensions, or D is no multiple of 8.
        ArgumentError: other values; with the numbers of the first rows that have them.

    >>> hashes = torch.tensor([[-0.5, 0.1, 2.0, -1.0, -3.0, -0.2, -0.1, -0.7]])
    >>> pack_bits(hashes > 0).tolist()
    [[6]]
    """
    if not isinstance(vectors, Tensor) or vectors.dtype not in (*FLOAT_DTYPES, torch.uint8, torch.bool):
        raise DtypeError(f"vectors is {_name(vectors)}, expected a tensor of floats, uint8 or bool")
    if vectors.ndim not in (1, 2):
        raise ShapeError(f"vectors has shape {tuple(vectors.shape)}, expected (N, D) or (D,)")
    if vectors.shape[-1] % _BITS:
        raise ShapeError(f"vectors has dim {vectors.shape[-1]}, expected a multiple of {_BITS}")
    return pack_checked("vectors", vectors)


def pack_checked(name: str, vectors: Tensor) -> Tensor:
    """Pack vectors whose dtype and shape are right; an error says that the values are those of ``name``."""
    ones = vectors == 1
    others = ~(ones | (vectors == 0)).all(-1)
    if others.any():
        where = describe_rows(others.view(-1).nonzero().flatten())
        raise ArgumentError(f"{name} has values other than 0 and 1 in {where}")
    parts = ones.unflatten(-1, (vectors.shape[-1] // _BITS, _BITS))
    codes = torch.zeros(parts.shape[:-1], dtype=torch.uint8, device=vectors.device)
    for bit in range(_BITS):
        codes |= parts[..., bit].to(torch.uint8) << bit
    return codes


def _name(value: object) -> str:
    """Return what something is, in words."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}"
    hint = " (torch.from_numpy makes a tensor)" if type(value).__name__ == "ndarray" else ""
    return f"a {type(value).__name__}{hint}"
