"""The command ``elips-torch``: its arguments, and what it does with bad ones."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from elips_torch.cli import bench_exact, doctor
from elips_torch.cli.datasets import DTYPES
from elips_torch.core.errors import ElipsError

_EXAMPLES = """examples:
  elips-torch doctor
  elips-torch bench exact --synthetic 100000 384 --nq 1 32 --k 10
"""
_BENCH_EXAMPLES = """examples:
  elips-torch bench exact
      100,000 clustered vectors of dim 384, against torch and the installed faiss; takes minutes
  elips-torch bench exact --synthetic 20000 64 --nq 1 32 --k 10
      fewer and smaller ones, two searches; takes seconds
  elips-torch bench exact embeddings.safetensors --metric cosine --json times.json --png times.png
      vectors of your own: the tensors 'queries' (Q, D) and 'documents' (N, D) of the file
  pip install --no-deps --target faster-faiss faiss-cpu
  elips-torch bench exact --faiss faster-faiss
      against another build of faiss as well, in the same process

Every contender is warmed up first, and peers try their settings and keep the fastest. Then rounds
alternate between the contenders. All run the same number of threads. Results are compared with brute
force in float64.
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, or the arguments given instead.

    Returns:
        0 for success, 1 where the smoke test fails, 2 for bad input.
    """
    parser = build_parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(_what_to_type(options, unknown))
    try:
        return int(options.run(options))
    except (ElipsError, ImportError) as error:
        # One line: what is wrong is in what the user gave or has installed.
        print(f"elips-torch: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _what_to_type(options: argparse.Namespace, unknown: Sequence[str]) -> str:
    """Return what is wrong with arguments that no command takes."""
    sizes = [str(getattr(options, "file", "")), *unknown]
    if all(size.isdecimal() for size in sizes):
        made_up = f"--synthetic {' '.join(sizes[:2])}"
        return f"{' '.join(sizes)} is no file; for made-up vectors type: elips-torch bench exact {made_up}"
    return f"unrecognized arguments: {' '.join(unknown)}"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = _Parser(
        prog="elips-torch",
        description="Vector retrieval inside PyTorch.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"elips-torch {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    bench = commands.add_parser("bench", help="measure searches on this machine")
    benchmarks = bench.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    _add_bench_exact(benchmarks)
    _add_doctor(commands)
    return parser


def _add_bench_exact(benchmarks: "argparse._SubParsersAction[_Parser]") -> None:
    exact = benchmarks.add_parser(
        "exact",
        help="exact search against torch and faiss",
        description="Measure exact search against torch and faiss, and check every result.",
        epilog=_BENCH_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    exact.set_defaults(run=bench_exact.run)
    _add_data(exact.add_argument_group("what is searched"))
    _add_searches(exact.add_argument_group("what is measured"))
    _add_rounds(exact.add_argument_group("how it is measured"))
    output = exact.add_argument_group("what is written beside the table")
    output.add_argument("--json", metavar="OUT.json", help="all timings, settings, versions and hardware")
    output.add_argument("--png", metavar="OUT.png", help="a picture of the medians; needs matplotlib")


def _add_data(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "file",
        nargs="?",
        metavar="FILE.safetensors",
        help="your own vectors; without a file they are made up",
    )
    group.add_argument(
        "--queries-key",
        default="queries",
        metavar="NAME",
        help="tensor (Q, D) in the file (default: queries)",
    )
    group.add_argument(
        "--database-key",
        default="documents",
        metavar="NAME",
        help="tensor (N, D) in the file (default: documents)",
    )
    group.add_argument(
        "--synthetic",
        nargs=2,
        type=_positive,
        metavar=("N", "D"),
        help="without a file: N unit vectors of dim D in seeded random clusters (default: 100000 384)",
    )
    group.add_argument(
        "--dtype",
        default="float32",
        choices=list(DTYPES),
        help="how ours stores the vectors; on a CPU peers hold the same values as float32 (default: float32)",
    )
    group.add_argument(
        "--device", default="cpu", choices=["cpu", "cuda"], help="where to search (default: cpu)"
    )


def _add_searches(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--nq",
        nargs="+",
        type=_positive,
        metavar="Q",
        help="numbers of queries in one call, any number of them, at most what the file has "
        "(default: those of 1 32 512 4096 that fit)",
    )
    group.add_argument(
        "--k",
        nargs="+",
        type=_positive,
        metavar="K",
        help="numbers of neighbours; each is measured with each --nq (default: 10 100)",
    )
    group.add_argument("--metric", default="ip", help="ip, l2 or cosine (default: ip)")
    group.add_argument(
        "--screen",
        default="auto",
        choices=["auto", "int8", "bf16", "none"],
        help="low-precision plane that ours keeps beside the vectors; changes no result (default: auto)",
    )
    group.add_argument(
        "--faiss",
        nargs="+",
        default=[],
        metavar="PATH",
        help="folders that hold further builds of faiss, such as the site-packages of another environment; "
        "the ratio is to the fastest of all peers",
    )


def _add_rounds(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--threads", type=_positive, metavar="T", help="of every contender (default: torch's choice)"
    )
    group.add_argument(
        "--repeats",
        type=_positive,
        default=7,
        metavar="R",
        help="rounds, in each of which every contender runs once; medians are shown (default: 7)",
    )
    group.add_argument(
        "--seconds",
        type=_duration,
        default=60.0,
        metavar="S",
        help="begin no further round of a search after this long (default: 60)",
    )


def _add_doctor(commands: "argparse._SubParsersAction[_Parser]") -> None:
    command = commands.add_parser(
        "doctor",
        help="what is installed, what serves each operation, and whether it works",
        description="Say what is installed, what the machine offers and which implementation serves each "
        "operation, and try the index. Ends with 0 when it works and with 1 when it does not.",
        epilog="examples:\n  elips-torch doctor\n  elips-torch doctor --json > doctor.json\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=doctor.run)
    command.add_argument("--json", action="store_true", help="print the same as JSON")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _duration(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0.0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return seconds


def _version() -> str:
    try:
        return version("elips-torch")
    except PackageNotFoundError:
        return "0+unknown"
