"""The command ``build``: from a file of vectors to an index file."""

import argparse
import importlib
import inspect
import os
import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from elips_torch.cli.datasets import as_dtype
from elips_torch.cli.id_sources import read_ids
from elips_torch.cli.index_files import ENDINGS, check_output, is_faiss, write_index
from elips_torch.cli.vector_sources import VectorSource, open_vectors
from elips_torch.core.errors import ArgumentError
from elips_torch.core.progress import with_progress
from elips_torch.evaluation.tuning import layers
from elips_torch.indexes.base import Index
from elips_torch.indexes.factory import index_factory
from elips_torch.indexes.suggestion import suggest_index

# Vectors that training is given: for each list, and at least.
_PER_LIST, LEAST = 64, 65_536


def run(options: argparse.Namespace) -> int:
    """Build the index and write it."""
    check_output("--output", options.output, ENDINGS, [options.vectors, options.ids])
    source = open_vectors(options.vectors)
    print(f"{source.n:,} vectors of dim {source.dim} from {source.place.text}")
    index = make_index(options, source)
    ids = None if options.ids is None else read_ids(options.ids, source.n).to(index.device)
    if not index.is_trained:
        _fit(index, source, options)
    if is_faiss(options.output):
        # What faiss does not have is said before the vectors are added.
        index.to_faiss()
    begin = time.perf_counter()
    _add(index, source, ids, options)
    print(f"added in {time.perf_counter() - begin:.1f} s: {index}")
    write_index(index, options.output)
    sizes = os.path.getsize(options.output) / 2**20, index.memory_bytes() / 2**20
    print(f"wrote {options.output}: {sizes[0]:,.1f} MiB, {sizes[1]:,.1f} MiB when in memory")
    return 0


def make_index(options: argparse.Namespace, source: VectorSource) -> Index:
    """Return the empty index that options describe: by class, by a line of text, or by what suits.

    Raises:
        ElipsError: the description or a keyword is wrong, or two descriptions are given.
    """
    # Older versions of jsonargparse leave out a class that was not given.
    described = getattr(options, "index", None)
    if described is not None:
        for name in ("factory", "metric", "p", "memory_bytes"):
            if getattr(options, name) is not None:
                own = f"; write --index.{name}" if name in ("metric", "p") else ""
                raise ArgumentError(f"both --index and --{name.replace('_', '-')} were given{own}")
        if options.options:
            raise ArgumentError("--options go with --factory; those of a class are written --index.NAME")
        made: Index = _construct(described, {"dim": source.dim, "device": options.device})
        if made.dim != source.dim:
            raise ArgumentError(
                f"--index has dim {made.dim}, the vectors in {source.place.text} have dim {source.dim}"
            )
        return made
    metric = options.metric or "l2"
    description = options.factory
    if description is None:
        suggestion = suggest_index(source.n, source.dim, memory_bytes=options.memory_bytes, metric=metric)
        print(f"index: {suggestion}, as nothing else was asked for: {suggestion.reason}")
        description = str(suggestion)
    elif options.memory_bytes is not None:
        raise ArgumentError("both --factory and --memory-bytes were given, expected one of them")
    keywords = dict(options.options)
    if isinstance(keywords.get("dtype"), str):
        keywords["dtype"] = as_dtype(keywords["dtype"])
    if options.device is not None:
        keywords["device"] = options.device
    return index_factory(source.dim, description, metric, p=options.p, **keywords)


def _construct(node: Any, given: Mapping[str, Any]) -> Any:
    """Make the object that a class and its keywords stand for, and those among its keywords first.

    Args:
        node: what has ``class_path`` and ``init_args``; anything else is returned as it is.
        given: keywords for every class that takes them and is not told others.
    """
    if not hasattr(node, "class_path"):
        return node
    module, _, name = node.class_path.rpartition(".")
    made = getattr(importlib.import_module(module), name)
    said = {
        key: _construct(value, given)
        for key, value in vars(node.get("init_args", argparse.Namespace())).items()
    }
    known = inspect.signature(made).parameters
    return made(
        **{key: value for key, value in given.items() if key in known and said.get(key) is None},
        **{key: value for key, value in said.items() if value is not None or key not in given},
    )


def _fit(index: Index, source: VectorSource, options: argparse.Namespace) -> None:
    rows = options.train_rows
    if rows is None:
        nlist = max((getattr(layer, "nlist", 0) for layer in layers(index)), default=0)
        rows = max(LEAST, _PER_LIST * nlist)
    sample = source.sample(rows, options.seed, metric=index.metric, progress=options.progress)
    begin = time.perf_counter()
    index.fit(sample.to(index.device))
    print(f"trained on {len(sample):,} vectors in {time.perf_counter() - begin:.1f} s")


def _add(index: Index, source: VectorSource, ids: Tensor | None, options: argparse.Namespace) -> None:
    start = 0
    batches = source.batches(options.batch_rows, metric=index.metric)
    for batch in with_progress(batches, options.progress, "adding", "batch"):
        stop = start + len(batch)
        index.add(batch.to(index.device), ids=None if ids is None else ids[start:stop])
        start = stop
