"""The text that ``bench ann`` prints."""

from collections.abc import Sequence
from typing import Any

from elips_torch.cli.exact_report import align


def describe_ann_run(report: dict[str, Any]) -> str:
    """Return the lines above the tables: data, machine, versions."""
    settings, versions = report["settings"], report["versions"]
    centroids = "each contender's own" if settings["own_centroids"] else "ours, given to every contender"
    lines = {
        "data": f"{report['dataset']['name']}: {report['dataset']['description']}",
        "search": f"{settings['metric']}, float32; centroids: {centroids}",
        "CPU": f"{report['hardware']['capability']}, {settings['threads']} threads for every contender",
        "versions": ", ".join(
            f"{name} {versions[name]}" for name in ("elips_torch", "python", "torch", "numpy")
        ),
    }
    rows = [f"{name:<10}{text}" for name, text in lines.items()]
    for name, build in report["faiss"].items():
        options = build["compile_options"] or "no options"
        rows.append(f"{name:<13} level {build['level']}, {build['blas']}, compiled with {options}")
        if build["faster"]:
            rows.append(f"{'':<13} {build['faster']}")
    return "\n".join(rows)


def format_index(index: dict[str, Any], cells: Sequence[dict[str, Any]]) -> str:
    """Return the tables of one index: how long it took to make, and one line per search."""
    made = [["", "train s", "add s", "error"]]
    for name, facts in index["contenders"].items():
        seconds = (f"{facts[step]:.2f}" for step in ("fit_seconds", "add_seconds"))
        made.append([name, *seconds, f"{facts['quantization_error']:.5g}"])
    ours = index["contenders"]["ours"]
    peers = [name for name in cells[0]["contenders"] if name != "ours"]
    header = [index["index"], "k", "nprobe"]
    for name in peers:
        header += [f"{name} q/s", "recall"]
    header += ["ours q/s", "recall", "20-80 % ms", "ratio"]
    rows = []
    for cell in cells:
        row = [f"nq {cell['nq']}", str(cell["k"]), str(cell["nprobe"])]
        for name in [*peers, "ours"]:
            contender = cell["contenders"][name]
            row += [_rate(contender["queries_per_second"]), f"{contender['recall']:.4f}"]
        mine = cell["contenders"]["ours"]
        row += [
            f"{1e3 * mine['q20_seconds']:.3g}-{1e3 * mine['q80_seconds']:.3g}",
            "-" if cell["ratio"] is None else f"{cell['ratio']:.2f}",
        ]
        rows.append(row)
    summary = (
        f"ours: {ours['memory_bytes'] / 2**20:.1f} MiB, {index['nlist']} lists, imbalance factor "
        f"{ours['imbalance_factor']:.2f}"
    )
    return "\n".join(["", align(made), summary, "", align([header, *rows])])


def explain_columns(own_centroids: bool) -> str:
    """Return what the columns mean."""
    trained = (
        "its centroids and codes"
        if own_centroids
        else "codes only; ours also its centroids, which the others are given"
    )
    return "\n".join(
        [
            "",
            f"train s: {trained}; error: mean squared distance of vectors to their centroids",
            "q/s: queries per second, of the median; 20-80 % ms: quantiles of ours, milliseconds per call",
            "ratio: fastest peer's median / ours, above 1 where ours is faster",
            "recall: of the true neighbours",
        ]
    )


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
