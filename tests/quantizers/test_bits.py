"""Bits in bytes and out of them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from elips_torch import ArgumentError, DtypeError, ShapeError, pack_bits, unpack_bits

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SHAPES = st.one_of(st.tuples(st.integers(0, 9), st.integers(0, 9)), st.tuples(st.integers(0, 9)))


@settings(deadline=None)
@given(codes=arrays.arrays(np.uint8, SHAPES), dtype=st.sampled_from(DTYPES))
def test_bits_come_as_numpy_unpacks_them_and_go_back(codes, dtype):
    vectors = unpack_bits(torch.from_numpy(codes), dtype)
    assert vectors.dtype == dtype
    wanted = np.unpackbits(codes, axis=-1, bitorder="little")
    assert vectors.shape == wanted.shape
    assert np.array_equal(vectors.double().numpy(), wanted)
    for same in (vectors, vectors.bool(), vectors.to(torch.uint8), vectors.t().contiguous().t()):
        back = pack_bits(same)
        assert back.dtype == torch.uint8
        assert np.array_equal(back.numpy(), codes)


def test_slices_are_read_where_they_lie():
    codes = torch.arange(60, dtype=torch.uint8).view(6, 10)
    assert torch.equal(pack_bits(unpack_bits(codes[::2, 1::3])), codes[::2, 1::3])
    assert torch.equal(pack_bits(unpack_bits(codes)[::2, 8:24]), codes[::2, 1:3])


def test_what_is_no_bits_is_refused():
    for codes in (torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.int8)):
        with pytest.raises(DtypeError, match=r"codes is a tensor of torch.* expected a uint8 tensor"):
            unpack_bits(codes)
    with pytest.raises(DtypeError, match=r"codes is a ndarray .torch.from_numpy makes a tensor"):
        unpack_bits(np.zeros((2, 2), np.uint8))
    with pytest.raises(ShapeError, match=r"codes has shape \(1, 2, 3\)"):
        unpack_bits(torch.zeros(1, 2, 3, dtype=torch.uint8))
    with pytest.raises(DtypeError, match=r"dtype is torch.int64, expected torch.float32"):
        unpack_bits(torch.zeros(2, 2, dtype=torch.uint8), torch.int64)
    with pytest.raises(DtypeError, match=r"vectors is a tensor of torch.int64"):
        pack_bits(torch.zeros(2, 8, dtype=torch.int64))
    with pytest.raises(ShapeError, match="dim 12, expected a multiple of 8"):
        pack_bits(torch.zeros(2, 12))
    with pytest.raises(ShapeError, match=r"shape \(\)"):
        pack_bits(torch.tensor(1.0))


@pytest.mark.parametrize("value", [0.5, -1.0, 2.0, float("nan"), float("inf")])
def test_other_values_are_refused_by_row(value):
    vectors = torch.zeros(5, 16)
    vectors[1, 3] = vectors[4, 15] = value
    with pytest.raises(ArgumentError, match="vectors has values other than 0 and 1 in rows 1, 4"):
        pack_bits(vectors)
    with pytest.raises(ArgumentError, match="other than 0 and 1"):
        pack_bits(vectors[4])
