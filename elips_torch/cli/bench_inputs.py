"""What the benchmarks are asked to measure, checked before anything runs."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from elips_torch.cli.datasets import Dataset, clustered, read_dataset
from elips_torch.cli.environment import slowing_variables
from elips_torch.core.errors import ArgumentError
from elips_torch.core.metric import Metric, resolve_metric
from elips_torch.evaluation.plots import check_plotting

_METRICS = ("ip", "l2", "cosine")


def chosen_metric(options: argparse.Namespace) -> Metric:
    """Return the metric, which must be one that peers have, too."""
    metric = resolve_metric(options.metric)
    if metric.name not in _METRICS:
        raise ArgumentError(f"--metric is {options.metric!r}, expected {', '.join(_METRICS)}")
    return metric


def chosen_dataset(options: argparse.Namespace, default_size: tuple[int, int], n_queries: int) -> Dataset:
    """Return the vectors of the file, or made-up ones with so many queries."""
    if options.file is None:
        n, dim = options.synthetic or default_size
        return clustered(n, dim, n_queries)
    if options.synthetic:
        raise ArgumentError("both a file and --synthetic were given, expected one of them")
    if options.file.isdecimal() and not Path(options.file).exists():
        raise ArgumentError(
            f"no file at {options.file!r}; for made-up vectors type --synthetic N D, "
            f"as in --synthetic {options.file} {default_size[1]}"
        )
    return read_dataset(options.file, options.queries_key, options.database_key)


def fitting_sizes(
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


def warn_of_slowing_variables() -> None:
    """Say which environment variables can slow peers."""
    for line in slowing_variables():
        print(f"warning: {line}", file=sys.stderr)


def note_sizes(
    option: str, asked: Sequence[int] | None, default: Sequence[int], sizes: Sequence[int]
) -> None:
    """Say which sizes of the default were left out."""
    if asked is None and list(sizes) != list(default):
        kept, usual = (" ".join(map(str, each)) for each in (sizes, default))
        print(f"note: {option} {kept} instead of {usual}, as the data allow", file=sys.stderr)


def check_outputs(options: argparse.Namespace) -> None:
    """Refuse what could not be written, before anything runs."""
    for option, path in (("--json", options.json), ("--png", options.png)):
        if path and not Path(path).resolve().parent.is_dir():
            raise ArgumentError(f"{option} is {path!r}, but there is no such folder to write in")
    if options.png:
        check_plotting()
