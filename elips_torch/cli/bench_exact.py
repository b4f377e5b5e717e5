"""The command ``bench exact``: exact search against its peers, in one process, with checked results."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elips_torch import evaluation
from elips_torch.cli.bench_inputs import (
    check_outputs,
    chosen_dataset,
    chosen_metric,
    fitting_sizes,
    note_sizes,
    warn_of_slowing_variables,
)
from elips_torch.cli.contenders import Contender, FaissBruteForce, FaissGpu, Ours, TorchTopk
from elips_torch.cli.datasets import DTYPES, Dataset
from elips_torch.cli.environment import hardware, slowing_variables, versions
from elips_torch.cli.equal_terms import describe_build, equal_terms, load_builds
from elips_torch.cli.exact_report import describe_run, format_cells
from elips_torch.cli.roofline import Roofline, measure_roofline
from elips_torch.cli.timing import Timing, clock_for, measure
from elips_torch.core.errors import DeviceError
from elips_torch.core.hardware import device_facts
from elips_torch.core.metric import Metric
from elips_torch.engines.faiss.builds import (
    FaissBuild,
)
from elips_torch.evaluation.ground_truth import exact_neighbours
from elips_torch.evaluation.plots import draw_times

DEFAULT_QUERIES = (1, 32, 512, 4096)
DEFAULT_K = (10, 100)
_DEFAULT_SIZE = (100_000, 384)


def run(options: argparse.Namespace) -> int:
    """Measure, print a table, and write what was asked for."""
    metric = chosen_metric(options)
    device = _device(options.device)
    check_outputs(options)
    dataset = chosen_dataset(options, _DEFAULT_SIZE, max(options.nq or DEFAULT_QUERIES)).to(
        device, DTYPES[options.dtype]
    )
    n_queries = fitting_sizes("--nq", options.nq, DEFAULT_QUERIES, len(dataset.queries), "queries")
    ks = fitting_sizes("--k", options.k, DEFAULT_K, len(dataset.database), "database vectors")
    builds = load_builds(options.faiss, device)
    warn_of_slowing_variables()
    note_sizes("--nq", options.nq, DEFAULT_QUERIES, n_queries)
    note_sizes("--k", options.k, DEFAULT_K, ks)
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
        "faiss": {name: describe_build(build) for name, build in builds.items()},
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
        # Commands that measure nothing need not wait for torchmetrics.
        recall: Any = evaluation.RecallAtK(k=k).to(truth.device)
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


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("--device is 'cuda', but torch finds no CUDA GPU here")
    return torch.device(name)


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
