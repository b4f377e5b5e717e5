"""Files of faiss."""

import mmap
import os
import secrets
from pathlib import Path
from typing import Any

from elips_torch.core.errors import DamagedIndexError, DtypeError, IndexFileError
from elips_torch.engines.faiss.builds import FaissBuild
from elips_torch.engines.faiss.fast_scan import mend_fast_scan
from elips_torch.engines.faiss.forked import use_one_thread_if_forked
from elips_torch.engines.faiss.graphs_in_bytes import check_bytes
from elips_torch.engines.faiss.lists_on_disk import check_lists_on_disk
from elips_torch.engines.faiss.messages import reason_of
from elips_torch.engines.faiss.row_kinds import BITS, FLOATS, MARK_OF_BITS, kind_of
from elips_torch.engines.faiss.written import prepare_to_train, prepare_to_write


def check_path(name: str, path: str | os.PathLike[str]) -> Path:
    """Return a path that a user gave.

    Raises:
        DtypeError: it is none.
    """
    try:
        return Path(path)
    except TypeError as error:
        raise DtypeError(f"{name} is {path!r}, expected a path: a str or an os.PathLike of one") from error


def read_index(
    build: FaissBuild, path: str | os.PathLike[str], *, on_disk: bool = False, bits: bool = False
) -> Any:
    """Read an index from a file of faiss.

    Args:
        build: the faiss that reads.
        path: the file.
        on_disk: leave inverted lists there.
        bits: take indexes of bits too.

    Raises:
        FileNotFoundError: there is no such file.
        IndexFileError: truncated, damaged or foreign.
        DtypeError: an index of bits, where only floats are taken, or no path.
    """
    is_there = check_path("path", path).is_file()
    where = os.fspath(path)
    if not is_there:
        raise FileNotFoundError(f"no index file at {where!r}")
    with open(path, "rb") as file:
        start = file.read(9)
    if not start:
        raise IndexFileError(f"{where!r} is empty, expected an index of faiss")
    if start[8:] == b"{":
        raise IndexFileError(
            f"{where!r} is a safetensors file, expected one of faiss; load_index reads those"
        )
    holds_bits = start[:2] == MARK_OF_BITS
    if holds_bits and not bits:
        raise DtypeError(
            f"{where!r} holds an index whose vectors are bits, expected an index of floats; "
            "read_faiss makes a FlatIndex of an IndexBinaryFlat, FaissIndex.read takes any"
        )
    # Tables of product codes are computed anew.
    use_one_thread_if_forked(build)
    read = getattr(build.module, (BITS if holds_bits else FLOATS).read)
    try:
        _check_content(path)
        index = read(where, build.module.IO_FLAG_MMAP if on_disk else 0)
        check_lists_on_disk(build, index, path)
    except (RuntimeError, MemoryError, DamagedIndexError) as error:
        raise IndexFileError(f"{where!r} is no index of faiss or is damaged: {reason_of(error)}") from error
    return prepare_to_train(build, mend_fast_scan(build, index))


def _check_content(path: str | os.PathLike[str]) -> None:
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        memoryview(content) as view,
    ):
        check_bytes(view)


def write_index(build: FaissBuild, index: Any, path: str | os.PathLike[str]) -> None:
    """Write an index of faiss on the CPU; the file appears whole or not at all.

    Raises:
        FileNotFoundError: there is no such folder.
        IsADirectoryError: the path is one.
        ImplementationError: the family does not come back from files.
        IndexFileError: faiss could not write it.
    """
    prepare_to_write(build, index)
    write = getattr(build.module, kind_of(build, index).write)
    target = check_path("path", path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no folder {os.fspath(target.parent)!r} to save an index in")
    if target.is_dir():
        raise IsADirectoryError(f"{os.fspath(target)!r} is a folder, expected a file to save an index in")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        write(index, os.fspath(temporary))
        os.replace(temporary, target)
    except RuntimeError as error:
        raise IndexFileError(f"faiss could not write {os.fspath(path)!r}: {reason_of(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)
