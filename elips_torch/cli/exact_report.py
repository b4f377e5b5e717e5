"""The text that ``bench exact`` prints."""

from collections.abc import Sequence
from typing import Any


def describe_run(report: dict[str, Any]) -> str:
    """Return the lines above the table: data, machine, versions."""
    settings, versions = report["settings"], report["versions"]
    lines = {
        "data": f"{report['dataset']['name']}: {report['dataset']['description']}",
        "search": f"{settings['metric']}, {settings['dtype']}, screen={settings['screen']}",
        "device": report["device"],
        "CPU": f"{report['hardware']['capability']}, {settings['threads']} threads for every contender",
        "versions": ", ".join(
            f"{name} {versions[name]}" for name in ("elips_torch", "python", "torch", "triton", "numpy")
        ),
    }
    rows = [f"{name:<10}{text}" for name, text in lines.items()]
    for name, build in report["faiss"].items():
        options = build["compile_options"] or "no options"
        rows.append(f"{name:<13} level {build['level']}, {build['blas']}, compiled with {options}")
        if build["faster"]:
            rows.append(f"{'':<13} {build['faster']}")
    if "roofline" in report:
        measured = report["roofline"]
        rows.append(
            f"measured  {measured['bytes_per_second'] / 1e9:.0f} GB/s in a copy, "
            f"{measured['flops_per_second'] / 1e12:.1f} TFLOP/s in a {settings['dtype']} product"
        )
    return "\n".join(rows)


def format_cells(report: dict[str, Any]) -> str:
    """Return the table, one line per search, and what served ours below."""
    cells = report["cells"]
    peers = [name for name in cells[0]["contenders"] if name != "ours"]
    header = ["dataset", "nq", "k"]
    for name in peers:
        header += [f"{name} ms", "recall"]
    header += ["ours ms", "20-80 %", "first s", "ratio", "recall", "exact"]
    with_shares = "bandwidth_share" in cells[0]
    if with_shares:
        header += ["bandwidth", "products"]
    rows = []
    for cell in cells:
        row = [report["dataset"]["name"], str(cell["nq"]), str(cell["k"])]
        for name in peers:
            peer = cell["contenders"][name]
            row += [_milliseconds(peer["median_seconds"]), f"{peer['recall']:.4f}"]
        ours = cell["contenders"]["ours"]
        row += [
            _milliseconds(ours["median_seconds"]),
            f"{_milliseconds(ours['q20_seconds'])}-{_milliseconds(ours['q80_seconds'])}",
            f"{ours['first_call_seconds']:.2f}",
            "-" if cell["ratio"] is None else f"{cell['ratio']:.2f}",
            f"{ours['recall']:.4f}",
            "yes" if ours["exact"] else "NO",
        ]
        if with_shares:
            row += [f"{cell['bandwidth_share']:.0%}", f"{cell['matrix_share']:.0%}"]
        rows.append(row)
    lines = [
        "",
        align([header, *rows]),
        "",
        "ms: median; 20-80 %: quantiles of ours; first s: our very first call, compilation included",
        "ratio: fastest peer's median / ours, above 1 where ours is faster",
        "recall: of the true neighbours; exact: the true ids in the true order (ties by the lower id)",
    ]
    served = {(cell["nq"], cell["k"]): cell.get("implementation") for cell in cells}
    for implementation in dict.fromkeys(served.values()):
        where = ", ".join(f"{nq}/{k}" for (nq, k), name in served.items() if name == implementation)
        lines.append(f"ours served by {implementation!r}: nq/k {where}")
    for name in peers:
        chosen = dict.fromkeys(cell["contenders"][name]["setting"] for cell in cells)
        lines.append(f"{name} at its fastest: {'; '.join(chosen)}")
    return "\n".join(lines)


def align(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of one length as text, the first column to the left and the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"
