"""The command ``evaluate``: how many of the relevant ids a search finds."""

import argparse
import sys

import torch

from elips_torch.cli.exact_report import align
from elips_torch.cli.id_sources import IdLists, check_rows, read_id_lists
from elips_torch.cli.index_files import check_output
from elips_torch.cli.result_files import write_json
from elips_torch.cli.search import BATCH_QUERIES, open_both
from elips_torch.core.errors import ArgumentError
from elips_torch.core.progress import with_progress
from elips_torch.evaluation.retrieval_metrics import RetrievalMetrics
from elips_torch.indexes.base import Index

# What sentence-transformers' evaluators call a metric where the name differs.
_THEIR_NAMES = {"hit_rate": "accuracy"}


def run(options: argparse.Namespace) -> int:
    """Search, compare, print a table and write the numbers."""
    if options.json is not None:
        check_output("--json", options.json, (".json",))
    index, queries = open_both(options.index, options.queries, options.device)
    relevant = read_id_lists(options.relevant)
    check_rows(relevant, queries.n, options.queries)
    _check_known(index, relevant)
    metrics = RetrievalMetrics(k=options.k)
    start = 0
    with torch.inference_mode():
        batches = queries.batches(options.batch_rows or BATCH_QUERIES, metric=index.metric)
        for batch in with_progress(batches, options.progress, "searching", "batch"):
            found = index.search(batch.to(index.device), max(options.k), **options.parameters).ids.cpu()
            ids, lims = relevant.rows(start, start + len(batch))
            metrics.update(found, ids, lims=lims)
            start += len(batch)
    # In the seven digits that float32 has; more would be noise.
    values = {_their_name(name): float(f"{value:.7g}") for name, value in metrics.compute().items()}
    print(format_table(values, options.k))
    print(f"means over the {_answerable(relevant):,} of {queries.n:,} queries that have a relevant id")
    if options.json is not None:
        prefix = "" if options.name is None else f"{options.name}_"
        write_json({f"{prefix}{name}": value for name, value in values.items()}, options.json)
    return 0


def format_table(values: dict[str, float], ks: list[int]) -> str:
    """Return metrics in rows and k in columns."""
    names = list(dict.fromkeys(name.split("@")[0] for name in values if "@" in name))
    rows = [["", *(f"@{k}" for k in ks)]]
    rows += [[name, *(f"{values[f'{name}@{k}']:.4f}" for k in ks)] for name in names]
    rows += [
        [name, f"{value:.4f}"] + [""] * (len(ks) - 1) for name, value in values.items() if "@" not in name
    ]
    return align(rows)


def _their_name(name: str) -> str:
    metric, _, k = name.partition("@")
    return f"{_THEIR_NAMES.get(metric, metric)}@{k}" if k else name


def _answerable(relevant: IdLists) -> int:
    owners = torch.repeat_interleave(torch.arange(len(relevant)), relevant.lims.diff())
    return len(owners[relevant.ids >= 0].unique())


def _check_known(index: Index, relevant: IdLists) -> None:
    """Check that there is something to find, and say how much of it the index cannot find."""
    asked = relevant.ids[relevant.ids >= 0]
    if not len(asked):
        raise ArgumentError(f"{relevant.where} has no relevant id for any query")
    unknown = int((~torch.isin(asked, index.ids.cpu())).sum())
    if unknown == len(asked):
        raise ArgumentError(
            f"none of the {len(asked):,} relevant ids in {relevant.where} is in the index; were its vectors "
            "added under other ids? build numbers them from 0 in the order of the file, or takes --ids"
        )
    if unknown:
        print(f"note: {unknown:,} of {len(asked):,} relevant ids are not in the index", file=sys.stderr)
