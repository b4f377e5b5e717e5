"""ScalarQuantizer against faiss, and its promises."""

import copy
import io

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elips_torch import ArgumentError, DtypeError, NonFiniteError, NotFittedError, ShapeError
from elips_torch.quantizers.scalar import QTYPES, ScalarQuantizer

FAISS = {
    "int8": faiss.ScalarQuantizer.QT_8bit,
    "int6": faiss.ScalarQuantizer.QT_6bit,
    "int4": faiss.ScalarQuantizer.QT_4bit,
    "fp16": faiss.ScalarQuantizer.QT_fp16,
    "bf16": faiss.ScalarQuantizer.QT_bf16,
}


def vectors(n, dim, seed=0):
    scale = torch.rand(dim, generator=torch.Generator().manual_seed(seed + 1)) * 20
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)) * scale + 3


@pytest.mark.parametrize("qtype", QTYPES)
@pytest.mark.parametrize("dim", [1, 7, 16, 33])
def test_codes_and_values_are_those_of_faiss(qtype, dim):
    train, fresh = vectors(300, dim), vectors(200, dim, seed=5) * 1.3
    theirs = faiss.ScalarQuantizer(dim, FAISS[qtype])
    theirs.train(train.numpy())
    ours = ScalarQuantizer(dim, qtype).fit(train)
    assert ours.code_size == theirs.code_size
    expected = torch.from_numpy(theirs.compute_codes(fresh.numpy()))
    codes = ours.encode(fresh)
    if qtype.startswith("int"):
        assert torch.equal(codes, expected)
    else:
        # Faiss rounds some halves up.
        ours_bits, their_bits = codes.view(torch.int16), expected.view(torch.int16)
        assert ((ours_bits - their_bits).abs() <= 1).all()
        assert (ours_bits != their_bits).float().mean() < 0.01
    decoded = torch.from_numpy(theirs.decode(expected.numpy()))
    torch.testing.assert_close(ours.decode(expected), decoded, rtol=1e-6, atol=1e-5)
    if ours.is_trained and qtype.startswith("int"):
        trained = faiss.vector_to_array(theirs.trained)
        np.testing.assert_array_equal(trained, torch.cat([ours.minimum, ours.extent]).numpy())


@given(
    qtype=st.sampled_from(["int8", "int6", "int4"]),
    dim=st.integers(1, 9),
    seed=st.integers(0, 999),
    scale=st.sampled_from([1e-20, 1.0, 1e20]),
)
def test_the_error_is_at_most_half_a_step_inside_the_range(qtype, dim, seed, scale):
    examples = torch.randn(20, dim, generator=torch.Generator().manual_seed(seed)) * scale
    quantizer = ScalarQuantizer(dim, qtype).fit(examples)
    step = quantizer.extent / (2**quantizer.bits - 1)
    slack = 4e-7 * (quantizer.minimum.abs() + quantizer.extent)
    decoded = quantizer(examples)
    assert ((decoded - examples).abs() <= 0.5 * step + slack).all()
    # Coding what is decoded changes nothing.
    assert torch.equal(quantizer.encode(decoded), quantizer.encode(examples))


def test_constant_features_decode_to_their_value():
    examples = torch.tensor([[1.5, 0.0, -7.0], [1.5, 0.0, -7.0]])
    for qtype in QTYPES:
        assert torch.equal(ScalarQuantizer(3, qtype).fit(examples)(examples), examples)


@pytest.mark.parametrize("qtype", ["int8", "int6", "int4"])
def test_what_lies_outside_the_range_is_its_nearer_end(qtype):
    quantizer = ScalarQuantizer(1, qtype).fit(torch.tensor([[0.0], [1.0]]))
    low, high = quantizer.encode(torch.tensor([[-5.0], [9.0]])).flatten().tolist()
    assert (low, high) == (0, 2**quantizer.bits - 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_code_like_their_float32_values(dtype):
    examples = vectors(40, 5).to(dtype)
    for qtype in QTYPES:
        quantizer = ScalarQuantizer(5, qtype).fit(examples)
        assert torch.equal(quantizer.encode(examples), quantizer.encode(examples.float()))


def test_codes_do_not_depend_on_the_batch(monkeypatch):
    examples = vectors(50, 6)
    quantizer = ScalarQuantizer(6, "int6").fit(examples)
    whole = quantizer.encode(examples)
    monkeypatch.setattr("elips_torch.quantizers.scalar._FEATURES_AT_ONCE", 18)
    assert torch.equal(quantizer.encode(examples), whole)
    assert torch.equal(torch.cat([quantizer.encode(part) for part in examples.split(7)]), whole)
    assert torch.equal(quantizer.decode(whole)[13:15], quantizer.decode(whole[13:15]))


def test_bad_input_is_refused():
    quantizer = ScalarQuantizer(3)
    with pytest.raises(NotFittedError, match="encode was called before fit"):
        quantizer.encode(torch.rand(2, 3))
    with pytest.raises(NotFittedError, match="decode was called before fit"):
        quantizer.decode(torch.zeros(2, 3, dtype=torch.uint8))
    poor = torch.rand(4, 3)
    poor[2, 1] = torch.nan
    for verb in ("fit", "encode"):
        with pytest.raises(NonFiniteError if verb == "fit" else NotFittedError):
            getattr(quantizer, verb)(poor)
    assert not quantizer.is_trained
    quantizer.fit(torch.rand(4, 3))
    with pytest.raises(NonFiniteError, match="row 2"):
        quantizer.encode(poor)
    with pytest.raises(ShapeError, match="vectors has dim 4, the quantizer has dim 3"):
        quantizer.encode(torch.rand(2, 4))
    with pytest.raises(ShapeError, match=r"codes has shape \(2, 4\), expected \(N, 3\)"):
        quantizer.decode(torch.zeros(2, 4, dtype=torch.uint8))
    with pytest.raises(DtypeError, match=r"codes is torch\.int64"):
        quantizer.decode(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ArgumentError, match="0 rows"):
        quantizer.fit(torch.rand(0, 3))
    with pytest.raises(NonFiniteError, match="rows 0, 1"):
        quantizer.fit(torch.full((2, 3), 1e200, dtype=torch.float64))
    with pytest.raises(NonFiniteError, match="feature 1"):
        quantizer.fit(torch.tensor([[0.0, -3e38, 0.0], [0.0, 3e38, 0.0]]))
    with pytest.raises(NonFiniteError, match="too large for qtype 'fp16' in row 1"):
        ScalarQuantizer(3, "fp16").encode(torch.tensor([[1.0, 1.0, 1.0], [1.0, 7e4, 1.0]]))
    with pytest.raises(ArgumentError, match="'int5', expected one of 'int8'"):
        ScalarQuantizer(3, "int5")
    with pytest.raises(ArgumentError, match="dim is 0"):
        ScalarQuantizer(0)
    with pytest.raises(DtypeError, match=r"dim is 2\.0"):
        ScalarQuantizer(2.0)


def test_unchecked_nan_has_a_code_that_can_be_decoded():
    quantizer = ScalarQuantizer(2).fit(torch.rand(4, 2))
    codes = quantizer.encode(torch.tensor([[torch.nan, torch.inf]]), check_finite=False)
    assert codes.tolist() == [[0, 255]]


def test_the_state_restores_any_quantizer_of_the_same_settings():
    examples = vectors(30, 4)
    fitted, fresh = ScalarQuantizer(4, "int4").fit(examples), ScalarQuantizer(4, "int4")
    file = io.BytesIO()
    torch.save(fitted.state_dict(), file)
    for assign in (False, True):
        file.seek(0)
        fresh.load_state_dict(torch.load(file, weights_only=True), assign=assign)
        assert torch.equal(fresh.encode(examples), fitted.encode(examples))
    clone = copy.deepcopy(fitted)
    clone.load_state_dict(ScalarQuantizer(4, "int4").state_dict())
    assert not clone.is_trained
    assert fitted.is_trained
    with pytest.raises(RuntimeError, match=r"minimum: got shape \(4,\), expected \(5\)"):
        ScalarQuantizer(5, "int4").load_state_dict(fitted.state_dict())


def test_casting_the_module_changes_no_code():
    examples = vectors(30, 4)
    quantizer = ScalarQuantizer(4).fit(examples)
    codes = quantizer.encode(examples)
    for change in ("half", "bfloat16", "double", "float"):
        getattr(quantizer, change)()
        assert quantizer.minimum.dtype == torch.float32
        assert torch.equal(quantizer.encode(examples), codes)


def test_fitting_in_inference_mode_leaves_ordinary_tensors():
    with torch.inference_mode():
        quantizer = ScalarQuantizer(4).fit(vectors(30, 4))
    assert not any(buffer.is_inference() for buffer in quantizer.buffers())
