import pytest
import torch

from elips_torch.kernels import select_triton
from elips_torch.kernels.select_triton import kth_largest_triton


def values_of(kind, shape):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator)
    if kind == "ties":
        return (values * 2).round()
    if kind == "all sizes":
        return values * torch.logspace(-44, 37, shape[1])
    if kind == "nearly equal":
        return (torch.full(shape, 1.0).view(torch.int32) + (values * 2).round().int()).view(torch.float32)
    if kind == "infinite":
        return torch.where(values > 1, torch.inf, torch.where(values < -1, -torch.inf, values))
    if kind == "zeros":
        return torch.where(values > 0, 0.0, -0.0)
    return values


KINDS = ["random", "ties", "all sizes", "nearly equal", "infinite", "zeros"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, 2048), (2, 2500)], ids=str)
def test_the_value_is_that_of_a_sort(shape, kind):
    values = values_of(kind, shape)
    ordered = values.sort(dim=1, descending=True).values
    for k in {1, (shape[1] + 2) // 3, shape[1]}:
        assert torch.equal(kth_largest_triton(values, k), ordered[:, k - 1])


def test_long_rows_are_divided(monkeypatch):
    counted = []
    kernel = select_triton.digit_counts_kernel

    class Spy:
        def __getitem__(self, grid):
            counted.append(grid)
            return kernel[grid]

    monkeypatch.setattr(select_triton, "digit_counts_kernel", Spy())
    values = values_of("random", (2, 20000))
    assert torch.equal(kth_largest_triton(values, 100), values.sort(dim=1).values[:, -100])
    assert set(counted) == {(2, 2)}


def test_rows_may_have_a_stride():
    values = values_of("random", (4, 300))[:, :200]
    assert torch.equal(kth_largest_triton(values, 7), values.sort(dim=1).values[:, -7])


def test_what_the_kernel_does_not_take_is_refused():
    with pytest.raises(ValueError, match="k is 4"):
        kth_largest_triton(torch.zeros(2, 3), 4)
    with pytest.raises(ValueError, match="contiguous"):
        kth_largest_triton(torch.zeros(3, 2).T, 1)
    assert kth_largest_triton(torch.zeros(0, 3), 1).shape == (0,)
