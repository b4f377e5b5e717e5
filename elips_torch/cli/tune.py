"""The command ``tune``: the cheapest search parameters that reach a recall."""

import argparse
import dataclasses
import warnings
from typing import Any

import torch
from torch import Tensor

from elips_torch.cli.id_sources import check_rows, read_id_lists
from elips_torch.cli.index_files import ENDINGS, check_output, write_index
from elips_torch.cli.result_files import whole_file, write_json
from elips_torch.cli.search import open_both
from elips_torch.cli.vector_sources import VectorSource, open_vectors, sample_rows
from elips_torch.core.errors import ShapeError
from elips_torch.evaluation.plots import check_plotting, plot_recall_curve
from elips_torch.evaluation.tuning import TuningCurve, tune
from elips_torch.indexes.base import Index

PICTURES = (".png", ".svg", ".pdf")


def run(options: argparse.Namespace) -> int:
    """Tune, print the curve and write what was asked for; return 1 where the recall is out of reach."""
    for option, path, endings in (
        ("--json", options.json, (".json",)),
        ("--png", options.png, PICTURES),
        ("--output", options.output, ENDINGS),
    ):
        if path is not None:
            check_output(option, path, endings, [options.queries, options.database, options.ground_truth])
    if options.png is not None:
        check_plotting()
    index, queries = open_both(options.index, options.queries, options.device)
    print(f"trying settings on {min(queries.n, options.sample):,} queries", flush=True)
    curve = _measure(index, queries, options)
    print(curve)
    if options.json is not None:
        write_json(describe(curve), options.json)
    if options.png is not None:
        with whole_file(options.png) as temporary:
            plot_recall_curve(curve).savefig(temporary, dpi=150)
    if curve.best is None:
        return 1
    if options.output is not None:
        write_index(index, options.output)
        print(f"wrote {options.output}, which searches with these parameters")
    elif curve.best.parameters:
        typed = " ".join(f"--parameters.{name} {value:g}" for name, value in curve.best.parameters.items())
        print(f"to search with it: elips-torch search {typed} ..., or keep it in an index with --output")
    return 0


def describe(curve: TuningCurve) -> dict[str, Any]:
    """Return a curve for JSON."""
    return dataclasses.asdict(curve)


def _measure(index: Index, queries: VectorSource, options: argparse.Namespace) -> TuningCurve:
    rows = sample_rows(queries.n, options.sample, options.seed)
    truth = None
    if options.ground_truth is not None:
        lists = read_id_lists(options.ground_truth)
        check_rows(lists, queries.n, options.queries)
        truth = lists.table()[rows].to(index.device)
    grid = {
        name: values if isinstance(values, list) else [values] for name, values in options.parameters.items()
    }
    chosen = queries.take(rows, metric=index.metric, progress=options.progress)
    with warnings.catch_warnings():
        # What the warning says stands below the table.
        warnings.filterwarnings("ignore", "recall@.* is out of reach", UserWarning)
        return tune(
            index,
            chosen.to(index.device),
            options.target_recall,
            options.k,
            parameters=grid or None,
            database=_database(index, options),
            ground_truth=truth,
        )


def _database(index: Index, options: argparse.Namespace) -> Tensor | None:
    if options.database is None:
        return None
    source = open_vectors(options.database)
    if (source.n, source.dim) != (index.ntotal, index.dim):
        shapes = f"({source.n}, {source.dim})", f"({index.ntotal}, {index.dim})"
        raise ShapeError(
            f"{options.database} has shape {shapes[0]}, expected {shapes[1]}, what the index was built from"
        )
    rows = torch.arange(source.n)
    return source.take(rows, metric=index.metric, progress=options.progress).to(index.device)
