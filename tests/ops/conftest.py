import pytest


@pytest.fixture(autouse=True)
def _small_problems_take_every_step(monkeypatch):
    # Small data shows what selecting, bounding and certifying do; by default it would skip them.
    monkeypatch.setattr("elips_torch.kernels.exact_tile._FEW_FEATURES", 0)
