import sys

import pytest

from elips_torch.evaluation.plots import draw_times


def test_a_picture_is_written(tmp_path):
    path = tmp_path / "times.png"
    draw_times(path, ["one", "two"], {"a": [1.0, 20.0], "ours": [0.5, 40.0]}, [2.0, None], "times")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_install_line_is_given(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "elips-torch\[viz\]"'):
        draw_times(tmp_path / "times.png", ["one"], {"a": [1.0]}, [None], "times")
    assert not (tmp_path / "times.png").exists()
