"""Whether Triton can run kernels on a device, from static facts."""

import functools
import os
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from elips_torch.core.hardware import DeviceFacts

# Tensor instructions and asynchronous copies of the kernels begin with this generation.
_OLDEST_CUDA = 80
_ROCM = ("gfx90a", "gfx942")


def find_c_compiler() -> str | None:
    """Return the path of the C compiler that Triton would call; None where there is none.

    Triton takes ``CC`` at its word, and without it gcc or clang from the path.
    """
    # Triton reads this variable to find its compiler; it switches nothing here.
    given = os.environ.get("CC")
    names = ("gcc", "clang") if given is None else (given,)
    return next((path for path in map(shutil.which, names) if path), None)


def _has_python_headers() -> bool:
    scheme = sysconfig.get_default_scheme()
    # Debian's own scheme names a folder in which there are none; Triton looks past it, too.
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    return Path(sysconfig.get_paths(scheme)["include"], "Python.h").is_file()


@functools.cache
def launcher_reasons() -> tuple[str, ...]:
    """Return why Triton cannot start a kernel on this machine, whatever the GPU; empty where it can."""
    if find_spec("triton") is None:
        return ("Triton is not installed",)
    reasons = []
    if find_c_compiler() is None:
        given = os.environ.get("CC")
        found = "no gcc or clang on the path" if given is None else f"CC={given!r}, which is no program"
        reasons.append(f"Triton builds its launcher with a C compiler and finds {found}")
    if not _has_python_headers():
        reasons.append("Triton builds its launcher with Python's headers, and there is no Python.h")
    return tuple(reasons)


def gpu_reasons(facts: DeviceFacts) -> list[str]:
    """Return why a GPU cannot run the kernels; empty where it can.

    >>> gpu_reasons(DeviceFacts("cuda", "NVIDIA T4", "sm_75"))
    ['the kernels are made for sm_80 and newer, this GPU (NVIDIA T4) is sm_75']
    """
    name = f"this GPU ({facts.name}) is {facts.capability}"
    if facts.capability.startswith("gfx"):
        return (
            [] if facts.capability in _ROCM else [f"the kernels are made for {' and '.join(_ROCM)}, {name}"]
        )
    generation = facts.capability.removeprefix("sm_")
    if not generation.isdecimal():
        return ["there is no GPU that torch can use"]
    return [] if int(generation) >= _OLDEST_CUDA else [f"the kernels are made for sm_80 and newer, {name}"]
