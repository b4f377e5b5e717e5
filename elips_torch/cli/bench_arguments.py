"""The arguments of the benchmarks."""

import argparse
from typing import Any

from elips_torch.cli import bench_ann, bench_exact
from elips_torch.cli.datasets import DTYPES

_EXACT_EXAMPLES = """examples:
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
_ANN_EXAMPLES = """examples:
  elips-torch bench ann
      100,000 clustered vectors of dim 128 in inverted lists, as they are, in 8 bits per feature and by
      parts, against the installed faiss; takes minutes
  elips-torch bench ann --synthetic 20000 32 --index IVF128,Flat --nprobe 1 4 16 --nq 1000
      one index of fewer and smaller vectors; takes seconds
  elips-torch bench ann embeddings.safetensors --metric cosine --index IVF512,Flat --png curves.png
      vectors of your own: the tensors 'queries' (Q, D) and 'documents' (N, D) of the file
  elips-torch bench ann --own-centroids --nq 1000
      each library learns its own centroids: compares training, and says how far vectors are from them
  pip install --no-deps --target faster-faiss faiss-cpu
  elips-torch bench ann --faiss faster-faiss
      against another build of faiss as well, in the same process

All contenders have the same number of lists, read the same number of them, run the same number of threads
and, unless told otherwise, have the same centroids: ours learns them, and faiss is given them. Recall is the
share of the true neighbours, which brute force in float64 finds. An index is written as for index_factory.
"""


def add_bench_exact(benchmarks: "argparse._SubParsersAction[Any]") -> None:
    """Add the arguments of ``bench exact``."""
    exact = benchmarks.add_parser(
        "exact",
        help="exact search against torch and faiss",
        description="Measure exact search against torch and faiss, and check every result.",
        epilog=_EXACT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    exact.set_defaults(run=bench_exact.run, benchmark="exact")
    data = exact.add_argument_group("what is searched")
    _add_data(data, "100000 384")
    _add_storage(data)
    _add_searches(exact.add_argument_group("what is measured"))
    _add_rounds(exact.add_argument_group("how it is measured"), 60.0)
    _add_output(exact.add_argument_group("what is written beside the table"), "the medians")


def _add_data(group: "argparse._ArgumentGroup", default: str) -> None:
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
        help=f"without a file: N unit vectors of dim D in seeded random clusters (default: {default})",
    )


def _add_storage(group: "argparse._ArgumentGroup") -> None:
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
    _add_metric(group, "ip")
    group.add_argument(
        "--screen",
        default="auto",
        choices=["auto", "int8", "bf16", "none"],
        help="low-precision plane that ours keeps beside the vectors; changes no result (default: auto)",
    )
    _add_faiss(group)


def _add_rounds(group: "argparse._ArgumentGroup", seconds: float) -> None:
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
        default=seconds,
        metavar="S",
        help=f"begin no further round of a search after this long (default: {seconds:g})",
    )


def add_bench_ann(benchmarks: "argparse._SubParsersAction[Any]") -> None:
    """Add the arguments of ``bench ann``."""
    ann = benchmarks.add_parser(
        "ann",
        help="approximate search against faiss: recall and queries per second",
        description="Measure recall and queries per second of indexes with inverted lists against faiss.",
        epilog=_ANN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ann.set_defaults(run=bench_ann.run, benchmark="ann")
    data = ann.add_argument_group("what is searched")
    _add_data(data, "100000 128")
    data.add_argument(
        "--index",
        nargs="+",
        metavar="INDEX",
        help="descriptions of indexes: IVF<lists>, then Flat, SQ8, SQ6, SQ4, SQfp16, SQbf16, PQ<parts> or "
        "PQ<parts>x4 (default: Flat, SQ8 and PQ in about 4 roots of N lists)",
    )
    searches = ann.add_argument_group("what is measured")
    for option, letter, what in (
        ("--nq", "Q", "numbers of queries in one call (default: those of 1 32 1000 that fit)"),
        ("--k", "K", "numbers of neighbours (default: 10)"),
        ("--nprobe", "P", "numbers of lists to read (default: those of 1 4 16 64 that fit)"),
    ):
        searches.add_argument(option, nargs="+", type=_positive, metavar=letter, help=what)
    _add_metric(searches, "l2")
    _add_faiss(searches)
    searches.add_argument(
        "--own-centroids",
        action="store_true",
        help="let every contender learn its own centroids, in as many passes",
    )
    _add_rounds(ann.add_argument_group("how it is measured"), 20.0)
    _add_output(ann.add_argument_group("what is written beside the tables"), "recall and queries per second")


def _add_metric(group: "argparse._ArgumentGroup", default: str) -> None:
    group.add_argument("--metric", default=default, help=f"ip, l2 or cosine (default: {default})")


def _add_faiss(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--faiss",
        nargs="+",
        default=[],
        metavar="PATH",
        help="folders that hold further builds of faiss, such as the site-packages of another environment; "
        "the ratio is to the fastest of all peers",
    )


def _add_output(group: "argparse._ArgumentGroup", what: str) -> None:
    group.add_argument("--json", metavar="OUT.json", help="all timings, settings, versions and hardware")
    group.add_argument("--png", metavar="OUT.png", help=f"a picture of {what}; needs matplotlib")


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
