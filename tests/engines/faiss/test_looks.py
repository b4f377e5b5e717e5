import pytest
import torch

from elips_torch.engines.faiss.builds import load_installed
from elips_torch.engines.faiss.looks import are_finite, are_labels

# Around the widths of vector registers.
SIZES = (1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 1000)


@pytest.fixture(scope="module")
def build():
    return load_installed()


@pytest.mark.parametrize("size", SIZES)
def test_finite_values_of_any_size_pass_and_others_do_not(build, size):
    values = torch.randn(size, generator=torch.Generator().manual_seed(size)) * 1e30
    values[0] = torch.finfo(torch.float32).max
    values[-1] = torch.finfo(torch.float32).smallest_normal / 8
    assert are_finite(build, values)
    assert are_finite(build, values[None, : size // 2])
    for place in {0, size // 2, size - 1}:
        for bad in (torch.nan, -torch.nan, torch.inf, -torch.inf):
            assert not are_finite(build, values.index_fill(0, torch.tensor([place]), bad))


@pytest.mark.parametrize("size", SIZES)
def test_labels_pass_and_minus_one_does_not(build, size):
    labels = torch.randint(0, 2**31 - 2**24, (size,), generator=torch.Generator().manual_seed(size))
    labels[0] = 0
    assert are_labels(build, labels)
    for place in {0, size // 2, size - 1}:
        assert not are_labels(build, labels.index_fill(0, torch.tensor([place]), -1))
    # Any number of the others may be taken for it, but never the other way round.
    assert not are_labels(build, torch.full((size, 2), -1))
