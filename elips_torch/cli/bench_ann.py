"""The command ``bench ann``: recall and speed of inverted lists against those of faiss."""

import argparse
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from elips_torch.cli.ann_contenders import FaissLists, Lists, OurLists, check_description
from elips_torch.cli.ann_report import describe_ann_run, explain_columns, format_index
from elips_torch.cli.bench_exact import make_cell
from elips_torch.cli.bench_inputs import (
    check_outputs,
    chosen_dataset,
    chosen_metric,
    fitting_sizes,
    note_sizes,
    warn_of_slowing_variables,
)
from elips_torch.cli.datasets import Dataset
from elips_torch.cli.environment import hardware, slowing_variables, versions
from elips_torch.cli.equal_terms import describe_build, equal_terms, load_builds
from elips_torch.cli.timing import clock_for, measure
from elips_torch.core.errors import ArgumentError
from elips_torch.core.metric import Metric
from elips_torch.engines.faiss.builds import FaissBuild
from elips_torch.evaluation.ground_truth import exact_neighbours
from elips_torch.evaluation.plots import draw_recall
from elips_torch.indexes.suggestion import usual_nlist

DEFAULT_QUERIES = (1, 32, 1000)
DEFAULT_K = (10,)
DEFAULT_NPROBE = (1, 4, 16, 64)
_DEFAULT_SIZE = (100_000, 128)
_FEATURES_PER_PART = 4
_CPU = torch.device("cpu")


def run(options: argparse.Namespace) -> int:
    """Measure, print tables, and write what was asked for."""
    metric = chosen_metric(options)
    check_outputs(options)
    dataset = chosen_dataset(options, _DEFAULT_SIZE, max(options.nq or DEFAULT_QUERIES))
    dataset = dataset.to(_CPU, torch.float32)
    descriptions = _descriptions(options.index, dataset)
    fewest = min(descriptions.values())
    sizes = {
        "--nq": (options.nq, DEFAULT_QUERIES, len(dataset.queries), "queries"),
        "--k": (options.k, DEFAULT_K, len(dataset.database), "database vectors"),
        "--nprobe": (options.nprobe, DEFAULT_NPROBE, fewest, "lists"),
    }
    sweep = {option: fitting_sizes(option, *facts) for option, facts in sizes.items()}
    builds = load_builds(options.faiss, _CPU)
    warn_of_slowing_variables()
    for option, (asked, default, _, _) in sizes.items():
        note_sizes(option, asked, default, sweep[option])
    with equal_terms(options.threads or torch.get_num_threads(), list(builds.values())):
        report = _measure_all(dataset, metric, descriptions, sweep, builds, options)
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if options.png:
        draw_recall(options.png, curves(report), f"{dataset.name}, {metric.name}")
    return 0


def _measure_all(
    dataset: Dataset,
    metric: Metric,
    descriptions: Mapping[str, int],
    sweep: Mapping[str, Sequence[int]],
    builds: Mapping[str, FaissBuild],
    options: argparse.Namespace,
) -> dict[str, Any]:
    report: dict[str, Any] = {
        "benchmark": "ann",
        "dataset": {
            "name": dataset.name,
            "description": dataset.description,
            "n": len(dataset.database),
            "dim": dataset.dim,
        },
        "settings": {
            "metric": metric.name,
            "own_centroids": options.own_centroids,
            "threads": torch.get_num_threads(),
            "repeats": options.repeats,
            "seconds": options.seconds,
        },
        "hardware": hardware(),
        "versions": versions(),
        "faiss": {name: describe_build(build) for name, build in builds.items()},
        "warnings": slowing_variables(),
        "indexes": [],
        "cells": [],
    }
    print(describe_ann_run(report), flush=True)
    queries = dataset.queries[: max(sweep["--nq"])]
    truth = exact_neighbours(queries, dataset.database, max(sweep["--k"]), metric.name)
    for description, nlist in descriptions.items():
        contenders = _contenders(dataset, metric, description, builds, options.own_centroids)
        index = {
            "index": description,
            "nlist": nlist,
            "contenders": {each.name: each.facts for each in contenders},
        }
        print(f"{description} trained and filled", file=sys.stderr, flush=True)
        cells = []
        for nq, k, nprobe in itertools.product(*sweep.values()):
            for each in contenders:
                each.nprobe = nprobe
            timings = measure(
                contenders, nq, k, repeats=options.repeats, seconds=options.seconds, clock=clock_for(_CPU)
            )
            cell = {"index": description, "nprobe": nprobe, **make_cell(nq, k, timings, truth[:nq, :k])}
            for facts in cell["contenders"].values():
                facts["queries_per_second"] = nq / facts["median_seconds"]
            cells.append(cell)
            print(f"{description} nq={nq} k={k} nprobe={nprobe} measured", file=sys.stderr, flush=True)
        print(format_index(index, cells), flush=True)
        report["indexes"].append(index)
        report["cells"] += cells
    print(explain_columns(options.own_centroids))
    return report


def _contenders(
    dataset: Dataset,
    metric: Metric,
    description: str,
    builds: Mapping[str, FaissBuild],
    own_centroids: bool,
) -> list[Lists]:
    """Return all contenders, trained and filled, ours last."""
    ours = OurLists(dataset, metric, description)
    for warning in ours.warnings:
        print(f"warning: {description}: {warning}", file=sys.stderr)
    centroids = None if own_centroids else ours.index.centroids
    peers = [
        FaissLists(name, build, dataset, metric, description, centroids) for name, build in builds.items()
    ]
    return [*peers, ours]


def _descriptions(asked: Sequence[str] | None, dataset: Dataset) -> dict[str, int]:
    """Return the descriptions of the indexes to measure, with their numbers of lists."""
    n, dim = dataset.database.shape
    if asked is None:
        nlist = usual_nlist(n)
        m = max(m for m in range(1, max(1, dim // _FEATURES_PER_PART) + 1) if dim % m == 0)
        asked = [f"IVF{nlist},{storage}" for storage in ("Flat", "SQ8", f"PQ{m}")]
    found = {description: check_description(description, dim) for description in asked}
    for description, nlist in found.items():
        if nlist > n:
            raise ArgumentError(
                f"--index is {description!r}, but there are {n:,} database vectors to fill its lists"
            )
    return found


def curves(report: dict[str, Any]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Return recall and queries per second of each contender, for each index, number of queries and k."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for cell in report["cells"]:
        panel = panels.setdefault(f"{cell['index']}, nq={cell['nq']}, k={cell['k']}", {})
        for name, facts in cell["contenders"].items():
            panel.setdefault(name, []).append((facts["recall"], facts["queries_per_second"]))
    return panels
