"""The command ``search``: neighbours of the queries in a file."""

import argparse
import time

import torch

from elips_torch.cli.index_files import check_output, open_index
from elips_torch.cli.result_files import NEIGHBOUR_ENDINGS, check_neighbours, neighbours_file
from elips_torch.cli.vector_sources import VectorSource, open_vectors
from elips_torch.core.errors import ArgumentError, ShapeError
from elips_torch.core.progress import with_progress
from elips_torch.indexes.base import Index

# Queries at a time, unless told otherwise.
BATCH_QUERIES = 4096


def run(options: argparse.Namespace) -> int:
    """Search and write what is found."""
    check_output("--output", options.output, NEIGHBOUR_ENDINGS, [options.queries])
    check_neighbours(options.output)
    index, queries = open_both(options.index, options.queries, options.device)
    begin, start = time.perf_counter(), 0
    with neighbours_file(options.output) as write, torch.inference_mode():
        batches = queries.batches(options.batch_rows or BATCH_QUERIES, metric=index.metric)
        for batch in with_progress(batches, options.progress, "searching", "batch"):
            scores, ids = index.search(batch.to(index.device), options.k, **options.parameters)
            write(start, scores.cpu(), ids.cpu())
            start += len(batch)
    seconds = time.perf_counter() - begin
    rate = f"{queries.n / seconds:,.0f} queries per second"
    print(f"wrote {options.output}: {options.k} neighbours of {queries.n:,} queries, {rate}")
    return 0


def open_both(index_path: str, queries_text: str, device: str | None) -> tuple[Index, VectorSource]:
    """Open an index and queries that fit it.

    Raises:
        ElipsError: one of them cannot be opened, the dims differ, or the index is empty.
    """
    queries = open_vectors(queries_text)
    index = open_index(index_path, device or "cpu")
    if queries.dim != index.dim:
        raise ShapeError(
            f"{queries_text} has vectors of dim {queries.dim}, the index in {index_path} has dim {index.dim}"
        )
    if not index.ntotal:
        raise ArgumentError(f"the index in {index_path} is empty, expected one that holds vectors")
    return index, queries
