"""Index files: safetensors with a header that names the class and its settings."""

import json
import os
import secrets
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from elips_torch.core.errors import IndexFileError
from elips_torch.core.validation import check_usable

_FORMAT = "elips_torch.index"
_VERSION = 1


def write_index_file(
    path: str | os.PathLike[str], name: str, config: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Write an index; the file appears whole or not at all.

    Args:
        path: where to write; an existing file is replaced.
        name: class name of the index.
        config: JSON-compatible constructor keywords.
        tensors: the state dictionary.
    """
    target = Path(path)
    header = {"format": _FORMAT, "version": str(_VERSION), "index": name, "config": json.dumps(config)}
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no folder {os.fspath(target.parent)!r} to save an index in")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    temporary.touch()
    mode = temporary.stat().st_mode
    try:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary, metadata=header)
        # Safetensors makes files that nobody else may read; the user's umask decides that.
        temporary.chmod(mode)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def read_index_file(
    path: str | os.PathLike[str], device: torch.device | str
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Read what `write_index_file` wrote: class name, settings and tensors on a device.

    Raises:
        IndexFileError: truncated, foreign, or written by a newer version.
        FileNotFoundError: there is no such file.
        DeviceError: this machine has no such device.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no index file at {os.fspath(path)!r}")
    check_usable("device", device)
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            header = file.metadata() or {}
            if header.get("format") != _FORMAT:
                raise IndexFileError(
                    f"{os.fspath(path)!r} is a safetensors file, but not an elips_torch index"
                )
            if int(header["version"]) > _VERSION:
                raise IndexFileError(
                    f"{os.fspath(path)!r} has format version {header['version']}, "
                    f"this library reads up to {_VERSION}"
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return header["index"], json.loads(header["config"]), tensors
    except IndexFileError:
        raise
    except (SafetensorError, KeyError, ValueError) as error:
        hint = "; read_faiss reads files of faiss" if _may_be_of_faiss(path) else ""
        raise IndexFileError(f"{os.fspath(path)!r} is no index file or is damaged: {error}{hint}") from error


def _may_be_of_faiss(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins with four letters, the first of which faiss gives to its indexes."""
    with open(path, "rb") as file:
        start = file.read(4)
    return len(start) == 4 and start[:1] == b"I" and start[1:].isalnum()
