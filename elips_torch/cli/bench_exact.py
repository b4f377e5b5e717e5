"""The command ``bench exact``: exact search against its peers, in one process, with checked results."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elips_torch.cli.contenders import Contender, FaissBruteForce, FaissGpu, Ours, TorchTopk
from elips_torch.cli.datasets import DTYPES, Dataset, clustered, read_dataset
from elips_torch.cli.environment import hardware, slowing_variables, versions
from elips_torch.cli.exact_report import describe_run, format_cells
from elips_torch.cli.roofline import Roofline, measure_roofline
from elips_torch.cli.timing import Timing, clock_for, measure
from elips_torch.core.errors import ArgumentError, DeviceError
from elips_torch.core.hardware import device_facts
from elips_torch.core.metric import Metric, resolve_metric
from elips_torch.engines.faiss.brute_force import apply_settings, check_build, current_settings
from elips_torch.engines.faiss.builds import (
    FaissBuild,
    faster_build,
    get_threads,
    load_from,
    load_installed,
    set_threads,
)
from elips_torch.evaluation.ground_truth import exact_neighbours
from elips_torch.evaluation.plots import check_plotting, draw_times
from elips_torch.evaluation.recall import RecallAtK

DEFAULT_QUERIES = (1, 32, 512, 4096)
DEFAULT_K = (10, 100)
_DEFAULT_SIZE = (100_000, 384)
_METRICS = ("ip", "l2", "cosine")


def run(options: argparse.Namespace) -> int:
    """Measure, print a table, and write what was asked for."""
    metric = resolve_metric(options.metric)
    if metric.name not in _METRICS:
        raise ArgumentError(f"--metric is {options.metric!r}, expected {', '.join(_METRICS)}")
    device = _device(options.device)
    _check_outputs(options)
    for line in slowing_variables():
        print(f"warning: {line}", file=sys.stderr)
    dataset = _dataset(options).to(device, DTYPES[options.dtype])
    n_queries = _sizes("--nq", options.nq, DEFAULT_QUERIES, len(dataset.queries), "queries")
    ks = _sizes("--k", options.k, DEFAULT_K, len(dataset.database), "database vectors")
    builds = _builds(options.faiss, device)
    for option, asked, default, sizes in (
        ("--nq", options.nq, DEFAULT_QUERIES, n_queries),
        ("--k", options.k, DEFAULT_K, ks),
    ):
        if asked is None and sizes != list(default):
            kept, usual = (" ".join(map(str, each)) for each in (sizes, default))
            print(f"note: {option} {kept} instead of {usual}, as the data allow", file=sys.stderr)
    with equal_terms(options.threads or torch.get_num_threads(), list(builds.values())):
        report = _measure_all(dataset, metric, device, n_queries, ks, builds, options)
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if options.png:
        _draw(options.png, report)
    return 0


def _measure_all(
    dataset: Dataset,
    metric: Metric,
    device: torch.device,
    n_queries: Sequence[int],
    ks: Sequence[int],
    builds: dict[str, FaissBuild],
    options: argparse.Namespace,
) -> dict[str, Any]:
    report: dict[str, Any] = {
        "benchmark": "exact",
        "dataset": {
            "name": dataset.name,
            "description": dataset.description,
            "n": len(dataset.database),
            "dim": dataset.dim,
        },
        "settings": {
            "metric": metric.name,
            "dtype": options.dtype,
            "screen": options.screen,
            "device": str(device),
            "threads": torch.get_num_threads(),
            "repeats": options.repeats,
            "seconds": options.seconds,
        },
        "device": str(device_facts(device)),
        "hardware": hardware(),
        "versions": versions(),
        "faiss": {name: _describe_build(build) for name, build in builds.items()},
        "warnings": slowing_variables(),
        "cells": [],
    }
    roofline = _roofline(device, dataset.database.dtype)
    if roofline is not None:
        report["roofline"] = {
            "bytes_per_second": roofline.bytes_per_second,
            "flops_per_second": roofline.flops_per_second,
        }
    print(describe_run(report), flush=True)
    truth = exact_neighbours(dataset.queries[: max(n_queries)], dataset.database, max(ks), metric.name)
    contenders = _contenders(dataset, metric, device, builds, options.screen)
    ours = contenders[-1]
    for nq in n_queries:
        for k in ks:
            timings = measure(
                contenders,
                nq,
                k,
                repeats=options.repeats,
                seconds=options.seconds,
                clock=clock_for(device),
            )
            cell = make_cell(nq, k, timings, truth[:nq, :k])
            if isinstance(ours, Ours):
                explanation = ours.explain(nq, k)
                cell["implementation"] = explanation.chosen
                cell["reasons"] = explanation.reasons
            if roofline is not None:
                add_shares(cell, roofline, len(dataset.database), dataset.dim)
            report["cells"].append(cell)
            print(f"nq={nq} k={k} measured", file=sys.stderr, flush=True)
    print(format_cells(report))
    return report


def make_cell(n_queries: int, k: int, timings: dict[str, Timing], truth: Tensor) -> dict[str, Any]:
    """Return what one search showed, for JSON.

    Args:
        n_queries: Q.
        k: number of neighbours.
        timings: per contender; "ours" is the one that the others are compared with.
        truth: ``(Q, K)`` true neighbours, best first.
    """
    contenders = {}
    for name, timing in timings.items():
        ids = timing.ids.to(truth.device)
        recall = RecallAtK(k=k).to(truth.device)
        recall.update(ids, truth)
        contenders[name] = {
            "median_seconds": timing.median,
            "q20_seconds": timing.quantile(0.2),
            "q80_seconds": timing.quantile(0.8),
            "seconds": timing.seconds,
            "first_call_seconds": timing.first_call_seconds,
            "setting": timing.setting,
            "recall": float(recall.compute()[f"recall@{k}"]),
        }
    contenders["ours"]["exact"] = torch.equal(timings["ours"].ids.to(truth.device), truth)
    peers = {name: timing.median for name, timing in timings.items() if name != "ours"}
    best = min(peers, key=lambda name: peers[name], default=None)
    return {
        "nq": n_queries,
        "k": k,
        "contenders": contenders,
        "best_peer": best,
        "ratio": None if best is None else peers[best] / timings["ours"].median,
    }


def add_shares(cell: dict[str, Any], roofline: Roofline, n_rows: int, dim: int) -> None:
    """Add to a cell what share of a device's bandwidth and matrix rate ours reached."""
    seconds = cell["contenders"]["ours"]["median_seconds"]
    cell["bandwidth_share"], cell["matrix_share"] = roofline.shares(cell["nq"], n_rows, dim, seconds)


def _roofline(device: torch.device, dtype: torch.dtype) -> Roofline | None:
    """Measure what a GPU reaches; None for a CPU."""
    return measure_roofline(device, dtype) if device.type == "cuda" else None


def _contenders(
    dataset: Dataset, metric: Metric, device: torch.device, builds: dict[str, FaissBuild], screen: str
) -> list[Contender]:
    """Return all contenders, ours last."""
    faiss = FaissGpu if device.type == "cuda" else FaissBruteForce
    peers = [faiss(name, build, dataset, metric) for name, build in builds.items()]
    return [TorchTopk(dataset, metric), *peers, Ours(dataset, metric, screen)]


def _builds(folders: Sequence[str], device: torch.device) -> dict[str, FaissBuild]:
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


def _describe_build(build: FaissBuild) -> dict[str, Any]:
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


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("--device is 'cuda', but torch finds no CUDA GPU here")
    return torch.device(name)


def _dataset(options: argparse.Namespace) -> Dataset:
    if options.file is None:
        n, dim = options.synthetic or _DEFAULT_SIZE
        return clustered(n, dim, max(options.nq or DEFAULT_QUERIES))
    if options.synthetic:
        raise ArgumentError("both a file and --synthetic were given, expected one of them")
    if options.file.isdecimal() and not Path(options.file).exists():
        raise ArgumentError(
            f"no file at {options.file!r}; for made-up vectors type --synthetic N D, "
            f"as in --synthetic {options.file} {_DEFAULT_SIZE[1]}"
        )
    return read_dataset(options.file, options.queries_key, options.database_key)


def _sizes(
    option: str, asked: Sequence[int] | None, default: Sequence[int], limit: int, what: str
) -> list[int]:
    """Return the sizes asked for, which must fit, or those of the default that do."""
    if asked is None:
        return sorted({min(size, limit) for size in default})
    if max(asked) > limit:
        possible = [*(size for size in asked if size < limit), limit]
        typed = " ".join(map(str, dict.fromkeys(possible)))
        raise ArgumentError(
            f"{option} is {max(asked)}, but there are {limit:,} {what}; type {option} {typed}"
        )
    return list(dict.fromkeys(asked))


def _check_outputs(options: argparse.Namespace) -> None:
    """Refuse what could not be written, before anything runs."""
    for option, path in (("--json", options.json), ("--png", options.png)):
        if path and not Path(path).resolve().parent.is_dir():
            raise ArgumentError(f"{option} is {path!r}, but there is no such folder to write in")
    if options.png:
        check_plotting()


def _draw(path: str, report: dict[str, Any]) -> None:
    cells = report["cells"]
    names = list(cells[0]["contenders"])
    draw_times(
        path,
        [f"nq={cell['nq']}\nk={cell['k']}" for cell in cells],
        {name: [1e3 * cell["contenders"][name]["median_seconds"] for cell in cells] for name in names},
        [cell["ratio"] for cell in cells],
        f"{report['dataset']['name']}, {report['settings']['metric']}: above, best peer / ours",
    )
