"""The indexes that exist, and reading any of them from a file."""

import os

import torch

from elips_torch.core.errors import IndexFileError
from elips_torch.indexes.base import Index, known_indexes
from elips_torch.indexes.faiss_index import FaissIndex
from elips_torch.indexes.files import read_index_file
from elips_torch.indexes.flat import FlatIndex
from elips_torch.indexes.ivf_flat import IVFFlatIndex
from elips_torch.indexes.ivf_pq import IVFPQIndex
from elips_torch.indexes.ivf_sq import IVFSQIndex
from elips_torch.indexes.pq import PQIndex
from elips_torch.indexes.refine import RefineIndex
from elips_torch.indexes.sq import SQIndex
from elips_torch.indexes.wrappers import PreTransformIndex

# The library's own; importing this module makes all of them known.
INDEXES: tuple[type[Index], ...] = (
    FlatIndex,
    IVFFlatIndex,
    IVFSQIndex,
    IVFPQIndex,
    SQIndex,
    PQIndex,
    PreTransformIndex,
    RefineIndex,
    FaissIndex,
)


def load_index(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Index:
    """Read an index of any class from a file that `Index.save` wrote.

    Args:
        path: the file.
        device: where to put the database.

    Raises:
        IndexFileError: a truncated or foreign file, or an unknown class of index.
        FileNotFoundError: there is no such file.
        DeviceError: this machine has no such device.
    """
    name, config, tensors = read_index_file(path, device)
    known = known_indexes()
    if name in known:
        return known[name]._restore(path, name, config, tensors, device)
    names = ", ".join(sorted(known))
    raise IndexFileError(
        f"{os.fspath(path)!r} holds {name}, expected one of {names}; "
        "a class of your own must be imported first"
    )
