import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    INTERPRETED = False
else:
    import triton

    INTERPRETED = bool(triton.knobs.runtime.interpret)
if not INTERPRETED:
    # They run in processes of their own, started by test_triton_interpreter.py.
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _memory_starts_as_nan():
    """A cell that no kernel writes is then NaN, or the largest integer."""
    import torch

    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
