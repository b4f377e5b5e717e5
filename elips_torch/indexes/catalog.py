"""The indexes that exist, and reading any of them from a file."""

import os
from typing import Any

import torch

from elips_torch.core.errors import IndexFileError
from elips_torch.indexes.base import Index
from elips_torch.indexes.files import read_index_file
from elips_torch.indexes.flat import FlatIndex
from elips_torch.indexes.pq import PQIndex
from elips_torch.indexes.sq import SQIndex

# The library's own; importing this module makes all of them known.
INDEXES: tuple[type[Index], ...] = (FlatIndex, SQIndex, PQIndex)


def load_index(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Index:
    """Read an index of any class from a file that `Index.save` wrote.

    Args:
        path: the file.
        device: where to put the database.

    Raises:
        IndexFileError: a truncated or foreign file, or an unknown class of index.
        FileNotFoundError: there is no such file.
    """
    name, config, tensors = read_index_file(path, device)
    known = _subclasses(Index)
    if name in known:
        return known[name]._restore(path, name, config, tensors, device)
    names = ", ".join(sorted(known))
    raise IndexFileError(
        f"{os.fspath(path)!r} holds a {name}, expected one of {names}; "
        "a class of your own must be imported first"
    )


def _subclasses(parent: type[Any]) -> dict[str, type[Index]]:
    """Return every class of index that the program has defined, by name."""
    found: dict[str, type[Index]] = {}
    for index in parent.__subclasses__():
        found.update({index.__name__: index, **_subclasses(index)})
    return found
