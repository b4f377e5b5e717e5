"""Builds of faiss to measure against, and the same number of threads for all."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from elips_torch.engines.faiss.brute_force import apply_settings, check_build, current_settings
from elips_torch.engines.faiss.builds import (
    FaissBuild,
    faster_build,
    get_threads,
    load_from,
    load_installed,
    set_threads,
)


def load_builds(folders: Sequence[str], device: torch.device) -> dict[str, FaissBuild]:
    """Return the installed faiss and those in folders, by a name for tables, after a check of each."""
    loaded = [load_installed(), *(load_from(folder) for folder in folders)]
    builds: dict[str, FaissBuild] = {}
    for build in loaded:
        if device.type == "cuda" and not build.has_gpu:
            print(f"note: {build} has no GPU code and is left out", file=sys.stderr)
            continue
        if device.type != "cuda":
            check_build(build)
        name = f"faiss {build.version}"
        builds[name if name not in builds else f"{name} ({len(builds) + 1})"] = build
    return builds


def describe_build(build: FaissBuild) -> dict[str, Any]:
    """Return what a build is and runs with, for JSON."""
    return {
        "version": build.version,
        "level": build.level,
        "compile_options": build.compile_options,
        "blas": build.blas,
        "threads": get_threads(build),
        "faster": faster_build(build),
    }


@contextmanager
def equal_terms(threads: int, builds: Sequence[FaissBuild]) -> Iterator[None]:
    """Let torch and every build of faiss run this many threads; put back what is set, after, in each."""
    before = [(get_threads(build), current_settings(build)) for build in builds]
    torch_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    for build in builds:
        set_threads(build, threads)
    try:
        yield
    finally:
        for build, (count, settings) in zip(builds, before, strict=True):
            set_threads(build, count)
            apply_settings(build, settings)
        torch.set_num_threads(torch_before)
