"""Sums by label."""

import pytest
import torch

from elips_torch.kernels.segment_sums import label_order, segment_sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "k", "dim"), [(1, 1, 1), (1000, 3, 5), (600, 700, 4), (5000, 2, 16)])
def test_sums_are_those_of_numpy(n, k, dim, dtype):
    generator = torch.Generator().manual_seed(n)
    vectors = torch.randn(n, dim, generator=generator, dtype=dtype)
    labels = torch.randint(0, k, (n,), generator=generator)
    order, starts, counts = label_order(labels, k)
    assert torch.equal(counts, torch.bincount(labels, minlength=k))
    sums = segment_sums(vectors, order, starts, counts)
    wanted = torch.zeros(k, dim, dtype=torch.float64).index_add_(0, labels, vectors.double())
    assert sums.dtype == dtype
    torch.testing.assert_close(sums.double(), wanted, rtol=1e-5, atol=1e-4)


def test_sums_do_not_depend_on_the_number_of_threads():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(20000, 7, generator=generator)
    labels = torch.randint(0, 5, (20000,), generator=generator).clamp_min(1)
    threads = torch.get_num_threads()
    sums = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            sums.append(segment_sums(vectors, *label_order(labels, 5)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])
    assert not sums[0][0].any()
