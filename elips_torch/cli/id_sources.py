"""Whole numbers that lie in files: ids of vectors, and the relevant or true ids of queries."""

import dataclasses

import torch
from torch import Tensor

from elips_torch.cli import arrow_columns
from elips_torch.cli.vector_sources import open_tensor, parse_place
from elips_torch.core.errors import ArgumentError, DtypeError, ShapeError

_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
_ROWS_AT_ONCE = 2**16


@dataclasses.dataclass(frozen=True)
class IdLists:
    """Any number of ids for each row.

    Attributes:
        where: file and name, for messages.
        ids: ``(M,)`` int64, those of all rows one after the other; -1 stands for none.
        lims: ``(N + 1,)`` int64: those of row i are ``ids[lims[i]:lims[i + 1]]``.
    """

    where: str
    ids: Tensor
    lims: Tensor

    def __len__(self) -> int:
        return len(self.lims) - 1

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return ids and lims of some of the rows."""
        lims = self.lims[start : stop + 1]
        return self.ids[int(lims[0]) : int(lims[-1])], lims - lims[0]

    def table(self) -> Tensor:
        """Return ``(N, K)`` where each row has as many ids.

        Raises:
            ShapeError: some have more than others.
        """
        counts = self.lims.diff()
        if not len(counts) or not bool((counts == counts[0]).all()):
            raise ShapeError(
                f"{self.where} has between {_extremes(counts)} ids per row, expected as many in each"
            )
        return self.ids.view(len(self), -1)


def read_id_lists(text: str) -> IdLists:
    """Read a number or several for each row.

    Args:
        text: ``FILE`` or ``FILE:NAME``: an array ``(N,)`` or ``(N, R)``, padded by -1, or a column of whole
            numbers or of lists of them.

    Raises:
        ElipsError: no such file, tensor or column; other contents.
        ImportError: parquet or arrow, and pyarrow is not installed.
    """
    place = parse_place(text)
    if place.suffix in arrow_columns.SUFFIXES:
        column = arrow_columns.open_column(place.path, place.name, fits=arrow_columns.holds_ids)
        return IdLists(text, *column.lists())
    shape, dtype, read = open_tensor(place)
    if dtype not in _INTEGERS:
        raise DtypeError(f"{text} holds {dtype}, expected whole numbers")
    if len(shape) not in (1, 2):
        raise ShapeError(f"{text} has shape {shape}, expected (N,) or (N, R)")
    parts = [part.long().reshape(-1) for part in read(_ROWS_AT_ONCE)]
    per_row = shape[1] if len(shape) == 2 else 1
    return IdLists(
        text, torch.cat(parts) if parts else torch.empty(0).long(), torch.arange(shape[0] + 1) * per_row
    )


def read_ids(text: str, n: int) -> Tensor:
    """Read an id for each of n vectors.

    Raises:
        ShapeError: there are more or fewer.
        ElipsError: as for `read_id_lists`.
    """
    lists = read_id_lists(text)
    if len(lists) != n or len(lists.ids) != n:
        raise ShapeError(
            f"{text} has {len(lists.ids):,} ids in {len(lists):,} rows, expected one for each of the "
            f"{n:,} vectors"
        )
    return lists.ids


def check_rows(lists: IdLists, n: int, queries: str) -> None:
    """Check that there is a row for each query.

    Raises:
        ArgumentError: there are more or fewer.
    """
    if len(lists) != n:
        raise ArgumentError(
            f"{lists.where} has {len(lists):,} rows, expected one for each of the {n:,} queries in {queries}"
        )


def _extremes(counts: Tensor) -> str:
    return f"{int(counts.min())} and {int(counts.max())}" if len(counts) else "0 and 0"
