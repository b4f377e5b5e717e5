"""The command ``elips-torch``: its arguments, and what it does with bad ones."""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from elips_torch.cli import doctor
from elips_torch.cli.bench_arguments import add_bench_ann, add_bench_exact
from elips_torch.cli.command_texts import SUMMARIES
from elips_torch.core.errors import ElipsError

_EXAMPLES = """examples:
  elips-torch doctor
  elips-torch build --vectors docs.npy --metric cosine --output docs.safetensors
  elips-torch search --index docs.safetensors --queries queries.npy --output found.jsonl
  elips-torch bench exact --synthetic 100000 384 --nq 1 32 --k 10
  elips-torch bench ann --synthetic 100000 128 --png curves.png
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, or the arguments given instead.

    Returns:
        0 for success, 1 where the smoke test fails or a recall is out of reach, 2 for bad input.
    """
    typed = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if typed and typed[0] in SUMMARIES:
            return _run_retrieval(typed[0], typed[1:])
        return _run(typed)
    except (ElipsError, ImportError, OSError) as error:
        # One line: what is wrong is in what the user gave or has installed.
        print(f"elips-torch: {' '.join(_without_pointer(str(error)).split())}", file=sys.stderr)
        return 2


def _without_pointer(message: str) -> str:
    """Return a message without the lines that point at a place, which mean nothing within one line."""
    lines = message.splitlines()
    return "\n".join(lines[:-2]) if len(lines) > 2 and set(lines[-1].strip()) == {"^"} else message


def _run(arguments: Sequence[str]) -> int:
    parser = build_parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(_what_to_type(options, unknown))
    return int(options.run(options))


def _run_retrieval(command: str, arguments: Sequence[str]) -> int:
    """Run a command whose options may come from a YAML."""
    if importlib.util.find_spec("jsonargparse") is None:
        raise ImportError(f'elips-torch {command} needs jsonargparse: pip install "elips-torch[cli]"')
    # Only these commands import jsonargparse and what they run: the others work without.
    retrieval = importlib.import_module("elips_torch.cli.retrieval_arguments")
    return int(retrieval.run(command, arguments))


def _what_to_type(options: argparse.Namespace, unknown: Sequence[str]) -> str:
    """Return what is wrong with arguments that no command takes."""
    sizes = [str(getattr(options, "file", "")), *unknown]
    if all(size.isdecimal() for size in sizes):
        made_up = f"--synthetic {' '.join(sizes[:2])}"
        return (
            f"{' '.join(sizes)} is no file; for made-up vectors type: "
            f"elips-torch bench {options.benchmark} {made_up}"
        )
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
    for command, summary in SUMMARIES.items():
        # Shown here; their own parsers read their arguments.
        commands.add_parser(command, help=summary, add_help=False)
    bench = commands.add_parser("bench", help="measure searches on this machine")
    benchmarks = bench.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    add_bench_exact(benchmarks)
    add_bench_ann(benchmarks)
    _add_doctor(commands)
    return parser


def _add_doctor(commands: "argparse._SubParsersAction[_Parser]") -> None:
    command = commands.add_parser(
        "doctor",
        help="what is installed, what serves each operation, and whether it works",
        description="Say what is installed, what the machine offers and which implementation serves each "
        "operation, and try the index. Ends with 0 when it works and with 1 when it does not, or faiss is "
        "installed and broken.",
        epilog="examples:\n  elips-torch doctor\n  elips-torch doctor --json > doctor.json\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=doctor.run)
    command.add_argument("--json", action="store_true", help="print the same as JSON")


def _version() -> str:
    try:
        return version("elips-torch")
    except PackageNotFoundError:
        return "0+unknown"
