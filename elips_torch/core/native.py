"""C++ that is compiled on the user's machine, once, and kept on disk.

The code needs nothing of torch's headers, so compiling takes seconds. It shares torch's OpenMP threads.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from elips_torch.core.compilation import find_cpp_compiler, was_forked
from elips_torch.core.hardware import DeviceFacts

logger = logging.getLogger("elips_torch")

_OPTIONS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-pthread", "-fno-fast-math", "-w")
# Instruction sets, each with what it needs beside those before it.
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
_VNNI = (*_AVX512, "-mavx512vnni")


def instruction_options(facts: DeviceFacts) -> tuple[str, ...]:
    """Return the compiler's options for a CPU's instructions; empty where there is no code for it."""
    if facts.vnni:
        return _VNNI
    return {"AVX512": _AVX512, "AVX2": _AVX2}.get(facts.capability, ())


def native_reasons(facts: DeviceFacts) -> list[str]:
    """Return why C++ of the library cannot run; empty where it can.

    >>> native_reasons(DeviceFacts("cuda", "a GPU", "sm_90"))
    ['C++ code runs on a CPU, the tensors are on cuda']
    """
    if facts.type != "cpu":
        return [f"C++ code runs on a CPU, the tensors are on {facts.type}"]
    reasons = []
    if sys.platform != "linux" or platform.machine() != "x86_64" or not instruction_options(facts):
        here = f"{facts.capability} on {platform.machine()} under {platform.system()}"
        reasons.append(f"there is C++ code for x86-64 with AVX2 under Linux, this is {here}")
    elif find_cpp_compiler() is None:
        reasons.append("there is no C++ compiler to make it with; install g++")
    return reasons


def native_threads() -> int:
    """Return how many threads C++ may use: those of torch, but one after a fork, where OpenMP may hang."""
    return 1 if was_forked() else torch.get_num_threads()


class NativeLibrary:
    """Functions of some C++ files.

    Args:
        main: the file that includes the others beside it.
    """

    def __init__(self, main: Path) -> None:
        self._main = main
        self._loaded: dict[tuple[str, ...], ctypes.CDLL | None] = {}

    def is_loaded(self, options: tuple[str, ...]) -> bool:
        """Whether the functions are at hand."""
        return self._loaded.get(options) is not None

    def is_ready(self, options: tuple[str, ...]) -> bool:
        """Whether the code need not be compiled first."""
        if options not in self._loaded:
            # A folder that may not be looked into holds nothing.
            return os.path.exists(self.path(options))
        return not self.has_failed(options)

    def has_failed(self, options: tuple[str, ...]) -> bool:
        """Whether compiling was tried in vain."""
        return options in self._loaded and self._loaded[options] is None

    def load(self, options: tuple[str, ...]) -> ctypes.CDLL | None:
        """Return the functions, compiled where that has not been done; None where it turned out to fail.

        Args:
            options: from `instruction_options`.
        """
        if options not in self._loaded:
            self._loaded[options] = self._load(options)
        return self._loaded[options]

    def _load(self, options: tuple[str, ...]) -> ctypes.CDLL | None:
        path = self.path(options)
        try:
            if os.path.exists(path):
                try:
                    return ctypes.CDLL(str(path))
                except OSError as error:
                    logger.info("%s does not load and is compiled again: %s", path, error)
            logger.info("compiling %s for %s, once", self._main.name, options[-1].removeprefix("-m"))
            _compile(self._main, options, path)
            return ctypes.CDLL(str(path))
        except (OSError, subprocess.SubprocessError) as error:
            output = getattr(error, "stderr", None) or str(error)
            logger.warning("%s does not compile here: %s", self._main.name, output.strip()[:500])
            return None

    def path(self, options: tuple[str, ...]) -> Path:
        """Return the file of the compiled code, whether or not it is there yet."""
        return cache_folder() / f"{self._main.stem}_{_digest(self._main.parent, options)}.so"


def cache_folder() -> Path:
    """Return the folder in which compiled code is kept, beside what torch keeps for its user.

    By default ``~/.cache/torch/elips_torch``. Torch's compiler keeps its code elsewhere, but asking it where
    takes seconds, which small searches would pay.
    """
    return Path(torch.hub.get_dir()).parent / "elips_torch"


@functools.cache
def _digest(folder: Path, options: tuple[str, ...]) -> str:
    # Machines that share a home folder need not share their system's libraries.
    made_with = (*platform.libc_ver(), find_cpp_compiler() or "", *_OPTIONS, *options)
    digest = hashlib.sha256(" ".join(made_with).encode())
    for file in sorted(folder.iterdir()):
        if file.suffix in (".cpp", ".h"):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _compile(main: Path, options: Sequence[str], path: Path) -> None:
    """Compile to a file that appears whole or not at all: other processes may do the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    made = Path(name)
    try:
        command = [find_cpp_compiler() or "g++", *_OPTIONS, *options, str(main), "-o", name]
        subprocess.run(command, check=True, capture_output=True, text=True)
        made.chmod(0o755)
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)
