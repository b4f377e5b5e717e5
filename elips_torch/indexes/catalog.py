"""The indexes that exist, and reading any of them from a file."""

import os

import torch

from elips_torch.core.errors import IndexFileError
from elips_torch.indexes.base import Index
from elips_torch.indexes.files import read_index_file
from elips_torch.indexes.flat import FlatIndex

INDEXES: tuple[type[Index], ...] = (FlatIndex,)


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
    for index in INDEXES:
        if index.__name__ == name:
            return index._restore(path, name, config, tensors, device)
    known = ", ".join(index.__name__ for index in INDEXES)
    raise IndexFileError(f"{os.fspath(path)!r} holds a {name}, expected one of {known}")
