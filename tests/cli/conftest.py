import inspect

import pytest

from elips_torch.cli import contenders, timing


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    monkeypatch.setattr(timing, "_PAUSE", 0.0)


@pytest.fixture(autouse=True)
def _index_without_screen(monkeypatch):
    # An index that takes no screen is measured all the same.
    flat = contenders.FlatIndex
    if "screen" not in inspect.signature(flat).parameters:
        monkeypatch.setattr(
            contenders, "FlatIndex", lambda dim, metric, screen, **rest: flat(dim, metric, **rest)
        )
