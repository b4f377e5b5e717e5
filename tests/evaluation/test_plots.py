import sys

import numpy as np
import pytest
import torch

from elips_torch import FlatIndex, IVFFlatIndex, RefineIndex
from elips_torch.core.errors import ArgumentError, DtypeError, ElipsError, ShapeError
from elips_torch.evaluation import (
    TuningCurve,
    TuningPoint,
    plot_list_sizes,
    plot_neighbours,
    plot_recall_curve,
    tune,
)
from elips_torch.evaluation.plots import draw_recall, draw_times


def written(figure):
    """Draw a figure, which is when matplotlib looks at what it holds, and return its pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def filled_lists(n=1000, nlist=20):
    vectors = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    index = IVFFlatIndex(4, nlist=nlist).fit(vectors)
    index.add(vectors)
    return index, vectors


def curve_of(*points, target=0.9, k=10):
    made = tuple(TuningPoint(*point) for point in points)
    best = next((point for point in made if point.recall >= target), None)
    return TuningCurve(made, target, k, 100, best)


CURVE = curve_of(({"nprobe": 1}, 0.5, 900.0), ({"nprobe": 2}, 0.7, 600.0), ({"nprobe": 4}, 0.95, 100.0))


def test_a_picture_is_written(tmp_path):
    path = tmp_path / "times.png"
    draw_times(path, ["one", "two"], {"a": [1.0, 20.0], "ours": [0.5, 40.0]}, [2.0, None], "times")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("n_panels", [1, 4])
def test_a_picture_of_recall_is_written(tmp_path, n_panels):
    path = tmp_path / "recall.png"
    curves = {"ours": [(0.5, 900.0), (0.9, 100.0)], "theirs": [(0.4, 800.0)]}
    draw_recall(path, {f"panel {i}": curves for i in range(n_panels)}, "curves")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_install_line_is_given(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "elips-torch\[viz\]"'):
        draw_times(tmp_path / "times.png", ["one"], {"a": [1.0]}, [None], "times")
    assert not (tmp_path / "times.png").exists()


def test_the_curve_of_tuning_is_drawn():
    index, vectors = filled_lists()
    curve = tune(index, vectors[:50], 0.9)
    axes = plot_recall_curve(curve, title="lists").axes[0]
    line, star = axes.lines[:2]
    assert star.get_marker() == "*"
    assert star.get_xdata() == [curve.best.recall]
    assert star.get_ydata() == [curve.best.queries_per_second]
    drawn = set(zip(line.get_xdata(), line.get_ydata(), strict=True))
    assert drawn <= {(point.recall, point.queries_per_second) for point in curve.points}
    assert list(axes.lines[2].get_xdata()) == [0.9, 0.9]
    assert len(axes.collections[0].get_offsets()) == len(curve.points)
    assert (axes.get_xlabel(), axes.get_title(), axes.get_yscale()) == ("recall@10", "lists", "log")
    assert written(axes.figure).std() > 0


def test_a_line_joins_only_what_nothing_beats():
    curve = curve_of(
        ({"nprobe": 1, "k_factor": 1}, 0.5, 900.0),
        ({"nprobe": 1, "k_factor": 2}, 0.6, 800.0),
        ({"nprobe": 8, "k_factor": 1}, 0.55, 300.0),
        ({"nprobe": 8, "k_factor": 2}, 0.6, 200.0),
    )
    axes = plot_recall_curve(curve).axes[0]
    assert list(axes.lines[0].get_xdata()) == [0.5, 0.6]
    assert [text.get_text() for text in axes.texts] == ["1, 1", "1, 2"]
    assert "nprobe, k_factor" in axes.get_title()
    # No best, no star: the second line is the target.
    assert len(axes.lines) == 2


def test_several_curves_share_a_picture():
    other = curve_of(({}, 1.0, 50.0), target=0.99, k=5)
    axes = plot_recall_curve({"lists": CURVE, "flat": other}).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["lists", "flat"]
    assert axes.get_xlabel() == "recall@5 and recall@10"
    written(axes.figure)
    with pytest.raises(ArgumentError, match="curves is empty"):
        plot_recall_curve({})


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


def texts(figure):
    return [axes.texts[0].get_text() if axes.texts else "" for axes in figure.axes]


def colours(figure):
    return [axes.spines["left"].get_edgecolor() for axes in figure.axes if axes.axison]


@pytest.mark.parametrize(
    "documents",
    [["a", "b", "c"], {0: "a", 1: "b", 2: "c"}, "abc".__getitem__],
    ids=["sequence", "mapping", "function"],
)
def test_texts_of_neighbours_are_shown(documents):
    ids = torch.tensor([[2, 0], [1, -1]])
    figure = plot_neighbours(["x", "y"], ids, documents, scores=torch.tensor([[0.5, 0.25], [1.0, -np.inf]]))
    assert texts(figure) == ["x", "c", "a", "y", "b", ""]
    assert titles(figure) == ["query 0", "2\n0.5", "0\n0.25", "query 1", "1\n1", ""]
    assert not figure.axes[5].axison
    written(figure)


def test_what_has_no_payload_is_shown_by_its_id():
    assert texts(plot_neighbours(["x"], torch.tensor([[7, 8]]))) == ["x", "7", "8"]
    assert texts(plot_neighbours(["x"], torch.tensor([[7, 8]]), {8: "b"})) == ["x", "7", "b"]


@pytest.mark.parametrize("form", ["padded", "list"])
def test_hits_are_green_and_others_red(form):
    relevant = torch.tensor([[5, 1], [-1, -1]])
    if form == "list":
        relevant = [row[row >= 0] for row in relevant]
    _, hit, miss, _, other, _ = colours(
        plot_neighbours(["x", "y"], torch.tensor([[1, 2], [5, 1]]), relevant=relevant)
    )
    assert hit != miss == other


@pytest.mark.parametrize(
    "picture",
    [
        torch.rand(6, 5),
        torch.rand(1, 6, 5),
        torch.rand(3, 6, 5, dtype=torch.float64),
        torch.rand(3, 6, 5).half(),
        torch.rand(3, 6, 5, requires_grad=True),
        torch.randint(0, 256, (6, 5, 3), dtype=torch.uint8),
        torch.randint(0, 256, (6, 5)),
        torch.rand(6, 5) > 0.5,
        np.random.default_rng(0).random((6, 5, 4)),
    ],
    ids=lambda picture: f"{picture.dtype} {tuple(picture.shape)}",
)
def test_pictures_of_neighbours_are_shown(picture):
    figure = plot_neighbours([picture], torch.tensor([[0]]), [picture])
    for axes in figure.axes:
        assert axes.images[0].get_array().shape[:2] == (6, 5)
    assert len(np.unique(written(figure))) > 4


def test_a_picture_shows_its_pixels():
    half = plot_neighbours([torch.tensor([[0.0, 0.5], [1.0, 2.0]])], torch.tensor([[0]])).axes[0].images[0]
    assert half.get_array().tolist() == [[0.0, 0.5], [1.0, 1.0]]
    assert half.get_clim() == (0, 1)
    channels = torch.arange(12, dtype=torch.uint8).view(3, 2, 2)
    whole = plot_neighbours([channels], torch.tensor([[0]])).axes[0].images[0]
    assert whole.get_array().tolist() == channels.permute(1, 2, 0).tolist()


def test_text_that_looks_like_a_formula_and_long_text_are_shown_as_they_are():
    long = "word " * 100
    figure = plot_neighbours(["costs $5 or $_"], torch.tensor([[0]]), [long])
    written(figure)
    assert texts(figure)[0].replace("\n", " ") == "costs $5 or $_"
    assert len(texts(figure)[1]) <= 130


IDS = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((["x"], IDS), {}, ShapeError, "queries has 1 payloads, ids has 2 rows"),
        ((["x", "y"], IDS[0]), {}, ShapeError, r"ids has shape \(3,\), expected \(Q, K\)"),
        ((["x", "y"], IDS.float()), {}, DtypeError, "ids has dtype"),
        (([], IDS[:0]), {}, ArgumentError, "at least one query"),
        ((["x", "y"], IDS, 5), {}, DtypeError, "documents is a int"),
        ((["x", "y"], IDS), {"scores": torch.zeros(2, 2)}, ShapeError, "scores has shape"),
        ((["x", "y"], IDS), {"relevant": IDS[:1]}, ShapeError, "relevant is for 1 queries"),
    ],
)
def test_neighbours_that_do_not_fit_are_refused(arguments, options, error, words):
    with pytest.raises(error, match=words) as caught:
        plot_neighbours(*arguments, **options)
    assert isinstance(caught.value, ElipsError)


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_sizes_of_lists_are_drawn_the_longest_first(wrapped):
    lists, vectors = filled_lists()
    index = lists
    if wrapped:
        index = RefineIndex(IVFFlatIndex(4, nlist=20)).fit(vectors)
        index.add(vectors)
        lists = index.index
    axes = plot_list_sizes(index).axes[0]
    drawn = axes.patches[0].get_data().values
    assert drawn.tolist() == sorted(lists.list_sizes().tolist(), reverse=True)
    assert axes.lines[0].get_ydata()[0] == 50.0
    assert axes.get_title() == f"20 lists, imbalance {lists.imbalance_factor():.2f}"
    assert written(axes.figure).std() > 0


def test_an_index_without_lists_or_vectors_is_refused():
    with pytest.raises(ArgumentError, match="index is a FlatIndex, which has no inverted lists"):
        plot_list_sizes(FlatIndex(4))
    with pytest.raises(ArgumentError, match="the index is empty"):
        plot_list_sizes(IVFFlatIndex(4, nlist=20))


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plot_recall_curve(CURVE),
        lambda: plot_neighbours(["x"], torch.tensor([[0]])),
        lambda: plot_list_sizes(filled_lists()[0]),
    ],
    ids=["curve", "neighbours", "lists"],
)
def test_figures_without_matplotlib_give_the_install_line(draw, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "elips-torch\[viz\]"'):
        draw()
