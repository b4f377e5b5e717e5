"""Range search in C++: the bits of the search in torch, of all rows and of lists, whatever the radius."""

import pytest
import torch

from elips_torch import FlatIndex, IVFFlatIndex, IVFPQIndex, IVFSQIndex, range_search
from elips_torch.core.errors import ImplementationError
from elips_torch.core.hardware import DeviceFacts, device_facts
from elips_torch.core.metric import METRICS, resolve_metric
from elips_torch.core.native import native_reasons
from elips_torch.kernels import (
    knn_native,
    packed_native,
    range_search_native,
    search_native,
    within_native,
)
from elips_torch.reference.range_search import range_search as reference

pytestmark = pytest.mark.skipif(
    bool(native_reasons(device_facts("cpu"))), reason="; ".join(native_reasons(device_facts("cpu")))
)
CASES = [(metric.name, None) for metric in METRICS if metric.name != "lp"]
CASES += [("lp", p) for p in (1, 2, 3, 2.7)]
WAYS = ["AVX2", *(["AVX512"] if device_facts("cpu").capability == "AVX512" else [])]


@pytest.fixture(autouse=True)
def _compiled():
    assert search_native.library_compiles()


@pytest.fixture(params=[*WAYS, "here"])
def instructions(request, monkeypatch):
    """Run the code for some instructions, or for those that there are."""
    if request.param != "here":
        facts = DeviceFacts("cpu", "2 cores", request.param)
        for module in (knn_native, packed_native, search_native):
            monkeypatch.setattr(module, "device_facts", lambda device: facts)
        assert search_native.library_compiles()
    return request.param


@pytest.fixture
def left(monkeypatch):
    """List how many queries were left to torch."""
    seen = []
    for name in ("range_search_eager", "ivf_range_search_eager"):
        function = getattr(range_search_native, name)

        def spy(queries, *rest, function=function):
            seen.append(len(queries))
            return function(queries, *rest)

        monkeypatch.setattr(range_search_native, name, spy)
    return seen


def data(case, n_queries, n, dim, seed=0):
    """Return queries and a database in the metric's domain, with zeros, equal rows and a query among them."""
    generator = torch.Generator().manual_seed(seed)
    q, x = torch.rand(n_queries, dim, generator=generator), torch.rand(n, dim, generator=generator)
    if resolve_metric(*case).domain[0] < 0.0:
        q, x = q - 0.4, x - 0.4
    x[::5] *= torch.rand(len(x[::5]), dim, generator=generator) < 0.6
    x[n // 2 : n // 2 + n // 8] = x[: n // 8]
    q[0] = x[3]
    return q, x


def radii(index, queries, k):
    """Return scores that occur, so that some row is just not within, and next to them."""
    radius = index.search(queries, min(k, index.ntotal), implementation="eager").scores[:, -1].clone()
    radius[1::3] = torch.nextafter(radius[1::3], torch.tensor(torch.inf))
    radius[2::3] = torch.nextafter(radius[2::3], torch.tensor(-torch.inf))
    return radius


def assert_same(found, expected):
    for name in ("lims", "scores", "ids"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def assert_right(index, queries, radius, **selection):
    found = index.range_search(queries, radius, implementation="native", **selection)
    assert_same(found, index.range_search(queries, radius, implementation="eager", **selection))
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dim", [1, 7, 16, 33, 67])
def test_the_bits_are_those_of_the_search_in_torch(case, dim, instructions, left):
    for n_queries in (1, 3, 20, 70):
        q, x = data(case, n_queries, 400, dim, seed=dim)
        for screen in ("auto", "none"):
            index = FlatIndex(dim, case[0], p=case[1], screen=screen)
            index.add(x, torch.arange(400).flip(0))
            for k in (1, 40, 400):
                assert_right(index, q, radii(index, q, k))
    assert left == []


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_plain_reference_agrees(case):
    q, x = data(case, 5, 120, 9)
    index = FlatIndex(9, case[0], p=case[1])
    index.add(x)
    radius = radii(index, q, 20)
    found = range_search(q, x, radius, metric=case[0], p=case[1], implementation="native")
    assert_same(found, reference(q, x, radius, *case))
    assert len(found.ids)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("case", [("l2", None), ("ip", None), ("l1", None)], ids=str)
def test_threads_share_rows_or_queries(case, threads, monkeypatch, left):
    monkeypatch.setattr(knn_native, "native_threads", lambda: threads)
    monkeypatch.setattr(knn_native, "_WORTH_THREADS", 0)
    for n_queries in (1, 9, 65, 800):
        q, x = data(case, n_queries, 1500, 12, seed=n_queries)
        index = FlatIndex(12, case[0])
        index.add(x)
        assert_right(index, q, radii(index, q, 30))
    assert left == []


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_queries_may_not_see_is_not_found(case, left):
    q, x = data(case, 9, 500, 11)
    index = FlatIndex(11, case[0], p=case[1])
    index.add(x, torch.randperm(900, generator=torch.Generator().manual_seed(1))[:500])
    radius = radii(index, q, 60)
    mask = torch.rand(9, 500, generator=torch.Generator().manual_seed(2)) < 0.3
    exclude = torch.cat([index.search(q, 3).ids, torch.full((9, 1), -1)], 1)
    for selection in (
        {"mask": mask},
        {"mask": mask[0]},
        {"exclude": exclude},
        {"mask": mask, "exclude": exclude},
    ):
        assert_right(index, q, radius, **selection)
    assert left == []


@pytest.mark.parametrize("case", [("l2", None), ("ip", None), ("cosine", None), ("linf", None)], ids=str)
@pytest.mark.parametrize("radius", [torch.inf, -torch.inf, 0.0, 3e38, -3e38])
def test_all_rows_or_none(case, radius, left):
    q, x = data(case, 4, 3000, 8)
    index = FlatIndex(8, case[0])
    index.add(x)
    found = assert_right(index, q, radius)
    assert len(found.ids) in (0, 12_000) or radius == 0.0
    assert left == []


def test_distances_near_the_largest_float():
    x = torch.tensor([[8e37] * 4, [7e37] * 4, [8.4e37] * 4, [1.0] * 4]).repeat(30, 1)
    for metric in ("l1", "linf"):
        index = FlatIndex(4, metric)
        index.add(x)
        counts = [
            len(assert_right(index, torch.zeros(2, 4), radius).ids)
            for radius in (3.4e38, 3.3e38, 2.9e38, 7.5e37)
        ]
        assert counts == ([240, 180, 120, 60] if metric == "l1" else [240, 240, 240, 120])


def test_more_rows_than_reservoirs_hold(left):
    q, x = data(("l2", None), 30, 5000, 8)
    index = FlatIndex(8)
    index.add(x)
    # Most rows of some queries, few of others.
    radius = index.search(q, 4500, implementation="eager").scores[:, -1].clone()
    radius[::4] /= 8.0
    attempts = []
    hits = range_search_native.native_hits

    def spy(search, queries, *rest):
        attempts.append(len(queries))
        return hits(search, queries, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(range_search_native, "native_hits", spy)
        assert_right(index, q, radius)
    # First all, then those that overflowed, by how much room they need.
    assert attempts[0] == 30
    assert len(attempts) > 1
    assert 0 < sum(attempts[1:]) < 30
    assert left == []


def test_a_small_workspace_takes_fewer_queries_at_a_time(left):
    q, x = data(("l2", None), 600, 4000, 16)
    index = FlatIndex(16, workspace_bytes=2**20)
    index.add(x)
    assert_right(index, q, radii(index, q, 300))
    assert left == []


@pytest.mark.parametrize("threads", [8, 16])
@pytest.mark.parametrize("n_queries", [1, 20])
def test_many_rows_are_found_by_many_threads(threads, n_queries, monkeypatch, left):
    monkeypatch.setattr(knn_native, "native_threads", lambda: threads)
    q, x = data(("l2", None), n_queries, 100_000, 8)
    index = FlatIndex(8)
    index.add(x)
    assert_right(index, q, radii(index, q, 10_000))
    assert left == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [("l2", None), ("ip", None), ("l1", None), ("canberra", None)], ids=str)
def test_short_floats(case, dtype):
    q, x = data(case, 12, 600, 24)
    index = FlatIndex(24, case[0], dtype=dtype)
    index.add(x)
    for queries in (q, q.to(dtype)):
        assert_right(index, queries, radii(index, queries, 50))


def test_whole_numbers_are_searched_by_codes_that_are_the_vectors(left):
    generator = torch.Generator().manual_seed(0)
    q, x = (torch.randint(-9, 9, (n, 16), generator=generator).float() for n in (40, 700))
    for metric in ("l2", "ip"):
        index = FlatIndex(16, metric)
        index.add(x)
        found = assert_right(index, q, radii(index, q, 60))
        assert len(found.ids)
    assert left == []


def test_last_bits_that_are_open_are_settled_by_torch(monkeypatch, left):
    settled = []
    score = within_native._score

    def spy(search, queries, chosen, owners, rows, scores, workspace_bytes):
        # Not what is certain beside it.
        settled.append((int(scores.isnan().sum()), len(scores)))
        score(search, queries, chosen, owners, rows, scores, workspace_bytes)
        assert not scores.isnan().any()

    monkeypatch.setattr(within_native, "_score", spy)
    # Sums between two floats, by less than they may err in another order.
    x = torch.tensor([[1.0, 2.0**-24, 2.0**-74], [0.5, 0.0, 0.0], [2.0, 1.0, 0.0]]).repeat(40, 1)
    q = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 4.0]]).repeat(5, 1)
    index = FlatIndex(3, "ip", screen="none")
    index.add(x)
    for radius in (0.75, 1.0, 0.0, 2.5):
        assert_right(index, q, radius)
    assert any(0 < unsure < total for unsure, total in settled)
    assert left == []


def test_rows_that_are_not_finite_are_never_within():
    q, x = data(("l2", None), 4, 300, 8)
    x[5, 2], x[9, 1] = torch.nan, torch.inf
    for metric in ("l2", "ip", "l1", "linf"):
        index = FlatIndex(8, metric, check_finite=False)
        index.add(x)
        found = assert_right(index, q, 1e9 if metric != "ip" else -1e9)
        assert 5 not in found.ids
        assert metric == "ip" or 9 not in found.ids


@pytest.mark.parametrize("in_cpp", [True, False])
def test_the_automatic_choice_takes_it_where_it_is_compiled(in_cpp, monkeypatch):
    q, x = data(("l2", None), 3, 200, 8)
    index = FlatIndex(8)
    index.add(x)
    ran = []
    monkeypatch.setattr(
        within_native, "native_search", lambda **facts: ran.append(1) or search_native.native_search(**facts)
    )
    if not in_cpp:
        monkeypatch.setattr(search_native.LIBRARY, "is_ready", lambda options: False)
    index.range_search(q, 1.0)
    assert bool(ran) == in_cpp


def test_float64_is_refused_by_name():
    q, x = data(("l2", None), 3, 200, 8)
    with pytest.raises(ImplementationError, match="float32, bfloat16 and float16"):
        range_search(q.double(), x, 1.0, implementation="native")


@pytest.mark.parametrize("screen", ["auto", "none", "bf16"])
@pytest.mark.parametrize("metric", ["l2", "ip", "l1"])
def test_queries_in_float64(metric, screen, instructions):
    q, x = data((metric, None), 6, 700, 16)
    q = q.double() + 1e-9
    if metric == "l1" and screen == "bf16":
        screen = "none"
    lists = IVFFlatIndex(16, 5, metric, nprobe=3, screen=screen).fit(x)
    flat = FlatIndex(16, metric, screen="auto" if metric == "l1" else screen)
    for index in (lists, flat):
        index.add(x)
        radius = radii(index, q, 60)
        assert_same(index.range_search(q, radius), index.range_search(q, radius, implementation="eager"))


def test_codes_are_made_for_those_who_look_at_them(monkeypatch):
    q, x = data(("l2", None), 3, 300, 16)
    index = FlatIndex(16, learnable=True, screen="int8")
    index.add(x)
    made = []
    current = type(index.plane).current
    monkeypatch.setattr(
        type(index.plane), "current", lambda self, vectors: made.append(1) or current(self, vectors)
    )
    with torch.no_grad():
        index.range_search(q, 1.0, implementation="eager")
        assert made == []
        index.range_search(q, 1.0, implementation="native")
    assert made == [1]


FAMILIES = {
    "flat": lambda metric, dim: IVFFlatIndex(dim, 5, metric, nprobe=3),
    "flat of float16": lambda metric, dim: IVFFlatIndex(dim, 5, metric, nprobe=3, dtype=torch.float16),
    "scalars": lambda metric, dim: IVFSQIndex(dim, 5, "int8", metric, nprobe=3),
    "four bits": lambda metric, dim: IVFSQIndex(dim, 5, "int4", metric, by_residual=False, nprobe=3),
    "parts": lambda metric, dim: IVFPQIndex(dim, 5, 4, 8, metric, nprobe=3, min_points_per_centroid=1),
    "parts of four bits": lambda metric, dim: IVFPQIndex(dim, 5, 4, 4, metric, nprobe=3),
}


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine", "l1"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lists(family, metric, instructions, left):
    if metric == "l1" and "flat" not in family:
        pytest.skip("codes are decoded for it, part by part")
    q, x = data((metric, None), 40, 1200, 16)
    index = FAMILIES[family](metric, 16).fit(x)
    index.add(x, torch.randperm(2000, generator=torch.Generator().manual_seed(1))[:1200])
    index.remove(index.ids[::7].clone())
    mask = torch.rand(40, index.ntotal, generator=torch.Generator().manual_seed(2)) < 0.3
    for queries, own in ((q, mask), (q[:1], mask[:1])):
        radius = radii(index, queries, 60)
        for selection in ({}, {"mask": own}, {"exclude": index.search(queries, 4).ids}):
            assert_right(index, queries, radius, **selection)
    # Products of vectors as they are stored want codes of eight bits.
    has_codes = instructions == "here" and device_facts("cpu").vnni
    if has_codes or "flat" not in family or metric in ("l2", "l1"):
        assert left == []
