"""Vectors in the files of the TexMex and billion-scale datasets: fvecs, bvecs and ivecs.

Each row of a file is its size as a little-endian int32, and then that many numbers: float32 in fvecs, uint8
in bvecs, int32 in ivecs.
"""

import os
import secrets
from pathlib import Path

import torch
from torch import Tensor

from elips_torch.core.errors import DtypeError, IndexFileError, ShapeError
from elips_torch.core.tiling import spans
from elips_torch.core.validation import check_flag

_HEADER_BYTES = 4
# Headers that are looked at in a file that is mapped: looking at all would read most of it.
_LOOKED_AT = 1000
# Numbers written at a time.
_NUMBERS_AT_ONCE = 2**22


def read_fvecs(path: str | os.PathLike[str], *, mmap: bool = False) -> Tensor:
    """Read the vectors of an fvecs file.

    Args:
        path: the file.
        mmap: map the file rather than read it: rows are read when they are used. They are a view with gaps in
            between; writing into it does not change the file. The sizes of a thousand rows are checked then,
            else those of all.

    Returns:
        ``(N, D)`` float32.

    Raises:
        FileNotFoundError: there is no such file.
        IndexFileError: no such file of vectors of one size.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_fvecs(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), f"{folder}/two.fvecs")
    ...     read_fvecs(f"{folder}/two.fvecs")
    tensor([[1., 2.],
            [3., 4.]])
    """
    return _read(path, torch.float32, mmap)


def read_ivecs(path: str | os.PathLike[str], *, mmap: bool = False) -> Tensor:
    """Read an ivecs file, such as one of true neighbours; see `read_fvecs`.

    Returns:
        ``(N, D)`` int32.
    """
    return _read(path, torch.int32, mmap)


def read_bvecs(path: str | os.PathLike[str], *, mmap: bool = False) -> Tensor:
    """Read a bvecs file; see `read_fvecs`.

    Returns:
        ``(N, D)`` uint8.
    """
    return _read(path, torch.uint8, mmap)


def write_fvecs(vectors: Tensor, path: str | os.PathLike[str]) -> None:
    """Write vectors to an fvecs file, which appears whole or not at all.

    Args:
        vectors: ``(N, D)`` float32, on any device.
        path: where to write; an existing file is replaced.

    Raises:
        DtypeError: another dtype, which is not converted in silence.
        ShapeError: not ``(N, D)`` with N and D at least 1: the format cannot say how large no vectors are.
        FileNotFoundError: there is no such folder.
    """
    _write(vectors, path, torch.float32)


def write_ivecs(vectors: Tensor, path: str | os.PathLike[str]) -> None:
    """Write ``(N, D)`` int32 numbers to an ivecs file; see `write_fvecs`."""
    _write(vectors, path, torch.int32)


def write_bvecs(vectors: Tensor, path: str | os.PathLike[str]) -> None:
    """Write ``(N, D)`` uint8 numbers to a bvecs file; see `write_fvecs`."""
    _write(vectors, path, torch.uint8)


def _read(path: str | os.PathLike[str], dtype: torch.dtype, mmap: bool) -> Tensor:
    check_flag("mmap", mmap)
    where = repr(os.fspath(path))
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file of vectors at {where}")
    size = Path(path).stat().st_size
    if size <= _HEADER_BYTES:
        raise IndexFileError(f"{where} has {size} bytes, expected vectors")
    # A private mapping: writing into it copies the page.
    content = torch.from_file(os.fspath(path), shared=False, size=size, dtype=torch.uint8, device="cpu")
    dim = int(content[:_HEADER_BYTES].view(torch.int32))
    row_bytes = _HEADER_BYTES + dim * dtype.itemsize
    if dim < 1 or size % row_bytes:
        raise IndexFileError(
            f"{where} has {size} bytes and begins with a row of {dim} numbers, expected rows of "
            f"{_HEADER_BYTES} + {dtype.itemsize} x {max(dim, 1)} bytes"
        )
    rows = content.view(-1, row_bytes)
    looked_at = torch.arange(len(rows), device="cpu")
    if mmap and len(rows) > _LOOKED_AT:
        looked_at = torch.linspace(0, len(rows) - 1, _LOOKED_AT, dtype=torch.float64, device="cpu").long()
    sizes = rows[:, :_HEADER_BYTES][looked_at].view(torch.int32)[:, 0]
    other = (sizes != dim).nonzero()[:, 0]
    if other.numel():
        row = int(other[0])
        raise IndexFileError(
            f"{where} has a row of {int(sizes[row])} numbers at place {int(looked_at[row])}, "
            f"expected {dim} as in the first"
        )
    # Rows begin at multiples of the size of a number: their headers are as long as one, or it is a byte.
    vectors = rows.view(dtype)[:, _HEADER_BYTES // dtype.itemsize :]
    return vectors if mmap else vectors.clone(memory_format=torch.contiguous_format)


def _write(vectors: Tensor, path: str | os.PathLike[str], dtype: torch.dtype) -> None:
    if not isinstance(vectors, Tensor) or vectors.dtype != dtype:
        got = vectors.dtype if isinstance(vectors, Tensor) else type(vectors).__name__
        raise DtypeError(f"vectors is {got}, expected a tensor of {dtype}")
    if vectors.ndim != 2 or not vectors.numel():
        raise ShapeError(f"vectors has shape {tuple(vectors.shape)}, expected (N, D), both at least 1")
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no folder {os.fspath(target.parent)!r} to write vectors in")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    n, dim = vectors.shape
    header = torch.tensor([dim], dtype=torch.int32, device="cpu").view(torch.uint8)
    try:
        with open(temporary, "wb") as file:
            for start, stop in spans(n, max(1, _NUMBERS_AT_ONCE // dim)):
                numbers = vectors[start:stop].detach().cpu().contiguous().view(torch.uint8)
                rows = torch.cat([header.expand(stop - start, -1), numbers], 1)
                file.write(rows.numpy().data)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
