"""Files of faiss, and moving its indexes to GPUs."""

import functools
import os
import secrets
from pathlib import Path
from typing import Any

import torch

from elips_torch.core.errors import DeviceError, DtypeError, ImplementationError, IndexFileError
from elips_torch.engines.faiss.brute_force import _resources
from elips_torch.engines.faiss.builds import FaissBuild, load_installed

# How every index of bits begins, and no index of floats.
_BITS = b"IB"


@functools.cache
def installed() -> FaissBuild:
    """Return the faiss of this environment, loaded once.

    Raises:
        ImportError: there is none, with the line that installs it.
    """
    return load_installed()


def read_index(build: FaissBuild, path: str | os.PathLike[str]) -> Any:
    """Read an index of floats from a file of faiss.

    Raises:
        FileNotFoundError: there is no such file.
        IndexFileError: truncated, damaged or foreign.
        DtypeError: an index of bits.
    """
    where = os.fspath(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"no index file at {where!r}")
    with open(path, "rb") as file:
        start = file.read(9)
    if start[8:] == b"{":
        raise IndexFileError(f"{where!r} is a safetensors file, expected one of faiss; load_index reads those")
    if start[:2] == _BITS:
        raise DtypeError(
            f"{where!r} holds an index whose vectors are bits, expected an index of floats; "
            "FaissIndex(faiss.read_index_binary(path)) serves it as it is"
        )
    try:
        return build.module.read_index(where)
    except (RuntimeError, MemoryError) as error:
        raise IndexFileError(f"{where!r} is no index of faiss or is damaged: {_reason(error)}") from error


def write_index(build: FaissBuild, index: Any, path: str | os.PathLike[str]) -> None:
    """Write an index of faiss; the file appears whole or not at all."""
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no folder {os.fspath(target.parent)!r} to save an index in")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        build.module.write_index(index, os.fspath(temporary))
        os.replace(temporary, target)
    except RuntimeError as error:
        raise IndexFileError(f"faiss could not write {os.fspath(path)!r}: {_reason(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_gpu(build: FaissBuild, device: torch.device) -> int:
    """Return the number of a GPU that faiss is to use.

    Raises:
        DeviceError: it is no GPU, or there is none.
        ImplementationError: this faiss has no code for GPUs.
    """
    if device.type != "cuda":
        raise DeviceError(f"device is {device}, faiss has indexes on the CPU and on CUDA and ROCm GPUs")
    if not torch.cuda.is_available():
        raise DeviceError(f"device is {device}, this machine has no GPU that torch can use")
    if not build.has_gpu:
        raise ImplementationError(f"device is {device}, and {build} has no GPU code")
    return torch.cuda.current_device() if device.index is None else device.index


def to_gpu(build: FaissBuild, index: Any, device: torch.device) -> Any:
    """Copy an index of faiss to a GPU.

    Raises:
        ElipsError: as `check_gpu`, or faiss has no such index on GPUs.
    """
    number = check_gpu(build, device)
    try:
        return build.module.index_cpu_to_gpu(_resources(build, number), number, index)
    except RuntimeError as error:
        raise ImplementationError(f"faiss has no such index on {device}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Return what faiss says, without where in its code."""
    return str(error).rpartition("Error: ")[2].strip() or type(error).__name__

