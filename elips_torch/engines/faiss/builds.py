"""Builds of faiss: finding them, loading more than one, and saying what each was compiled for."""

import ctypes
import dataclasses
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from elips_torch.core.errors import ArgumentError

INSTALL = 'faiss is not installed: pip install "faiss-cpu>=1.12"'

# Names of the compiled modules among which older wheels choose when they are imported.
_SWIG = "swigfaiss"
_GENERIC = "generic"


@dataclasses.dataclass(frozen=True, eq=False)
class FaissBuild:
    """One build of faiss, loaded.

    Attributes:
        module: its package, for the calls.
        modules: all its modules by name, so that it can stand under the name ``faiss`` again.
        version: as it states itself.
        level: instruction set of the code that runs: "AVX512", "AVX2", ..., "generic" for none.
        compile_options: as it states them.
        blas: the matrix products it brought: "OpenBLAS for Haswell, threaded"; "unknown" for others.
        folder: where the package lies.
    """

    module: Any = dataclasses.field(repr=False)
    modules: dict[str, ModuleType] = dataclasses.field(repr=False)
    version: str
    level: str
    compile_options: str
    blas: str
    folder: Path

    @property
    def has_gpu(self) -> bool:
        """Whether it holds code for GPUs."""
        return hasattr(self.module, "StandardGpuResources")

    def __str__(self) -> str:
        return f"faiss {self.version} ({self.level}; {self.blas}; compiled with {self.compile_options})"


# Described once: every search asks for it.
_installed: dict[ModuleType | None, FaissBuild] = {}


def is_installed() -> bool:
    """Whether `load_installed` would find faiss; imports nothing."""
    if sys.modules.get("faiss") in _installed:
        return True
    spec = importlib.util.find_spec("faiss")
    # Uninstalling one of two distributions leaves a folder without code.
    return spec is not None and spec.origin is not None


def loaded_build() -> FaissBuild | None:
    """Return what `load_installed` would, where it has been loaded before; else None."""
    return _installed.get(sys.modules.get("faiss"))


def load_installed() -> FaissBuild:
    """Import the faiss of this environment.

    Raises:
        ImportError: there is none, or it is broken; with the line that helps.
    """
    found = loaded_build()
    if found is not None:
        return found
    if not is_installed():
        raise ImportError(INSTALL)
    try:
        module = importlib.import_module("faiss")
        if module not in _installed:
            # What was removed in part imports, and says nothing of itself.
            _installed[module] = _describe(module, _faiss_modules())
    except (Exception, SystemExit) as error:
        raise ImportError(f"faiss is installed and cannot be imported: {error}{_repair()}") from error
    return _installed[module]


def _repair() -> str:
    """Return how to mend what several distributions, which all fill the folder ``faiss``, have made of it."""
    # One that was not uninstalled to the end has no name.
    found = {str(each.name) for each in distributions()}
    names = sorted(name for name in found if name.startswith("faiss"))
    if len(names) < 2:
        return ""
    return (
        f"; {' and '.join(names)} have written into the same folder: "
        f"pip uninstall -y {' '.join(names)}, then install one of them"
    )


def load_from(folder: str | os.PathLike[str]) -> FaissBuild:
    """Import another build of faiss beside the installed one, in the same process.

    What stands under the name ``faiss`` does not change. The two share nothing but the type names of
    their bindings, which is enough for brute-force search; passing objects of one to the other is not.

    Args:
        folder: the folder that holds the package ``faiss``, such as the ``site-packages`` of another
            environment of the same Python version, or what ``pip install --target`` filled.

    Raises:
        ArgumentError: the folder holds no such package.
        ImportError: it does not load here.
    """
    root = Path(folder).resolve()
    if not (root / "faiss" / "__init__.py").is_file():
        raise ArgumentError(
            f"no faiss in {os.fspath(folder)!r}, expected a folder that holds faiss/__init__.py"
        )
    modules: dict[str, ModuleType] = {}
    sys.path.insert(0, str(root))
    importlib.invalidate_caches()
    try:
        with _named_faiss(modules):
            module = importlib.import_module("faiss")
            return _describe(module, modules)
    except SystemExit as error:
        # The loader of faiss ends the process where it finds no code for the machine.
        raise ImportError(f"the faiss in {os.fspath(folder)!r} has no code for this machine") from error
    finally:
        sys.path.remove(str(root))


@contextmanager
def standing_as_faiss(build: FaissBuild) -> Iterator[None]:
    """Let ``import faiss`` mean this build for a while, for what it imports late."""
    with _named_faiss(build.modules):
        yield


@contextmanager
def _named_faiss(modules: dict[str, ModuleType]) -> Iterator[None]:
    """Put modules under the name ``faiss``, note those that get imported, and put back what stood there."""
    before = _faiss_modules()
    for name in before:
        del sys.modules[name]
    sys.modules.update(modules)
    try:
        yield
    finally:
        modules.update(_faiss_modules())
        for name in modules:
            sys.modules.pop(name, None)
        sys.modules.update(before)


def _faiss_modules() -> dict[str, ModuleType]:
    return {name: module for name, module in sys.modules.items() if name.split(".")[0] == "faiss"}


def _describe(module: Any, modules: dict[str, ModuleType]) -> FaissBuild:
    modules = modules or _faiss_modules()
    folder = Path(module.__file__).parent
    return FaissBuild(
        module=module,
        modules=modules,
        version=str(module.__version__),
        level=_level(module, _faiss_modules()),
        compile_options=str(module.get_compile_options()).strip(),
        blas=", ".join(_describe_openblas(library) for library in _bundled_openblas(folder)) or "unknown",
        folder=folder,
    )


def _level(module: Any, modules: dict[str, ModuleType]) -> str:
    """Return the instruction set of the code that runs."""
    for name in modules:
        # Wheels that choose at import name the module after the set: swigfaiss_avx512.
        _, _, level = name.partition(f"faiss.{_SWIG}_")
        if level:
            return level.upper()
    config: Any = getattr(module, "SIMDConfig", None)
    level = str(config.get_level_name()) if hasattr(config, "get_level_name") else ""
    return _GENERIC if level in ("", "NONE") else level


def faster_build(build: FaissBuild) -> str | None:
    """Return how to get a faster build for this CPU, or None where this one uses what the CPU has."""
    capability = torch.backends.cpu.get_cpu_capability()
    if build.level != _GENERIC or capability not in ("AVX2", "AVX512"):
        return None
    return (
        f"this build has no vector instructions, the CPU has {capability}; "
        "a faiss-cpu wheel uses them: pip install --no-deps --target FOLDER faiss-cpu, then PYTHONPATH=FOLDER"
    )


def set_threads(build: FaissBuild, threads: int) -> None:
    """Set the number of threads of a build, in its own loops and in the BLAS that came with it."""
    build.module.omp_set_num_threads(threads)
    # An OpenBLAS with threads of its own does not follow OpenMP's setting.
    for library in _bundled_openblas(build.folder):
        library.openblas_set_num_threads(threads)


def get_threads(build: FaissBuild) -> int:
    """Return the largest number of threads that the loops or the BLAS of a build may use."""
    counts = [int(library.openblas_get_num_threads()) for library in _bundled_openblas(build.folder)]
    return max(int(build.module.omp_get_max_threads()), *counts, 1)


def _bundled_openblas(folder: Path) -> list[ctypes.CDLL]:
    """Return the OpenBLAS libraries that the wheel brought, as far as they are loaded."""
    if not hasattr(os, "RTLD_NOLOAD"):
        return []
    libraries = []
    for path in sorted(folder.parent.glob("faiss*.libs/*openblas*")):
        try:
            library = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        except OSError:
            # Present beside the package, but not what this process loaded.
            continue
        if hasattr(library, "openblas_set_num_threads"):
            libraries.append(library)
    return libraries


def _describe_openblas(library: ctypes.CDLL) -> str:
    """Return which processor the products are written for, which an old OpenBLAS guesses low."""
    library.openblas_get_corename.restype = ctypes.c_char_p
    core = library.openblas_get_corename().decode()
    return f"OpenBLAS for {core}, {'threaded' if library.openblas_get_parallel() else 'single-threaded'}"
