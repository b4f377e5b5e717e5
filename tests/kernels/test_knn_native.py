"""Screened search in C++: the reference's answers for any data and any instruction set."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from screened_cases import (
    METRICS,
    NAMES,
    WORKSPACE,
    assert_reference,
    clustered,
    drawn_case,
    hard,
    misleading,
)

from elips_torch import FlatIndex
from elips_torch.core import compilation
from elips_torch.core.hardware import DeviceFacts, device_facts
from elips_torch.core.metric import resolve_metric
from elips_torch.core.native import native_reasons
from elips_torch.kernels import knn_native, search_native
from elips_torch.kernels.knn_exact import knn_exact
from elips_torch.kernels.knn_native import NativeSearch, native_first
from elips_torch.kernels.plane import LARGEST_NORM, encode, make_plane, plain_plane
from elips_torch.kernels.screen import CodedQueries, code_queries, norm_square_slack, rounded_units
from elips_torch.kernels.selection import Selection

pytestmark = pytest.mark.skipif(
    bool(native_reasons(device_facts("cpu"))), reason="; ".join(native_reasons(device_facts("cpu")))
)
FACTS = {
    "VNNI": DeviceFacts("cpu", "2 cores", "AVX512", vnni=True),
    "AVX512": DeviceFacts("cpu", "2 cores", "AVX512"),
    "AVX2": DeviceFacts("cpu", "2 cores", "AVX2"),
}
# Instruction sets that this machine can run, and the planes that they serve.
WAYS = [("AVX2", "fp32")]
if device_facts("cpu").capability == "AVX512":
    WAYS.append(("AVX512", "fp32"))
if device_facts("cpu").vnni:
    WAYS.append(("VNNI", "int8"))
FEW = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(autouse=True)
def _small_problems_take_every_step(monkeypatch):
    monkeypatch.setattr("elips_torch.kernels.exact_tile._FEW_FEATURES", 0)


@pytest.fixture(params=WAYS, ids="-".join)
def kind(request, monkeypatch):
    """Run the code for some instructions; the plane that it serves."""
    instructions, kind = request.param
    for module in (knn_native, search_native):
        monkeypatch.setattr(module, "device_facts", lambda device: FACTS[instructions])
    return kind


@pytest.fixture
def certified(monkeypatch):
    """List, per run of the search, how many queries it certified."""
    seen = []
    run = NativeSearch.run

    def spy(self, *args):
        result = run(self, *args)
        seen.append(int(result[2].sum()))
        return result

    monkeypatch.setattr(NativeSearch, "run", spy)
    return seen


def plane_of(metric, x, kind):
    metric = resolve_metric(metric)
    return plain_plane(metric, x) if kind == "fp32" else make_plane(metric, x, kind)


def search(metric, kind, q, x, k, ranks=None, selection=Selection(), workspace=WORKSPACE, plane=None):
    plane = plane_of(metric, x, kind) if plane is None else plane
    return knn_exact(q, x, k, resolve_metric(metric), ranks, selection, workspace, plane, native_first)


def unscreened(metric, q, x, k):
    return knn_exact(q, x, k, resolve_metric(metric), None, Selection(), WORKSPACE)


def assert_same(found, expected):
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("name", NAMES)
@FEW
@given(data=st.data())
def test_answers_are_those_of_the_reference(name, kind, data):
    metric = data.draw(st.sampled_from(METRICS))
    q, x, k, ids, mask, exclude = drawn_case(name, data)
    ranks = None if ids is None else ids.argsort().argsort()
    found = search(metric, kind, q, x, k, ranks, Selection(mask, exclude))
    assert_reference(metric, found, q, x, k, ids, mask, exclude)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("n_queries", [1, 4, 5, 17, 32, 40, 64, 65, 130, 300])
def test_every_number_of_queries_and_threads(n_queries, threads, kind, certified, monkeypatch):
    monkeypatch.setattr(knn_native, "native_threads", lambda: threads)
    generator = torch.Generator().manual_seed(0)
    for dim, n in ((5, 1001), (37, 2048), (64, 777), (130, 1500)):
        q, x = (torch.randn(each, dim, generator=generator) for each in (n_queries, n))
        mask = torch.rand(n_queries, n, generator=generator) < 0.5
        certified.clear()
        found = search("l2", kind, q, x, 7, selection=Selection(mask))
        assert certified == [n_queries]
        assert_reference("l2", found, q, x, 7, mask=mask)


@pytest.mark.parametrize("dim", [1, 2, 3, 5, 63, 64, 65, 127, 128, 191, 2500])
def test_every_number_of_features(dim, kind, certified):
    generator = torch.Generator().manual_seed(0)
    for n_queries in (3, 20):
        q, x = (torch.randn(n, dim, generator=generator) for n in (n_queries, 600))
        for metric in ("l2", "ip"):
            assert_reference(metric, search(metric, kind, q, x, 5), q, x, 5)
    assert certified or (kind == "int8" and dim < 4)


def coded_natively(metric, queries, plane):
    """Code queries as a search does that is given none."""
    n_queries, dim = queries.shape
    codes = torch.empty(n_queries, dim, dtype=plane.codes.dtype)
    terms = torch.empty(3, n_queries)
    rounding, offsets = torch.empty(2, n_queries, dtype=torch.float64)
    usable = torch.empty(n_queries, dtype=torch.bool)
    assert search_native.native_code(
        queries=queries.double(),
        mean=plane.mean,
        codes=codes,
        terms=terms,
        rounding=rounding,
        offsets=offsets,
        usable=usable,
        rounded=rounded_units(plane.kind, dim),
        largest=LARGEST_NORM / dim,
        dim=dim,
        n_queries=n_queries,
        metric=search_native.METRICS[metric],
        code_type=search_native.CODE_TYPES[codes.dtype],
        n_threads=2,
    )
    slack = torch.tensor(norm_square_slack(resolve_metric(metric)))
    return CodedQueries(codes, terms, slack, rounding, offsets, usable, False)


@pytest.mark.parametrize("metric", METRICS)
def test_queries_are_coded_as_torch_codes_them(metric, kind):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 37, generator=generator) + 3.0
    q = torch.randn(40, 37, generator=generator) * 10.0 ** torch.arange(-20, 20)[:, None]
    q[3], q[5, 2], q[7, 1], q[9] = 0.0, torch.nan, torch.inf, 1e25
    plane = plane_of(metric, x, kind)
    expected = code_queries(resolve_metric(metric), q, plane)
    found = coded_natively(metric, q, plane)
    usable = expected.usable
    assert torch.equal(found.usable, usable)
    assert 30 <= int(usable.sum()) < 40
    assert bool((found.codes[usable].float() - expected.codes[usable].float()).abs().le(1e-6).all())
    for name in ("terms", "slack", "rounding", "offsets"):
        mine, theirs = getattr(found, name), getattr(expected, name)
        if mine.ndim:
            mine, theirs = mine[..., usable], theirs[..., usable]
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0.0 if name == "terms" else 1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_queries_that_are_not_finite_leave_the_others_right(metric, kind):
    generator = torch.Generator().manual_seed(0)
    q, x = torch.randn(6, 16, generator=generator), torch.randn(900, 16, generator=generator)
    bad = q.clone()
    bad[0, 0], bad[2, 3], bad[4] = torch.nan, torch.inf, 1e30
    scores, rows = search(metric, kind, bad, x, 3)
    good = [1, 3, 5]
    assert_reference(metric, (scores[good], rows[good]), q[good], x, 3)
    assert_reference(metric, (scores[4:5], rows[4:5]), bad[4:5], x, 3)


def test_masks_of_any_memory_layout(kind):
    generator = torch.Generator().manual_seed(0)
    q, x = torch.randn(20, 16, generator=generator), torch.randn(900, 16, generator=generator)
    row, pairs = torch.rand(900, generator=generator) < 0.5, torch.rand(900, 20, generator=generator) < 0.1
    for mask in (row.expand(20, -1), pairs.t(), torch.stack([row, row], 1)[:, 0], pairs.t()[:, :900:1]):
        found = search("l2", kind, q, x, 3, selection=Selection(mask))
        assert_reference("l2", found, q, x, 3, mask=mask)
    # Only some of the queries, in an order of their own.
    order = torch.randperm(20, generator=generator)[:7]
    part = Selection(pairs.t()).for_queries(order)
    metric = resolve_metric("l2")
    run = native_first(x, metric, plane_of("l2", x, kind), 3, 0, WORKSPACE).run
    assert_reference("l2", run(q[order], 3, None, part, WORKSPACE)[:2], q[order], x, 3, mask=pairs.t()[order])


def test_where_rounding_is_open_the_definition_decides(kind, monkeypatch):
    """Sums that lie between two float32 numbers, but for a last feature that float64 has no room for."""
    generator = torch.Generator().manual_seed(0)
    q, x = torch.zeros(5, 4), torch.randint(-8, 9, (1000, 4), generator=generator).float()
    x[:, 2:] = 0.0
    # Beyond 2**26 every eighth number is a float32, and these sums lie 4 above one.
    x[:, 0], x[:, 1] = 8192.0 + 4.0 * (x[:, 0] + 8.0), 2.0 + 4.0 * x[:, 1]
    x[:, 2] = 2.0**-30
    settled = []
    settle = NativeSearch._ranked
    monkeypatch.setattr(
        NativeSearch, "_ranked", lambda self, *args: settled.append(args[1]) or settle(self, *args)
    )
    assert_reference("l2", search("l2", kind, q, x, 20), q, x, 20)
    assert settled


# That the tests above can fail.


@pytest.mark.parametrize("metric", METRICS)
def test_without_the_bounds_the_answer_is_wrong(metric, monkeypatch, certified):
    if ("VNNI", "int8") not in WAYS:
        pytest.skip("float32 codes lose too little to mislead")

    def careless(search, queries):
        coded = code_queries(search.metric, queries, search.plane)
        coded.terms[1:].zero_()
        coded.slack.zero_()
        return coded

    q, x = misleading(metric)
    expected = unscreened(metric, q, x, 5)
    assert_same(search(metric, "int8", q, x, 5), expected)
    certified.clear()
    monkeypatch.setattr(NativeSearch, "_coded", careless)
    found = search(metric, "int8", q, x, 5)
    assert certified == [20]
    assert not torch.equal(found[1], expected[1])


def test_without_room_for_ties_the_answer_is_wrong(monkeypatch, certified):
    """Far from the origin, scores differ by less than float32 can tell: the lower id wins."""
    if ("VNNI", "int8") not in WAYS:
        pytest.skip("float32 codes cannot be centred")
    generator = torch.Generator().manual_seed(0)
    x = 2.0**20 + torch.randint(-8, 9, (4096, 16), generator=generator) / 8
    x[torch.randperm(4096, generator=generator)[100:]] -= 2.0**12
    q = torch.rand(100, 16, generator=generator)
    expected = unscreened("ip", q, x, 40)
    plane = encode(resolve_metric("ip"), x, torch.full((16,), 2.0**20), "int8")
    assert_same(search("ip", "int8", q, x, 40, plane=plane), expected)
    assert certified[0] > 0

    def careless(search, queries):
        coded = code_queries(search.metric, queries, search.plane)
        coded.rounding.zero_()
        return coded

    monkeypatch.setattr(NativeSearch, "_coded", careless)
    assert not torch.equal(search("ip", "int8", q, x, 40, plane=plane)[1], expected[1])


# That the screen does the work on ordinary data, and is right on hard data.


@pytest.mark.parametrize("metric", METRICS)
def test_ordinary_data_is_certified(metric, kind, certified):
    q, x = clustered(20_000, 64, 100, torch.Generator().manual_seed(0))
    found = search(metric, kind, q, x, 10)
    assert certified == [100]
    assert_same(found, unscreened(metric, q, x, 10))


@pytest.mark.parametrize("name", ["duplicates", "one large row", "noise"])
@pytest.mark.parametrize("metric", METRICS)
def test_hard_data_is_right(metric, name, kind, certified):
    q, x = hard(name)
    found = search(metric, kind, q, x, 10)
    assert len(certified) == 1
    if name == "duplicates":
        # More of them than there is room for are told apart by the definition.
        assert certified == [20]
    expected = knn_exact(q.double(), x.double(), 10, resolve_metric(metric), None, Selection(), WORKSPACE)
    assert_same(found, expected)


def test_rows_that_get_better_and_better(kind, certified):
    """The worst order there is: every row beats those before it."""
    x = torch.linspace(3.0, 1.0, 50_000)[:, None] * torch.tensor([[1.0, -1.0, 0.5, 0.0]])
    q = torch.zeros(9, 4)
    assert_same(search("l2", kind, q, x, 10), unscreened("l2", q, x, 10))
    assert certified == [9]


@pytest.mark.parametrize("k", [10, 100])
def test_any_split_of_the_queries_gives_the_same_bits(k, kind):
    q, x = clustered(30_000, 32, 600, torch.Generator().manual_seed(0))
    x[10_000:10_300] = x[:300]
    whole = search("l2", kind, q, x, k)
    assert_same(search("l2", kind, q, x, k), whole)
    for size in (1, 3, 100, 257):
        parts = q.split(size) if size > 3 else q[:60].split(size)
        scores, rows = (
            torch.cat(each) for each in zip(*(search("l2", kind, part, x, k) for part in parts), strict=True)
        )
        assert_same((scores, rows), (whole[0][: len(scores)], whole[1][: len(rows)]))


@pytest.mark.parametrize("workspace", [2**20, 2**21, 2**23])
def test_a_small_workspace_gives_the_same_bits(workspace, kind):
    q, x = clustered(30_000, 32, 100, torch.Generator().manual_seed(0))
    assert_same(search("l2", kind, q, x, 10, workspace=workspace), search("l2", kind, q, x, 10))


@pytest.mark.parametrize("low", [-128, 0])
def test_integers_within_int8_need_no_look_at_the_vectors(low, certified):
    if ("VNNI", "int8") not in WAYS:
        pytest.skip("this machine has no int8 products")
    generator = torch.Generator().manual_seed(0)
    q, x = (torch.randint(low, low + 256, (n, 48), generator=generator).float() for n in (9, 4000))
    plane = plane_of("l2", x, "int8")
    assert plane.is_integer
    found = search("l2", "int8", q, torch.full_like(x, torch.nan), 8, plane=plane)
    assert certified == [9]
    assert_reference("l2", found, q, x, 8)


def test_forked_processes_search_with_one_thread(monkeypatch, certified):
    monkeypatch.setitem(compilation._state, "forked", True)
    assert knn_native.native_threads() == 1
    q, x = clustered(5000, 32, 9, torch.Generator().manual_seed(0))
    index = FlatIndex(32)
    index.add(x)
    assert_same(index.search(q, 5, implementation="native"), unscreened("l2", q, x, 5))
    # What has a mask is not prepared.
    everything = torch.ones(5000, dtype=torch.bool)
    assert_same(index.search(q, 5, mask=everything, implementation="native"), unscreened("l2", q, x, 5))
    assert certified == [9]


def test_int8_products_are_looked_at_once_and_left_alone_where_they_are_wrong(monkeypatch):
    if ("VNNI", "int8") not in WAYS:
        pytest.skip("this machine has no int8 products")
    assert search_native.int8_products_are_right()
    x = torch.randn(3000, 16, generator=torch.Generator().manual_seed(0))
    plane = plane_of("l2", x, "int8")
    assert native_first(x, resolve_metric("l2"), plane, 5, 0, WORKSPACE) is not None
    monkeypatch.setattr(knn_native, "int8_products_are_right", lambda: False)
    assert native_first(x, resolve_metric("l2"), plane, 5, 0, WORKSPACE) is None
