"""Linear maps are the float64 sum rounded once, whatever stands beside a vector."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from elips_torch.kernels.linear_map import linear_map


def vectors(n, dim, seed=0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("n", "n_in", "n_out"), [(0, 3, 2), (1, 1, 1), (17, 33, 5), (3000, 5, 130)])
def test_values(n, n_in, n_out, dtype):
    x, matrix = vectors(n, n_in).to(dtype), vectors(n_out, n_in, 1)
    before, after = vectors(1, n_in, 2)[0], vectors(1, n_out, 3)[0]
    wanted = (x.double() - before.double()) @ matrix.double().T + after.double()
    found = linear_map(x, matrix, before, after)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        linear_map(x, matrix).double(), x.double() @ matrix.double().T, rtol=1e-6, atol=1e-6
    )


def test_a_result_depends_on_its_vector_alone():
    x, matrix = vectors(200, 96), vectors(96, 96, 1)
    whole = linear_map(x, matrix)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            for size in (1, 3, 64):
                assert torch.equal(torch.cat([linear_map(part, matrix) for part in x.split(size)]), whole)
    finally:
        torch.set_num_threads(threads)


def test_sums_that_cancel_are_added_in_order():
    # The true sum lies next to the middle between two float32 numbers, closer than products err.
    one, tie = 1.0, 2.0**-24
    rows = torch.tensor([[one, tie, 2.0**-60, 0.0], [one, tie, -(2.0**-60), 0.0], [one, tie, 0.0, 0.0]])
    found = linear_map(rows, torch.ones(1, 4))[:, 0].numpy()
    for value, row in zip(found, rows.tolist(), strict=True):
        exact = sum(map(Fraction, row))
        below = Fraction(float(np.nextafter(value, np.float32(-1)))), Fraction(float(value))
        assert abs(exact - below[1]) <= Fraction(2.0**-24) + Fraction(2.0**-50)


def test_zero_has_no_sign():
    found = linear_map(torch.tensor([[-0.0, 0.0]]), torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))
    assert not found.signbit().any()
