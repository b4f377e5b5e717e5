import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    INTERPRETED, WHY = False, "Triton is not installed"
else:
    import triton

    INTERPRETED = bool(triton.knobs.runtime.interpret)
    WHY = "runs in Triton's interpreter, in a process of its own: see test_triton_interpreter.py"
if not INTERPRETED:
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
