"""Vectors that lie in files and are read a part at a time: npy, safetensors, fvecs, bvecs, parquet, arrow.

A source is written ``FILE`` or, for files that hold several tensors or columns, ``FILE:NAME``. Files are
mapped into memory, so a part that nobody asks for is not read.
"""

import dataclasses
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from elips_torch.cli import arrow_columns
from elips_torch.cli.arrow_columns import chosen_name
from elips_torch.core.errors import ArgumentError, DtypeError, IndexFileError, NonFiniteError, ShapeError
from elips_torch.core.metric import Metric, resolve_metric
from elips_torch.core.progress import with_progress
from elips_torch.core.tiling import spans
from elips_torch.core.validation import FLOAT_DTYPES, check_values, describe_rows, rows_outside_domain
from elips_torch.evaluation.vector_files import read_bvecs, read_fvecs, read_ivecs

# How many rows are read at a time: about 16 MiB of float32.
_NUMBERS_AT_ONCE = 2**22
_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
SUFFIXES = (".npy", ".safetensors", ".fvecs", ".bvecs", ".ivecs", ".parquet", ".arrow", ".feather")


@dataclasses.dataclass(frozen=True)
class Place:
    """A file, and which of its tensors or columns is meant.

    Attributes:
        text: as it was written, for messages.
        path: the file.
        name: of the tensor or column; None where the file has one.
    """

    text: str
    path: Path
    name: str | None

    @property
    def suffix(self) -> str:
        """What kind of file it is."""
        return self.path.suffix.lower()


@dataclasses.dataclass(frozen=True)
class VectorSource:
    """Vectors ``(N, D)`` in a file.

    Attributes:
        place: where they are.
        n: N.
        dim: D.
        read: yields the rows in order, at most so many at a time, as they are stored.
    """

    place: Place
    n: int
    dim: int
    read: Callable[[int], Iterator[Tensor]]

    def batches(self, rows: int | None = None, *, metric: str = "l2") -> "Batches":
        """Return what yields the vectors in parts.

        Args:
            rows: how many at a time; default is about 16 MiB.
            metric: whose values they must have: finite, and for some within bounds.
        """
        return Batches(self, rows or max(1, _NUMBERS_AT_ONCE // self.dim), metric)

    def take(self, rows: Tensor, *, metric: str = "l2", progress: bool = False) -> Tensor:
        """Return some of the vectors; reads the file once, a part at a time.

        Args:
            rows: ``(S,)`` their places, ascending.
            metric: as for `batches`.
            progress: show a progress bar.

        Returns:
            ``(S, D)``.
        """
        parts, start = [], 0
        for batch in with_progress(self.batches(metric=metric), progress, "reading", "batch"):
            inside = (rows >= start) & (rows < start + len(batch))
            parts.append(batch[rows[inside] - start])
            start += len(batch)
        return torch.cat(parts)

    def sample(self, size: int, seed: int, *, metric: str = "l2", progress: bool = False) -> Tensor:
        """Return so many of the vectors, or all where there are no more, chosen at random; see `take`."""
        return self.take(sample_rows(self.n, size, seed), metric=metric, progress=progress)


@dataclasses.dataclass(frozen=True)
class Batches:
    """Yields the vectors of a source in floating point, checked, with their number known beforehand."""

    source: VectorSource
    rows: int
    metric: str

    def __len__(self) -> int:
        return -(-self.source.n // self.rows)

    def __iter__(self) -> Iterator[Tensor]:
        metric, start = resolve_metric(self.metric), 0
        for batch in self.source.read(self.rows):
            vectors = batch if batch.dtype in FLOAT_DTYPES else batch.float()
            self._check(vectors, metric, start)
            yield vectors
            start += len(vectors)

    def _check(self, vectors: Tensor, metric: Metric, start: int) -> None:
        try:
            check_values("vectors", vectors, metric)
        except NonFiniteError as error:
            # Rows are named by their place in the file, not in the part.
            rows = start + rows_outside_domain(vectors, metric).nonzero()[:, 0]
            low, high = metric.domain
            wanted = "finite values" if low == -torch.inf else f"finite values in [{low:g}, {high:g}]"
            raise NonFiniteError(
                f"{self.source.place.text} has NaN, infinity or values outside what {metric.name!r} takes in "
                f"{describe_rows(rows)}, expected {wanted}"
            ) from error


def sample_rows(n: int, size: int, seed: int) -> Tensor:
    """Return so many of n places, chosen at random, ascending; all where there are no more.

    >>> sample_rows(3, 5, seed=0)
    tensor([0, 1, 2])
    """
    if size >= n:
        return torch.arange(n)
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:size].sort().values


def parse_place(text: str) -> Place:
    """Split ``FILE`` or ``FILE:NAME``.

    Raises:
        ArgumentError: there is no such file, or nothing is known of its kind.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Path(folder, "all.safetensors").touch()
    ...     parse_place(f"{folder}/all.safetensors:queries").name
    'queries'
    """
    path, name = Path(text), None
    if not path.is_file():
        match = re.fullmatch(r"(.+\.\w+):([^/\\]+)", text)
        if match is not None:
            path, name = Path(match[1]), match[2]
    if not path.is_file():
        raise ArgumentError(f"no file at {os.fspath(path)!r}")
    if path.suffix.lower() not in SUFFIXES:
        raise ArgumentError(f"{os.fspath(path)!r} ends in {path.suffix!r}, expected {', '.join(SUFFIXES)}")
    return Place(text, path, name)


def open_vectors(text: str) -> VectorSource:
    """Open vectors of any kind of file, without reading them.

    Args:
        text: ``FILE`` or ``FILE:NAME``.

    Raises:
        ArgumentError: no such file, kind of file, tensor or column; the file is damaged or empty.
        ShapeError: no ``(N, D)``.
        DtypeError: neither floating-point nor whole numbers.
        ImportError: parquet or arrow, and pyarrow is not installed.
    """
    place = parse_place(text)
    if place.suffix in arrow_columns.SUFFIXES:
        column = arrow_columns.open_column(place.path, place.name, fits=arrow_columns.holds_vectors)
        n, dim = column.n, column.width()
        read: Callable[[int], Iterator[Tensor]] = column.vectors
    else:
        shape, dtype, read = open_tensor(place)
        if len(shape) != 2:
            raise ShapeError(f"{place.text} has shape {shape}, expected (N, D)")
        if dtype not in (*FLOAT_DTYPES, *_INTEGERS):
            raise DtypeError(f"{place.text} holds {dtype}, expected floating-point or whole numbers")
        n, dim = shape
    if not n or not dim:
        raise ArgumentError(f"{place.text} has shape ({n}, {dim}), expected at least one vector")
    return VectorSource(place, n, dim, read)


def open_tensor(place: Place) -> tuple[tuple[int, ...], torch.dtype, Callable[[int], Iterator[Tensor]]]:
    """Return shape and dtype of a tensor in a file, and what reads it in parts along the first axis.

    Raises:
        ArgumentError: the file is damaged or lacks the tensor.
    """
    if place.suffix == ".safetensors":
        return _open_safetensors(place)
    if place.name is not None:
        raise ArgumentError(
            f"{place.text} names {place.name!r}, but {place.suffix} files hold one array without a name"
        )
    if place.suffix == ".npy":
        tensor = _map_npy(place)
    else:
        readers = {".fvecs": read_fvecs, ".bvecs": read_bvecs, ".ivecs": read_ivecs}
        try:
            tensor = readers[place.suffix](place.path, mmap=True)
        except IndexFileError as error:
            raise ArgumentError(str(error)) from error
    return tuple(tensor.shape), tensor.dtype, lambda rows: _parts(tensor, rows)


def _map_npy(place: Place) -> Tensor:
    try:
        array = np.load(place.path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ArgumentError(f"{place.text} cannot be read as an npy file: {error}") from error
    if not array.dtype.isnative:
        raise DtypeError(
            f"{place.text} holds {array.dtype.str}, whose bytes are in another order than this machine's"
        )
    with warnings.catch_warnings():
        # The file is not written: parts are copied before anybody sees them.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        try:
            return torch.from_numpy(array)
        except TypeError as error:
            raise DtypeError(f"{place.text} holds {array.dtype}, expected numbers that torch has") from error


def _parts(tensor: Tensor, rows: int) -> Iterator[Tensor]:
    for start, stop in spans(len(tensor), rows):
        yield tensor[start:stop].clone(memory_format=torch.contiguous_format)


def _open_safetensors(place: Place) -> tuple[tuple[int, ...], torch.dtype, Callable[[int], Iterator[Tensor]]]:
    try:
        with safe_open(place.path, "pt") as file:
            held = list(file.keys())
            name = chosen_name(place.text, "tensor", place.name, held, held)
            piece = file.get_slice(name)
            shape = tuple(piece.get_shape())
            dtype = (piece[:0] if shape else file.get_tensor(name)).dtype
    except (OSError, SafetensorError) as error:
        raise ArgumentError(f"{place.text} cannot be read as a safetensors file: {error}") from error

    def read(rows: int) -> Iterator[Tensor]:
        with safe_open(place.path, "pt") as file:
            piece = file.get_slice(name)
            for start, stop in spans(shape[0], rows):
                yield piece[start:stop].clone()

    return shape, dtype, read
