"""Assignment in C++ names the row that the definition names, for any data and any instruction set."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from screened_cases import METRICS, NAMES, WORKSPACE, clustered, make, misleading

from elips_torch.core.hardware import DeviceFacts, device_facts
from elips_torch.core.metric import resolve_metric
from elips_torch.core.native import native_reasons
from elips_torch.kernels import assign_native, search_native
from elips_torch.kernels.assign_native import VectorCodes, assigns_natively, native_nearest_rows
from elips_torch.kernels.nearest_row import nearest_rows
from elips_torch.ops.assign import assign, vector_codes

pytestmark = pytest.mark.skipif(
    bool(native_reasons(device_facts("cpu"))), reason="; ".join(native_reasons(device_facts("cpu")))
)
FACTS = {
    "VNNI": DeviceFacts("cpu", "2 cores", "AVX512", vnni=True),
    "AVX512": DeviceFacts("cpu", "2 cores", "AVX512"),
    "AVX2": DeviceFacts("cpu", "2 cores", "AVX2"),
}
# Instruction sets that this machine can run; the first has codes of 8 bits.
WAYS = ["AVX2"]
if device_facts("cpu").capability == "AVX512":
    WAYS.insert(0, "AVX512")
if device_facts("cpu").vnni:
    WAYS.insert(0, "VNNI")
FEW = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(params=WAYS, autouse=True)
def _instructions(request, monkeypatch):
    monkeypatch.setattr(assign_native, "_INT8_FEATURES", 1)
    for module in (assign_native, search_native):
        monkeypatch.setattr(module, "device_facts", lambda device: FACTS[request.param])


def expected(vectors, rows, metric):
    kind = resolve_metric(metric)
    scores = kind.rounded_score(vectors.double()[:, None], rows.double()[None].contiguous())
    return scores.argsort(dim=1, descending=kind.higher_is_better, stable=True)[:, 0]


def assert_right(vectors, rows, metric, codes=None):
    """Compare with the definition, and with the products that decide where C++ does not."""
    wanted = expected(vectors, rows, metric)
    found = native_nearest_rows(vectors, rows, resolve_metric(metric), codes)
    decided = found >= 0
    assert torch.equal(found[decided], wanted[decided])
    assert torch.equal(assign(vectors, rows, metric, WORKSPACE, codes), wanted)
    assert torch.equal(nearest_rows(vectors, rows, resolve_metric(metric), WORKSPACE), wanted)
    return found


@pytest.mark.parametrize("name", NAMES)
@FEW
@given(data=st.data())
def test_answers_are_those_of_the_reference(name, data):
    metric = data.draw(st.sampled_from(METRICS))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    dim, k = data.draw(st.sampled_from([1, 2, 3, 16, 33, 70])), data.draw(st.integers(1, 100))
    n = data.draw(st.integers(1, 150))
    vectors, rows = torch.randn(n, dim, generator=generator), torch.randn(k, dim, generator=generator)
    vectors, rows = make(name, vectors, rows, generator)
    assert_right(vectors, rows, metric)
    # Vectors that are centroids, or lie between two of them.
    assert_right(torch.cat([rows, (rows + rows.roll(1, 0)) / 2]), rows, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("n", "k", "dim"), [(1, 1, 1), (63, 7, 5), (64, 6, 64), (65, 1000, 3), (300, 971, 130)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_shape_and_type(metric, n, k, dim, dtype):
    generator = torch.Generator().manual_seed(n + k)
    vectors = torch.randn(n, dim, generator=generator).to(dtype)
    rows = torch.randn(k, dim, generator=generator).to(dtype)
    assert_right(vectors, rows, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e-9, 1e9, 1e17, 1e18])
def test_values_of_any_size(metric, scale):
    generator = torch.Generator().manual_seed(1)
    rows, vectors = torch.randn(2, 90, 5, generator=generator)
    assert_right(vectors * scale, rows * scale, metric)
    assert_right(vectors, rows * scale, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("threads", [1, 3])
def test_codes_serve_several_calls(metric, threads, monkeypatch):
    monkeypatch.setattr(assign_native, "native_threads", lambda: threads)
    monkeypatch.setattr(assign_native, "_WORTH_THREADS", 0)
    generator = torch.Generator().manual_seed(2)
    rows, vectors = clustered(2000, 50, 40, generator)
    codes = vector_codes(vectors, rows)
    for _ in range(3):
        assert_right(vectors, rows, metric, codes)
        assert codes.is_filled
        rows = torch.randn(40, 50, generator=generator)


def test_most_vectors_are_decided():
    generator = torch.Generator().manual_seed(3)
    rows, vectors = clustered(2000, 64, 50, generator)
    vectors[7] = 1e20
    for metric in METRICS:
        found = native_nearest_rows(vectors, rows, resolve_metric(metric))
        assert (found < 0).nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("metric", METRICS)
def test_codes_that_mislead(metric):
    vectors, rows = misleading(metric)
    assert_right(vectors, rows[:700], metric)


def test_what_is_not_bounded_is_left_to_others():
    rows = torch.ones(3, 4)
    rows[1, 2] = 1e25
    vectors = torch.ones(70, 4)
    assert (native_nearest_rows(vectors, rows, resolve_metric("l2")) == -1).all()
    assert_right(vectors, rows, "l2")
    # As many equal rows as no vector keeps.
    same = torch.ones(500, 4)
    assert (native_nearest_rows(vectors, same, resolve_metric("l2")) == -1).all()
    assert_right(vectors, same, "l2")


def test_memory_stays_within_the_workspace():
    vectors, rows = torch.ones(1000, 64), torch.ones(20, 64)
    assert assigns_natively(vectors, rows, 2**28)
    assert not assigns_natively(vectors, rows, 2**17)
    assert not assigns_natively(vectors, torch.empty(0, 64), 2**28)
    assert not assigns_natively(vectors.double(), rows, 2**28)
    assert isinstance(vector_codes(vectors, rows), VectorCodes)
    assert vector_codes(torch.ones(10**6, 64), rows, 2**24) is None
