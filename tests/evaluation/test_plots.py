import sys

import pytest

from elips_torch.evaluation.plots import draw_recall, draw_times


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
