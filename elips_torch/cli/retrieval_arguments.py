"""The arguments of ``build``, ``search``, ``tune`` and ``evaluate``, also from a YAML; needs jsonargparse.

Imported only when one of these commands runs.
"""

import argparse
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from jsonargparse import (  # type: ignore[attr-defined]
    ActionConfigFile,
    ArgumentParser,
    DefaultHelpFormatter,
)
from jsonargparse.typing import NonNegativeInt, PositiveInt, register_type, restricted_number_type

from elips_torch.cli import build, evaluate, search, tune
from elips_torch.cli.command_texts import DESCRIPTIONS, EXAMPLES, INDEXES, SOURCES
from elips_torch.cli.datasets import as_dtype
from elips_torch.cli.index_files import check_device_name
from elips_torch.cli.search import BATCH_QUERIES
from elips_torch.core.errors import ParameterError
from elips_torch.indexes import catalog
from elips_torch.indexes.base import Index

_Share = restricted_number_type("Share", float, [(">", 0.0), ("<=", 1.0)])
# What the measures of sentence-transformers' evaluators look at, and 100.
_K = (1, 3, 5, 10, 100)


register_type(
    torch.dtype, lambda dtype: str(dtype).removeprefix("torch."), as_dtype, fail_already_registered=False
)


class _Formatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of examples as they are written, and says defaults without the types of Python."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.default in (None, {}, argparse.SUPPRESS):
            return text
        return f"{text} (default: {action.default})"


class _Parser(ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # Jsonargparse reads the keywords of a class by a parser of its own.
        # It is named after the program that runs, which may be elips-torch without a command.
        nested = not self.prog.startswith("elips-torch ")
        prog = "elips-torch build" if nested else self.prog
        text = f"--index: {_one_line(message)}" if nested else _one_line(message)
        unknown = re.search(r"nrecognized arguments: (\S+)", text)
        if unknown is not None:
            text += f"; {_what_to_type(prog.split()[-1], unknown[1])}"
        sys.stderr.write(f"{prog}: {text} (see {prog} --help)\n")
        raise SystemExit(2)


def run(command: str, arguments: Sequence[str]) -> int:
    """Read the arguments of a command and run it."""
    parser = PARSERS[command]()
    options = parser.parse_args(list(arguments))
    missing = [name for name in REQUIRED[command] if getattr(options, name) is None]
    if missing:
        parser.error(f"{' and '.join(f'--{name}' for name in missing)} must be given, here or in --config")
    if options.progress is None:
        options.progress = sys.stderr.isatty()
    check_device_name(options.device)
    if command != "build":
        _check_parameters(options.parameters, several=command == "tune")
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = _show_warning
        return COMMANDS[command](options)


def _check_parameters(parameters: dict[str, Any], *, several: bool) -> None:
    """Check that each search parameter is a number or, where it is tuned, a list of them."""
    for name, value in parameters.items():
        values = value if several and isinstance(value, list) else [value]
        if any(type(each) not in (int, float) for each in values):
            expected = "a number, or several as [1,4,16]" if several else "a number"
            raise ParameterError(f"--parameters.{name} is {value!r}, expected {expected}")


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def _what_to_type(command: str, unknown: str) -> str:
    """Return how what no option takes may have been meant."""
    if not unknown.startswith("-"):
        return f"files are named by options, such as --{REQUIRED[command][0]} FILE"
    name = unknown.lstrip("-").partition("=")[0]
    if command == "build":
        return f"keywords of the index are written --options.{name} or, beside --index, --index.{name}"
    return f"search parameters are written --parameters.{name}"


def _one_line(message: str) -> str:
    """Return what is wrong without what jsonargparse says about its own types."""
    text = " ".join(message.split())
    unknown = re.search(r"Expected a dot import path string: (\S+)", text)
    if unknown is not None:
        classes = ", ".join(index.__name__ for index in catalog.INDEXES)
        return (
            f"--index is {unknown[1]!r}, expected a class: {classes}; a description such as IVF1024,Flat "
            "is written --factory"
        )
    text = re.sub(
        r'Parser key "([^"]+)": Expected a <class \'dict\'>. Got value: (.*)',
        r"--\1 is \2, expected names and values, as in --\1.nprobe 16",
        text,
    )
    text = re.sub(r"Does not validate against any of the Union subtypes .*? Errors: - ", "", text)
    text = re.sub(r" - Expected a <class 'NoneType'>.*", "", text)
    text = re.sub(r" Given value type: .*", "", text)
    return re.sub(
        r'Parser key "([^"]+)"(?: element \d+)?: ', lambda key: f"--{key[1].replace('_', '-')}: ", text
    )


def build_parser() -> ArgumentParser:
    """Return the parser of ``build``."""
    parser = _parser("build")
    files = parser.add_argument_group("what is read and written")
    _add_source(files, "vectors", "the vectors (N, D) to build from")
    _add_source(
        files, "ids", "whole numbers (N,), the ids of the vectors; without it 0, 1, 2, ... as in the file"
    )
    files.add_argument(
        "--output",
        type=str | None,
        metavar="FILE",
        help="index file to write: .safetensors, or .faiss for one that faiss.read_index reads. Appears "
        "whole or not at all; an existing one is replaced.",
    )
    described = parser.add_argument_group("which index, by description")
    described.add_argument(
        "--factory",
        type=str | None,
        metavar="DESCRIPTION",
        help="such as Flat, IVF1024,Flat or OPQ32,IVF1024,PQ32,RFlat, as for index_factory. Without this and "
        "--index, what suggest_index says.",
    )
    described.add_argument("--metric", type=str | None, help="l2, ip, cosine or another. Without it l2.")
    described.add_argument("--p", type=float | None, help="exponent of metric lp")
    described.add_argument(
        "--options",
        type=dict[str, Any],
        default={},
        metavar="KEYWORDS",
        help="keywords of the classes behind the description, as in --options.nprobe 16",
    )
    described.add_argument(
        "--memory-bytes",
        type=PositiveInt | None,
        metavar="BYTES",
        help="what an index that suggest_index chooses may occupy. Without it no limit.",
    )
    parser.add_subclass_arguments(
        Index, "index", skip={"dim", "device"}, required=False, help=INDEXES, metavar="CLASS"
    )
    (parser.groups or {})["index"].title = "which index, by class"
    how = parser.add_argument_group("how it is built")
    how.add_argument(
        "--train-rows",
        type=PositiveInt | None,
        metavar="N",
        help=f"vectors to train on, chosen at random. Without it 64 for each list, at least {build.LEAST:,}.",
    )
    how.add_argument("--seed", type=NonNegativeInt, default=0, help="of that choice")
    _add_batch_rows(how, "vectors", "as many as take 16 MiB in float32")
    _add_device(how)
    return parser


def search_parser() -> ArgumentParser:
    """Return the parser of ``search``."""
    parser = _parser("search")
    files = parser.add_argument_group("what is read and written")
    _add_index(files)
    _add_source(files, "queries", "the queries (Q, D)")
    files.add_argument(
        "--output",
        type=str | None,
        metavar="FILE",
        help="file to write, .jsonl or .parquet: for each query its number from 0 on, the ids of its "
        "neighbours and their scores, best first; fewer than k where there are no more",
    )
    how = parser.add_argument_group("how it is searched")
    how.add_argument("--k", type=PositiveInt, default=10, help="number of neighbours")
    _add_parameters(how)
    _add_batch_rows(how, "queries", f"{BATCH_QUERIES:,}")
    _add_device(how)
    return parser


def tune_parser() -> ArgumentParser:
    """Return the parser of ``tune``."""
    parser = _parser("tune")
    files = parser.add_argument_group("what is read")
    _add_index(files)
    _add_source(files, "queries", "queries (Q, D) like those to come")
    _add_source(
        files,
        "database",
        "the vectors (N, D) the index was built from, in its order; read into memory. Without it, recall "
        "leaves out what coding lost.",
    )
    _add_source(
        files,
        "ground_truth",
        "the true ids (Q, K), K at least k, such as an .ivecs: saves the exact search for them. Where the "
        "index holds codes, beside --database.",
    )
    how = parser.add_argument_group("how it is tuned")
    how.add_argument(
        "--target-recall",
        type=_Share,
        default=0.95,
        metavar="R",
        help="share of the true neighbours, above 0, at most 1",
    )
    how.add_argument("--k", type=PositiveInt, default=10, help="number of neighbours")
    how.add_argument(
        "--parameters",
        type=dict[str, Any],
        default={},
        metavar="GRID",
        help="values to try for each search parameter, as in --parameters.nprobe [1,4,16]. Without it "
        "doubling from 1, then between the two around the target.",
    )
    how.add_argument(
        "--sample",
        type=PositiveInt,
        default=1000,
        metavar="Q",
        help="queries to take, at random; all are searched at once, so the speed is that of such a batch",
    )
    how.add_argument("--seed", type=NonNegativeInt, default=0, help="of that choice")
    _add_device(how)
    written = parser.add_argument_group("what is written beside the table")
    written.add_argument("--json", type=str | None, metavar="OUT.json", help="the whole curve")
    written.add_argument(
        "--png",
        type=str | None,
        metavar="OUT.png",
        help="a picture of it; also .svg or .pdf; needs matplotlib",
    )
    written.add_argument(
        "--output",
        type=str | None,
        metavar="FILE",
        help="index file to write, with the best parameters as its own; may be that of --index",
    )
    return parser


def evaluate_parser() -> ArgumentParser:
    """Return the parser of ``evaluate``."""
    parser = _parser("evaluate")
    files = parser.add_argument_group("what is read")
    _add_index(files)
    _add_source(files, "queries", "the queries (Q, D)")
    _add_source(
        files,
        "relevant",
        "for each query the ids that should be found: whole numbers (Q,), (Q, R) padded by -1, or a column "
        "of them or of lists of them",
    )
    how = parser.add_argument_group("how it is searched")
    how.add_argument(
        "--k",
        type=PositiveInt,
        nargs="+",
        default=list(_K),
        metavar="K",
        help="numbers of neighbours to look at",
    )
    _add_parameters(how)
    _add_batch_rows(how, "queries", f"{BATCH_QUERIES:,}")
    _add_device(how)
    written = parser.add_argument_group("what is written beside the table")
    written.add_argument(
        "--json",
        type=str | None,
        metavar="OUT.json",
        help="one flat dictionary with keys such as accuracy@1, ndcg@10 and map@100",
    )
    written.add_argument(
        "--name", type=str | None, help="put before each key in it, as NAME_; cosine makes cosine_ndcg@10"
    )
    return parser


PARSERS: dict[str, Callable[[], ArgumentParser]] = {
    "build": build_parser,
    "search": search_parser,
    "tune": tune_parser,
    "evaluate": evaluate_parser,
}
COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "build": build.run,
    "search": search.run,
    "tune": tune.run,
    "evaluate": evaluate.run,
}
REQUIRED = {
    "build": ("vectors", "output"),
    "search": ("index", "queries", "output"),
    "tune": ("index", "queries"),
    "evaluate": ("index", "queries", "relevant"),
}


def _parser(command: str) -> _Parser:
    parser = _Parser(
        prog=f"elips-torch {command}",
        description=textwrap.fill(DESCRIPTIONS[command], 100),
        epilog=f"{EXAMPLES[command]}\n{SOURCES}",
        formatter_class=_Formatter,
    )
    parser.add_argument(
        "--config",
        action=ActionConfigFile,
        metavar="FILE.yaml",
        help="options from a file, whose keys are their names with _ for -; options typed after it win",
    )
    parser.add_argument(
        "--progress", type=bool | None, help="show progress bars. Without it where stderr is a terminal."
    )
    return parser


def _add_source(group: Any, name: str, what: str) -> None:
    option = f"--{name.replace('_', '-')}"
    group.add_argument(option, type=str | None, metavar="FILE[:NAME]", help=what)


def _add_index(group: Any) -> None:
    group.add_argument(
        "--index",
        type=str | None,
        metavar="FILE",
        help="index file that build wrote, or .faiss that faiss did",
    )


def _add_parameters(group: Any) -> None:
    group.add_argument(
        "--parameters",
        type=dict[str, Any],
        default={},
        metavar="VALUES",
        help="search parameters, as in --parameters.nprobe 32. Without them those of the index.",
    )


def _add_batch_rows(group: Any, what: str, default: str) -> None:
    group.add_argument(
        "--batch-rows", type=PositiveInt | None, metavar="N", help=f"{what} at a time. Without it {default}."
    )


def _add_device(group: Any) -> None:
    group.add_argument(
        "--device", type=str | None, help="where the index lies, such as cuda. Without it cpu."
    )
