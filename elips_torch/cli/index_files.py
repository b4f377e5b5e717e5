"""Index files of the command line: the library's own, and those of faiss, told apart by their ending."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from elips_torch.cli.vector_sources import parse_place
from elips_torch.core.errors import ArgumentError, ConversionError
from elips_torch.indexes.base import Index
from elips_torch.indexes.catalog import load_index
from elips_torch.indexes.faiss_conversion import read_faiss, write_faiss
from elips_torch.indexes.faiss_index import FaissIndex

_OWN, _FAISS = ".safetensors", (".faiss", ".index")
ENDINGS = (_OWN, *_FAISS)


def is_faiss(path: str) -> bool:
    """Return whether a path stands for a file of faiss."""
    return Path(path).suffix.lower() in _FAISS


def open_index(path: str, device: str) -> Index:
    """Read an index of either kind; families of faiss that the library does not have stay as they are.

    Raises:
        ArgumentError: the ending is of neither kind, or there is no such file.
        ElipsError: the file holds no index.
    """
    check_ending("--index", path, ENDINGS)
    if not Path(path).is_file():
        raise ArgumentError(f"no index file at {path!r}; elips-torch build makes one")
    place = torch.device(device)
    if not is_faiss(path):
        return load_index(path, place)
    try:
        return read_faiss(path, place)
    except ConversionError:
        # Faiss itself serves what has no counterpart here.
        return FaissIndex.read(path, place)


def write_index(index: Index, path: str) -> None:
    """Write an index, in the form that the ending says; the file appears whole or not at all."""
    if is_faiss(path):
        write_faiss(index, path)
    else:
        index.save(path)


def check_device_name(name: str | None) -> None:
    """Check that an index can be put on a device.

    Raises:
        ArgumentError: torch knows no such device, or the machine has none.
    """
    if name is None or name == "cpu":
        return
    try:
        # What no machine has is noticed by using it.
        torch.empty(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ArgumentError(f"--device is {name!r}, which cannot be used here: {reason}") from error


def check_ending(option: str, path: str, endings: tuple[str, ...]) -> None:
    """Check that a path ends in one of several ways."""
    if Path(path).suffix.lower() not in endings:
        raise ArgumentError(
            f"{option} is {os.fspath(path)!r}, expected a file that ends in {' or '.join(endings)}"
        )


def check_output(option: str, path: str, endings: tuple[str, ...], read: Sequence[str | None] = ()) -> None:
    """Check that a file can be written, before the work whose result it holds.

    Args:
        option: that names the file.
        path: the file.
        endings: those it may have.
        read: other files, ``FILE`` or ``FILE:NAME``, which are not to be replaced.

    Raises:
        ArgumentError: another ending, a file that is read, a folder, or no folder to write in.
    """
    check_ending(option, path, endings)
    for text in read:
        if text is not None and parse_place(text).path.resolve() == Path(path).resolve():
            raise ArgumentError(
                f"{option} is {path!r}, which is read and would be replaced, expected another file"
            )
    if Path(path).is_dir():
        raise ArgumentError(f"{option} is {path!r}, which is a folder, expected a file")
    folder = Path(path).resolve().parent
    if not folder.is_dir():
        raise ArgumentError(f"{option} is {path!r}, but there is no folder {os.fspath(folder)!r} to write in")
    if not os.access(folder, os.W_OK):
        raise ArgumentError(f"{option} is {path!r}, but nothing may be written in {os.fspath(folder)!r}")
