"""Pictures of measurements; the only folder that imports matplotlib, and only when one is drawn."""

import importlib.util
import os
from collections.abc import Mapping, Sequence

_INSTALL = 'pictures need matplotlib: pip install "elips-torch[viz]"'


def check_plotting() -> None:
    """Check that pictures can be drawn, before the work whose result they would show.

    Raises:
        ImportError: matplotlib is missing, with the line that installs it.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(_INSTALL)


def draw_times(
    path: str | os.PathLike[str],
    labels: Sequence[str],
    milliseconds: Mapping[str, Sequence[float]],
    ratios: Sequence[float | None],
    title: str,
) -> None:
    """Write a picture of times, one group of bars per label and one bar per contender.

    Args:
        path: file to write; its suffix says the format.
        labels: G names of groups.
        milliseconds: for each contender its G times.
        ratios: G numbers to write above the groups; None leaves a group without.
        title: above the picture.

    Raises:
        ImportError: matplotlib is missing.
    """
    check_plotting()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 1.3 * len(labels)), 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(1, len(milliseconds))
    for place, (name, values) in enumerate(milliseconds.items()):
        positions = [group + width * (place - (len(milliseconds) - 1) / 2) for group in range(len(labels))]
        axes.bar(positions, values, width, label=name)
    for group, ratio in enumerate(ratios):
        if ratio is not None:
            top = max(values[group] for values in milliseconds.values())
            axes.annotate(f"{ratio:.2f}x", (group, top), (0, 3), textcoords="offset points", ha="center")
    axes.set_yscale("log")
    axes.margins(y=0.15)
    axes.set_xticks(range(len(labels)), labels)
    axes.set(ylabel="milliseconds (median)", title=title)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="upper left")
    figure.savefig(os.fspath(path), dpi=150)


def draw_recall(
    path: str | os.PathLike[str],
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    title: str,
) -> None:
    """Write a picture of recall and queries per second; up and to the right is better.

    Args:
        path: file to write; its suffix says the format.
        panels: for each panel, by its title, the curve of each contender: recall and queries per second of
            each of its searches.
        title: above the picture.

    Raises:
        ImportError: matplotlib is missing.
    """
    check_plotting()
    from matplotlib.figure import Figure

    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.5 * columns, 3.5 * lines + 0.5), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (name, curves) in zip(grid.flat, panels.items(), strict=False):
        for contender, points in curves.items():
            # In the order of the searches, so that a line shows what reading more brings.
            recalls, rates = zip(*points, strict=True)
            axes.plot(recalls, rates, marker="o", label=contender)
        axes.set_yscale("log")
        axes.set(xlabel="recall", ylabel="queries per second", title=name)
        axes.grid(which="both", alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    figure.savefig(os.fspath(path), dpi=150)
