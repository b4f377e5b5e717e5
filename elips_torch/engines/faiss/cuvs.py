"""Whether faiss can hand GPU searches to cuVS."""

import dataclasses
import functools
import importlib.util

import torch

from elips_torch.core.errors import ArgumentError, ImplementationError
from elips_torch.engines.faiss.builds import FaissBuild, is_installed, load_installed

_REQUESTS = ("auto", "require", "off")


@dataclasses.dataclass(frozen=True)
class CuvsState:
    """Whether cuVS was asked for, is there, and serves.

    Attributes:
        requested: "auto", "require" or "off".
        available: whether faiss has cuVS compiled in and there is a GPU to run it.
        enabled: whether searches use it.
        reason: why it is enabled, or why not.
    """

    requested: str
    available: bool
    enabled: bool
    reason: str


def cuvs_state(requested: str = "auto", build: FaissBuild | None = None) -> CuvsState:
    """Return whether faiss's GPU indexes run with cuVS.

    Args:
        requested: "auto" uses it where it is available; "require" refuses to go on without it; "off" does
            without it.
        build: the faiss to ask; by default the installed one.

    Returns:
        CuvsState: what was ``requested``, whether it is ``available`` and ``enabled``, and the ``reason``.

    Raises:
        ArgumentError: another request.
        ImplementationError: it is required and not available.

    >>> cuvs_state("off").enabled
    False
    """
    if requested not in _REQUESTS:
        raise ArgumentError(f"requested is {requested!r}, expected 'auto', 'require' or 'off'")
    missing = _missing(build)
    available = not missing
    if requested == "require" and missing:
        raise ImplementationError(f"cuVS is required: {missing}")
    if requested == "off":
        return CuvsState(requested, available, False, "it was switched off")
    return CuvsState(requested, available, available, missing or "faiss was compiled with it")


def _missing(build: FaissBuild | None) -> str:
    """Return what cuVS lacks here; empty where nothing."""
    if build is None:
        if not is_installed():
            return "faiss is not installed"
        build = load_installed()
    if not hasattr(build.module, "should_use_cuvs"):
        return f"{build} has no code for cuVS"
    if "CUVS" not in build.compile_options.upper().split():
        package = " (the package cuvs is installed, which faiss does not use)" if _has_package() else ""
        return f"faiss was compiled with {build.compile_options or 'no options'}, without cuVS{package}"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    config = build.module.GpuIndexConfig()
    config.use_cuvs = True
    if not build.module.should_use_cuvs(config):
        return "faiss does not use cuVS on this GPU"
    return ""


@functools.cache
def _has_package() -> bool:
    return importlib.util.find_spec("cuvs") is not None
