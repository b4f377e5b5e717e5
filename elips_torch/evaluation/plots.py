"""Pictures of measurements; the only folder that imports matplotlib, and only when one is drawn."""

import importlib.util
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from elips_torch.core.errors import ArgumentError, DtypeError, ShapeError
from elips_torch.evaluation.relevant import RelevantIds, check_integers, read_relevant
from elips_torch.evaluation.tuning import TuningCurve, TuningPoint, layers
from elips_torch.indexes.base import Index

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What stands for each id.
Payload = Mapping[int, Any] | Sequence[Any] | Callable[[int], Any]

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


def plot_recall_curve(curves: TuningCurve | Mapping[str, TuningCurve], *, title: str = "") -> "Figure":
    """Draw what each setting of the search parameters costs in speed and brings in recall.

    Every setting is a dot; a line joins those that nothing beats in both recall and speed, with their
    values beside them. A star marks the best, a dashed line the target.

    Args:
        curves: what `tune` returned, or several of them by name.
        title: above the picture.

    Returns:
        A matplotlib figure: ``figure.savefig(path)`` writes it, a notebook shows it.

    Raises:
        ImportError: matplotlib is missing.
        ArgumentError: there is no curve.

    >>> from elips_torch.evaluation import TuningCurve, TuningPoint
    >>> points = TuningPoint({"nprobe": 1}, 0.5, 9000.0), TuningPoint({"nprobe": 8}, 0.96, 2000.0)
    >>> figure = plot_recall_curve(TuningCurve(points, 0.95, k=10, n_queries=100, best=points[1]))
    >>> figure.axes[0].get_xlabel()
    'recall@10'
    """
    named = {"": curves} if isinstance(curves, TuningCurve) else dict(curves)
    if not named:
        raise ArgumentError("curves is empty, expected at least one curve")
    figure, axes = _figure(6.5, 4.5)
    for place, (name, curve) in enumerate(named.items()):
        colour = f"C{place}"
        front = _unbeaten(curve.points)
        axes.scatter(*_coordinates(curve.points), s=14, color=colour, alpha=0.4)
        axes.plot(*_coordinates(front), marker="o", markersize=4, color=colour, label=name)
        for point in front:
            values = ", ".join(f"{value:g}" for value in point.parameters.values())
            where = point.recall, point.queries_per_second
            axes.annotate(values, where, (3, 3), textcoords="offset points", fontsize=7)
        if curve.best is not None:
            axes.plot(*_coordinates([curve.best]), marker="*", markersize=13, color=colour)
    for target in sorted({curve.target_recall for curve in named.values()}):
        axes.axvline(target, linestyle="--", color="0.6", linewidth=1)
    parameters = {", ".join(point.parameters) for curve in named.values() for point in curve.points}
    beside = f" (numbers: {'; '.join(sorted(parameters))})" if any(parameters) else ""
    axes.set_yscale("log")
    axes.set(
        xlabel=" and ".join(f"recall@{k}" for k in sorted({curve.k for curve in named.values()})),
        ylabel="queries per second",
        title=title or f"up and to the right is better{beside}",
    )
    axes.grid(which="both", alpha=0.3)
    if any(named):
        axes.legend()
    return figure


def plot_neighbours(
    queries: Sequence[Any] | Tensor,
    ids: Tensor,  # (Q, K)
    documents: Payload | None = None,
    *,
    relevant: RelevantIds | None = None,  # (Q, R)
    scores: Tensor | None = None,  # (Q, K)
    title: str = "",
) -> "Figure":
    """Draw queries, one a row, with what they found, best first.

    Args:
        queries: Q payloads: pictures, or anything that `str` makes a text of. Pictures are
            tensors or arrays ``(H, W)``, ``(C, H, W)`` or ``(H, W, C)`` with 1, 3 or 4 channels, uint8 or in
            [0, 1], or PIL pictures.
        ids: ``(Q, K)`` int64 as `search` returns them; -1 leaves a place empty.
        documents: the payload of each id: a mapping, a sequence or a function. Default: the id.
        relevant: what should be found, in the forms that `RecallAtK.update` takes; frames hits in green
            and the others in red.
        scores: ``(Q, K)``, written above what was found.
        title: above the picture.

    Returns:
        A matplotlib figure.

    Raises:
        ImportError: matplotlib is missing.
        ElipsError: an argument of wrong type or shape; no query.

    >>> import torch
    >>> figure = plot_neighbours(["a cat"], torch.tensor([[1, 0]]), ["a dog", "two cats"])
    >>> [axes.texts[0].get_text() for axes in figure.axes]
    ['a cat', 'two cats', 'a dog']
    """
    check_integers("ids", ids, 2, "(Q, K)")
    if not ids.numel():
        raise ArgumentError(
            f"ids has shape {tuple(ids.shape)}, expected at least one query and one neighbour"
        )
    if len(queries) != len(ids):
        raise ShapeError(f"queries has {len(queries)} payloads, ids has {len(ids)} rows, expected as many")
    if scores is not None and scores.shape != ids.shape:
        raise ShapeError(f"scores has shape {tuple(scores.shape)}, expected {tuple(ids.shape)}, as ids")
    if not (documents is None or callable(documents) or hasattr(documents, "__getitem__")):
        raise DtypeError(
            f"documents is a {type(documents).__name__}, expected a mapping, a sequence or a function"
        )
    hits = None if relevant is None else _relevant_pairs(relevant, len(ids))
    n, k = ids.shape
    check_plotting()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 * (k + 1), 1.8 * n + 0.4), layout="constrained")
    grid = figure.subplots(n, k + 1, squeeze=False)
    for i, row in enumerate(ids.tolist()):
        _show(grid[i, 0], queries[i], f"query {i}", "0.4")
        for j, each in enumerate(row):
            axes = grid[i, j + 1]
            if each < 0:
                axes.set_axis_off()
                continue
            score = "" if scores is None else f"\n{float(scores[i, j]):.4g}"
            colour = "0.8" if hits is None else ("tab:green" if (i, each) in hits else "tab:red")
            _show(axes, _payload_of(documents, each), f"{each}{score}", colour)
    figure.suptitle(title)
    return figure


def plot_list_sizes(index: Index, *, title: str = "") -> "Figure":
    """Draw how many vectors each inverted list holds, the longest first.

    A dashed line is the mean; the title has the imbalance factor, how many times longer searches take
    than with lists of one length.

    Args:
        index: one with inverted lists, or a wrapper around such.
        title: above the picture; default says the number of lists and their imbalance.

    Returns:
        A matplotlib figure.

    Raises:
        ImportError: matplotlib is missing.
        ArgumentError: the index has no inverted lists, or is empty.

    >>> import torch
    >>> from elips_torch import IVFFlatIndex
    >>> vectors = torch.arange(400.0).view(200, 2)
    >>> index = IVFFlatIndex(dim=2, nlist=4).fit(vectors)
    >>> ids = index.add(vectors)
    >>> len(plot_list_sizes(index).axes[0].patches)
    1
    """
    lists: Any = next((each for each in layers(index) if hasattr(each, "list_sizes")), None)
    if lists is None:
        raise ArgumentError(f"index is a {type(index).__name__}, which has no inverted lists to draw")
    if not index.ntotal:
        raise ArgumentError("the index is empty, its lists have no sizes to draw")
    sizes = lists.list_sizes().sort(descending=True).values.cpu().numpy()
    figure, axes = _figure(6.5, 3.5)
    # One shape, however many lists there are.
    axes.stairs(sizes, fill=True, color="C0")
    axes.axhline(sizes.mean(), linestyle="--", color="0.3", label=f"mean {sizes.mean():.1f}")
    axes.set(
        xlabel="list, the longest first",
        ylabel="vectors",
        title=title or f"{len(sizes):,} lists, imbalance {lists.imbalance_factor():.2f}",
    )
    axes.margins(x=0.01)
    axes.legend()
    return figure


def _figure(width: float, height: float) -> "tuple[Figure, Axes]":
    check_plotting()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _unbeaten(points: Sequence[TuningPoint]) -> list[TuningPoint]:
    """Return the points that no other beats in both, by rising recall."""
    front: list[TuningPoint] = []
    for point in sorted(points, key=lambda point: (-point.recall, -point.queries_per_second)):
        if not front or point.queries_per_second > front[-1].queries_per_second:
            front.append(point)
    return front[::-1]


def _coordinates(points: Sequence[TuningPoint]) -> tuple[list[float], list[float]]:
    return [point.recall for point in points], [point.queries_per_second for point in points]


def _relevant_pairs(relevant: RelevantIds, n: int) -> set[tuple[int, int]]:
    """Return the pairs of a query's number and an id that is relevant to it."""
    wanted = read_relevant(relevant, None, None)
    if len(wanted) != n:
        raise ShapeError(f"relevant is for {len(wanted)} queries, ids has {n} rows, expected as many")
    pairs = wanted.pairs()
    return set(zip(pairs.owners.tolist(), pairs.ids.tolist(), strict=True))


def _payload_of(documents: Payload | None, each: int) -> Any:
    """Return what stands for an id, the id itself where the user has nothing."""
    if documents is None:
        return each
    if callable(documents):
        return documents(each)
    try:
        return documents[each]
    except (KeyError, IndexError):
        return each


def _show(axes: "Axes", payload: Any, heading: str, colour: str) -> None:
    pixels = _pixels(payload)
    if pixels is None:
        text = textwrap.shorten(str(payload), 120, placeholder="...")
        axes.text(0.5, 0.5, textwrap.fill(text, 18), ha="center", va="center", fontsize=7, parse_math=False)
    else:
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=1 if pixels.dtype.kind == "f" else 255)
    axes.set_title(heading, fontsize=8, parse_math=False)
    axes.set(xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set(color=colour, linewidth=2.5)


def _pixels(payload: Any) -> "np.ndarray[Any, Any] | None":
    """Return a picture as ``(H, W)`` or ``(H, W, C)``, None for what is none."""
    if isinstance(payload, Tensor):
        payload = payload.detach().cpu()
        payload = (payload.float() if payload.is_floating_point() else payload).numpy()
    elif hasattr(payload, "convert") and hasattr(payload, "getbands"):
        payload = np.asarray(payload.convert("RGB"))
    if not isinstance(payload, np.ndarray) or not payload.size:
        return None
    channels = (1, 3, 4)
    if payload.ndim == 3 and payload.shape[0] in channels and payload.shape[2] not in channels:
        payload = payload.transpose(1, 2, 0)
    if payload.ndim == 3 and payload.shape[2] == 1:
        payload = payload[:, :, 0]
    if payload.ndim != 2 and not (payload.ndim == 3 and payload.shape[2] in channels):
        return None
    pixels: np.ndarray[Any, Any] = payload.astype(np.float32) if payload.dtype.kind in "fb" else payload
    if pixels.dtype.kind == "f":
        pixels = np.nan_to_num(pixels).clip(0, 1)
    else:
        pixels = pixels.clip(0, 255).astype(np.uint8)
    return pixels
