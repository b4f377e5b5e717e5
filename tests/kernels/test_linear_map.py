"""Linear maps are the float64 sum rounded once, whatever stands beside a vector."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from elips_torch.core.hardware import device_facts
from elips_torch.core.native import native_reasons
from elips_torch.kernels import linear_map as module
from elips_torch.kernels.linear_map import linear_map
from elips_torch.kernels.search_native import library_compiles

in_cpp = pytest.mark.skipif(bool(native_reasons(device_facts("cpu"))), reason="there is no C++ code here")


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


@in_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("n_in", "n_out"), [(1, 1), (7, 3), (16, 16), (33, 5), (200, 131)])
def test_few_vectors_in_cpp_are_the_same_bits(n_in, n_out, dtype, monkeypatch):
    assert library_compiles()
    ran = []
    native = module.native_map
    monkeypatch.setattr(module, "native_map", lambda **kept: ran.append(1) or native(**kept))
    matrix, before, after = vectors(n_out, n_in, 1), vectors(1, n_in, 2)[0], vectors(1, n_out, 3)[0]
    for n in (1, 2, 5, 8):
        x = vectors(n, n_in).to(dtype)
        x[0, 0] = 0.0
        shifts = [(), (before,), (None, after), (before, after)]
        largest, least = (1e4, 1e-4) if dtype == torch.float16 else (1e30, 1e-30)
        for scale in (1.0, least, largest):
            few = [linear_map(x * scale, matrix, *shift) for shift in shifts]
            with monkeypatch.context() as patch:
                patch.setattr(module, "_FEW", 0)
                many = [linear_map(x * scale, matrix, *shift) for shift in shifts]
            assert all(map(torch.equal, few, many))
    assert len(ran) == 4 * 3 * 4


@in_cpp
def test_what_cpp_has_in_doubt_is_added_in_order(monkeypatch):
    assert library_compiles()
    generator = torch.Generator().manual_seed(0)
    # Sums that cancel to multiples of half the last bit: nearly all are in doubt.
    x = torch.randint(-9, 9, (8, 40), generator=generator) * 2.0**-20 + 2.0**-45
    matrix = torch.randint(-9, 9, (30, 40), generator=generator) + 2.0**-20
    x[3] = 0.0
    outcomes = []
    native = module.native_map
    monkeypatch.setattr(module, "native_map", lambda **kept: outcomes.append(native(**kept)) or outcomes[-1])
    for before, after in ((None, None), (x[1].clone(), matrix[:, 1].clone())):
        found = linear_map(x, matrix, before, after)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_FEW", 0)
            assert torch.equal(found, linear_map(x, matrix, before, after))
        assert not found[found == 0].signbit().any()
    assert module.OPEN in outcomes


@in_cpp
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_few_vectors_that_are_not_finite(value, monkeypatch):
    assert library_compiles()
    x, matrix = vectors(4, 12), vectors(6, 12, 1)
    x[2, 3] = value
    found = linear_map(x, matrix)
    monkeypatch.setattr(module, "_FEW", 0)
    wanted = linear_map(x, matrix)
    assert torch.equal(found.nan_to_num(1.5, 2.5, 3.5), wanted.nan_to_num(1.5, 2.5, 3.5))


@in_cpp
def test_layouts_of_few_vectors(monkeypatch):
    assert library_compiles()
    x, matrix, before = vectors(4, 12), vectors(6, 12, 1), vectors(1, 12, 2)[0]
    wanted = linear_map(x, matrix, before)
    assert torch.equal(linear_map(torch.stack([x, x], 2)[..., 0], matrix, before), wanted)
    assert torch.equal(linear_map(x, matrix.T.contiguous().T, before), wanted)
    assert torch.equal(linear_map(x, matrix.double(), before), wanted)
    assert torch.equal(linear_map(x, matrix, torch.stack([before, before], 1)[:, 0]), wanted)
    # Numbers that torch reads with the other sign.
    assert torch.equal(linear_map(x, torch._neg_view(matrix), before), linear_map(x, -matrix, before))
    assert torch.equal(linear_map(x, matrix, torch._neg_view(before)), linear_map(x, matrix, -before))
    assert torch.equal(linear_map(torch._neg_view(x), matrix, before), linear_map(-x, matrix, before))
    monkeypatch.setattr(module, "library_is_loaded", lambda: False)
    assert torch.equal(linear_map(x, matrix, before), wanted)


@in_cpp
def test_cpp_reads_nothing_that_does_not_fit():
    assert library_compiles()
    x, matrix = vectors(2, 4), vectors(3, 4, 1)
    for wrong in (vectors(2, 3), torch.empty(2, 4, device="meta")):
        with pytest.raises(RuntimeError):
            linear_map(wrong, matrix)
    one = torch.tensor([2.0])
    assert torch.equal(linear_map(x, matrix, one, one), linear_map(x, matrix, one.expand(4), one.expand(3)))


def test_zero_has_no_sign():
    found = linear_map(torch.tensor([[-0.0, 0.0]]), torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))
    assert not found.signbit().any()
