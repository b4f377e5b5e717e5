"""Columns of parquet and arrow files, read a part at a time.

Arrow files are those of `pyarrow.ipc` in either form, file or stream, such as Hugging Face's datasets keep.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elips_torch.core.errors import ArgumentError, DtypeError, ShapeError

SUFFIXES = (".parquet", ".arrow", ".feather")
_INSTALL = 'parquet and arrow files need pyarrow: pip install "elips-torch[arrow]"'


def check_pyarrow() -> None:
    """Check that such files can be read and written.

    Raises:
        ImportError: pyarrow is missing, with the line that installs it.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise ImportError(_INSTALL)


def chosen_name(where: str, what: str, name: str | None, fitting: Sequence[str], held: Sequence[str]) -> str:
    """Return the name asked for, which must be held, or that of the only one that fits.

    Raises:
        ArgumentError: there is no such name, or it must be said which of several is meant.
    """
    if name is None and len(fitting) == 1:
        return fitting[0]
    have = f"it has {', '.join(map(repr, held)) or 'none'}"
    if name is None:
        example = f"{where}:{(fitting or held or ['NAME'])[0]}"
        raise ArgumentError(f"{where} does not say which {what} is meant, {have}; write {example}")
    if name not in held:
        raise ArgumentError(f"{where} names no {what} of the file, {have}")
    return name


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a file.

    Attributes:
        where: file and name, for messages.
        n: number of rows.
        kind: type of the rows, as pyarrow has it.
        chunks: yields the rows in order as arrow arrays, at most so many at a time.
    """

    where: str
    n: int
    kind: Any
    chunks: Callable[[int], Iterator[Any]]

    def width(self) -> int:
        """Return how many numbers each row has; the first one says it where the type does not.

        Raises:
            ShapeError, DtypeError: rows are no lists of numbers.
            ArgumentError: the first is missing.
        """
        kind = _storage(self.kind)
        if not _is_list(kind):
            raise ShapeError(f"{self.where} has rows of type {self.kind}, expected lists of numbers")
        if not _is_number(kind.value_type):
            raise DtypeError(f"{self.where} has lists of {kind.value_type}, expected numbers")
        if getattr(kind, "list_size", 0):
            return int(kind.list_size)
        for chunk in self.chunks(1):
            if len(chunk):
                self._check_complete(chunk, 0)
                return len(chunk[0])
        return 0

    def vectors(self, rows: int) -> Iterator[Tensor]:
        """Yield the rows as ``(B, D)``, B at most rows.

        Raises:
            ShapeError: a row has another length than the first.
            ArgumentError: a row or a number is missing.
        """
        width, start = self.width(), 0
        for chunk in self.chunks(rows):
            lengths = chunk.value_lengths()
            self._check_complete(chunk, start)
            lengths = torch.tensor(lengths.to_numpy(zero_copy_only=False))
            other = (lengths != width).nonzero()
            if len(other):
                row = int(other[0])
                raise ShapeError(
                    f"{self.where} has {int(lengths[row])} numbers in row {start + row:,}, expected {width} "
                    "as in the first"
                )
            yield _to_tensor(chunk.flatten()).view(-1, width)
            start += len(chunk)

    def lists(self) -> tuple[Tensor, Tensor]:
        """Return whole numbers, one or a list of them per row, and where each row begins.

        A row that is missing counts as an empty list.

        Returns:
            ``(M,)`` and ``(N + 1,)`` int64.

        Raises:
            DtypeError: other rows.
        """
        import pyarrow as pa

        kind = _storage(self.kind)
        if not holds_ids(kind):
            raise DtypeError(
                f"{self.where} has rows of type {self.kind}, expected whole numbers or lists of them"
            )
        numbers, lengths = [], []
        for chunk in self.chunks(2**16):
            flat = chunk.flatten() if _is_list(kind) else chunk.drop_null()
            if flat.null_count:
                raise ArgumentError(f"{self.where} has lists with missing numbers, expected whole numbers")
            counts = (
                chunk.value_lengths().fill_null(0) if _is_list(kind) else chunk.is_valid().cast(pa.int32())
            )
            numbers.append(_to_tensor(flat).long())
            lengths.append(_to_tensor(counts).long())
        if not numbers:
            return torch.empty(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        lims = torch.cat([torch.zeros(1, dtype=torch.int64), *lengths]).cumsum(0)
        return torch.cat(numbers), lims

    def _check_complete(self, chunk: Any, start: int) -> None:
        if chunk.null_count:
            row = chunk.is_null().to_pylist().index(True)
            raise ArgumentError(f"{self.where} has no vector in row {start + row:,}")
        if chunk.flatten().null_count:
            row = next(i for i, each in enumerate(chunk) if None in each.as_py())
            raise ArgumentError(f"{self.where} lacks a number in row {start + row:,}")


def open_column(path: Path, name: str | None, *, fits: Callable[[Any], bool]) -> Column:
    """Open a column of a parquet or arrow file, without reading it.

    Args:
        path: the file.
        name: of the column; None stands for the only one that fits.
        fits: says of a type whether it is the kind of column that is wanted.

    Raises:
        ArgumentError: the file is damaged, or has no such column.
        ImportError: pyarrow is missing.
    """
    check_pyarrow()
    import pyarrow as pa

    try:
        table = _Parquet(path) if path.suffix.lower() == ".parquet" else _Arrow(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ArgumentError(f"{path} cannot be read as {path.suffix[1:]}: {error}") from error
    fitting = [field.name for field in table.schema if fits(field.type)]
    where = str(path) if name is None else f"{path}:{name}"
    found = chosen_name(where, "column", name, fitting, table.schema.names)
    kind = table.schema.field(found).type

    def chunks(rows: int) -> Iterator[Any]:
        for chunk in table.chunks(found, rows):
            # Types of their own, such as fixed-shape tensors, are stored as lists.
            yield chunk.storage if hasattr(chunk, "storage") else chunk

    return Column(f"{path}:{found}", table.n, kind, chunks)


def holds_vectors(kind: Any) -> bool:
    """Return whether rows of a type are lists of floating-point numbers."""
    import pyarrow as pa

    return _is_list(_storage(kind)) and bool(pa.types.is_floating(_storage(kind).value_type))


def holds_ids(kind: Any) -> bool:
    """Return whether rows of a type are whole numbers or lists of them."""
    import pyarrow as pa

    kind = _storage(kind)
    return bool(pa.types.is_integer(kind.value_type if _is_list(kind) else kind))


class _Parquet:
    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self._path = path
        with pq.ParquetFile(path) as file:
            self.schema, self.n = file.schema_arrow, file.metadata.num_rows

    def chunks(self, name: str, rows: int) -> Iterator[Any]:
        import pyarrow.parquet as pq

        with pq.ParquetFile(self._path, memory_map=True) as file:
            for batch in file.iter_batches(batch_size=rows, columns=[name]):
                yield batch.column(0)


class _Arrow:
    def __init__(self, path: Path) -> None:
        self._path = path
        with closing(self._batches()) as batches:
            self.schema = next(batches)
            self.n = sum(batch.num_rows for batch in batches)

    def chunks(self, name: str, rows: int) -> Iterator[Any]:
        with closing(self._batches()) as batches:
            place = next(batches).get_field_index(name)
            for batch in batches:
                for start in range(0, batch.num_rows, rows):
                    yield batch.column(place)[start : start + rows]

    def _batches(self) -> Generator[Any, None, None]:
        """Yield the schema, then the batches; mapped, so that what is not used is not read."""
        import pyarrow as pa

        with pa.memory_map(str(self._path)) as mapped:
            try:
                reader = pa.ipc.open_file(mapped)
            except pa.ArrowInvalid:
                mapped.seek(0)
                with pa.ipc.open_stream(mapped) as stream:
                    yield stream.schema
                    yield from stream
                    return
            yield reader.schema
            for i in range(reader.num_record_batches):
                yield reader.get_batch(i)


def _storage(kind: Any) -> Any:
    return getattr(kind, "storage_type", kind)


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_number(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))


def _to_tensor(array: Any) -> Tensor:
    """Copy numbers out of a mapping, which may be closed and may not be written to."""
    return torch.tensor(array.to_numpy(zero_copy_only=False))
