"""Operations run without gradients and autocast, and leave both as they were."""

import itertools

import pytest
import torch

from elips_torch.core.execution import plain_arithmetic


def state():
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(("grad", "autocast"), list(itertools.product([True, False], repeat=2)))
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("meddles", [False, True])
def test_what_was_on_is_on_again(grad, autocast, fails, meddles):
    with torch.set_grad_enabled(grad), torch.autocast("cpu", enabled=autocast):
        outer = state()
        try:
            with plain_arithmetic(torch.device("cpu")):
                assert state() == (False, False)
                with plain_arithmetic(torch.device("cpu")):
                    assert state() == (False, False)
                assert state() == (False, False)
                if meddles:
                    torch.set_grad_enabled(True)
                    torch.set_autocast_enabled("cpu", True)
                if fails:
                    raise RuntimeError("a search failed")
        except RuntimeError:
            assert fails
        assert state() == outer == (grad, autocast)
