import pytest

from elips_torch.cli import timing


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    monkeypatch.setattr(timing, "_PAUSE", 0.0)
