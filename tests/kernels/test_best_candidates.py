"""Ranking of chosen rows in C++: the bits of the definition, whatever the rows and the queries are."""

import pytest
import torch

from elips_torch.core.hardware import DeviceFacts, device_facts
from elips_torch.core.metric import METRICS, resolve_metric
from elips_torch.core.native import native_reasons
from elips_torch.kernels import best_candidates as module
from elips_torch.kernels import search_native
from elips_torch.kernels.best_candidates import best_candidates, best_candidates_eager, prepare_ranking

pytestmark = pytest.mark.skipif(
    bool(native_reasons(device_facts("cpu"))), reason="; ".join(native_reasons(device_facts("cpu")))
)
WORKSPACE = 2**26
CASES = [(metric.name, None) for metric in METRICS if metric.name != "lp"]
CASES += [("lp", p) for p in (1, 2, 3, 7, 0.5, 2.7)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ASKED = [*DTYPES, torch.float64]
WAYS = ["AVX2", *(["AVX512"] if device_facts("cpu").capability == "AVX512" else [])]


@pytest.fixture(autouse=True)
def _compiled():
    assert search_native.library_compiles()


@pytest.fixture(params=WAYS)
def instructions(request, monkeypatch):
    """Run the code for some instructions."""
    monkeypatch.setattr(
        search_native, "device_facts", lambda device: DeviceFacts("cpu", "2 cores", request.param)
    )
    assert search_native.library_compiles()


def data(metric, n_queries, n_rows, n_candidates, dim, dtypes=(torch.float32, torch.float32), seed=0):
    """Return queries, a database with equal rows and rows that are queries, candidates and ranks."""
    generator = torch.Generator().manual_seed(seed)
    q, x = torch.rand(n_queries, dim, generator=generator), torch.rand(n_rows, dim, generator=generator)
    if metric.domain[0] < 0.0:
        q, x = q - 0.4, x - 0.4
    x[::5] *= torch.rand(len(x[::5]), dim, generator=generator) < 0.6
    x[n_rows // 2 : n_rows // 2 + n_rows // 4] = x[: n_rows // 4]
    q[0] = x[3]
    rows = torch.rand(n_queries, n_rows, generator=generator).argsort(1)[:, :n_candidates].contiguous()
    rows[torch.rand(rows.shape, generator=generator) < 0.1] = -1
    ranks = torch.randperm(n_rows, generator=generator)
    return q.to(dtypes[0]), x.to(dtypes[1]), rows, ranks


def in_cpp(*arguments):
    """Rank in C++, and check that nothing was left to torch."""
    metric, queries, database, rows, k, ranks = arguments
    scores, found = torch.empty(len(rows), k), torch.empty(len(rows), k, dtype=torch.int64)
    ranking = prepare_ranking(metric, queries, database, rows, ranks, (scores, found))
    assert ranking.run() is None
    return scores, found


def assert_same(found, expected):
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0], expected[0])
    assert not torch.signbit(found[0][found[0] == 0]).any()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dim", [1, 7, 8, 16, 33, 67])
def test_the_bits_are_those_of_the_definition(case, dim, instructions):
    metric = resolve_metric(*case)
    for k in (1, 9, 24):
        q, x, rows, ranks = data(metric, 6, 80, 24, dim, seed=dim)
        for own_ranks in (None, ranks):
            found = best_candidates(metric, q, x, rows, k, own_ranks, WORKSPACE)
            assert_same(found, best_candidates_eager(metric, q, x, rows, k, own_ranks, WORKSPACE))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_every_pair_of_dtypes(case, asked, stored, instructions):
    metric = resolve_metric(*case)
    q, x, rows, ranks = data(metric, 5, 60, 20, 37, (asked, stored))
    found = best_candidates(metric, q, x, rows, 7, ranks, WORKSPACE)
    assert_same(found, best_candidates_eager(metric, q, x, rows, 7, ranks, WORKSPACE))


@pytest.mark.parametrize("name", ["l2", "ip", "cosine"])
def test_most_is_certain_and_nothing_is_left_to_torch(name):
    metric = resolve_metric(name)
    q, x, rows, ranks = data(metric, 40, 400, 30, 64)
    expected = best_candidates_eager(metric, q, x, rows, 10, ranks, WORKSPACE)
    assert_same(in_cpp(metric, q, x, rows, 10, ranks), expected)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_share_the_queries(threads, monkeypatch):
    monkeypatch.setattr(module, "native_threads", lambda: threads)
    metric = resolve_metric("l2")
    for n_queries in (1, 2, 3, 17, 300):
        q, x, rows, ranks = data(metric, n_queries, 500, 50, 96)
        found = best_candidates(metric, q, x, rows, 20, ranks, WORKSPACE)
        assert_same(found, best_candidates_eager(metric, q, x, rows, 20, ranks, WORKSPACE))


def test_results_may_take_the_place_of_the_candidates():
    metric = resolve_metric("l2")
    q, x, rows, ranks = data(metric, 4, 50, 12, 10)
    expected = best_candidates_eager(metric, q, x, rows, 12, ranks, WORKSPACE)
    scores = torch.empty(4, 12)
    assert prepare_ranking(metric, q, x, rows, ranks, (scores, rows)).run() is None
    assert_same((scores, rows), expected)


def test_numbers_of_no_row_are_none():
    metric = resolve_metric("ip")
    q, x, rows, _ = data(metric, 3, 50, 12, 10)
    rows[0, :6] = torch.tensor([-1, -7, 50, 2**40, -(2**60), 51])
    rows[1] = -1
    known = torch.where((rows >= 0) & (rows < 50), rows, -1)
    expected = best_candidates_eager(metric, q, x, known, 12, None, WORKSPACE)
    assert_same(in_cpp(metric, q, x, rows, 12, None), expected)
    assert (expected[1][1] == -1).all()
    assert (expected[0][1] == -torch.inf).all()


def ranking_of(metric, q, x, rows):
    scores, found = torch.empty(rows.shape), torch.empty(rows.shape, dtype=torch.int64)
    return prepare_ranking(metric, q, x, rows, None, (scores, found))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_left_to_torch(case, value):
    metric = resolve_metric(*case)
    for where in ("query", "row"):
        q, x, _, _ = data(metric, 3, 50, 12, 10)
        rows = torch.arange(12).repeat(3, 1)
        # Short floats differ by numbers that sums hold.
        q, x = q.half().float(), x.half().float()
        assert ranking_of(metric, q, x, rows).is_done() or case[0] not in ("l2", "ip", "l1", "linf")
        (q if where == "query" else x)[2, 4] = value
        # The largest difference from an infinite row is infinite for certain.
        if where == "query" or not (case[0] == "linf" and abs(value) == torch.inf):
            assert not ranking_of(metric, q, x, rows).is_done()
        if where == "query":
            # Sums of powers may lie between two floats for others, too.
            assert 2 in ranking_of(metric, q, x, rows).run()
        found = best_candidates(metric, q, x, rows, 12, None, WORKSPACE)
        expected = best_candidates_eager(metric, q, x, rows, 12, None, WORKSPACE)
        assert torch.equal(found[1], expected[1])
        assert torch.equal(found[0].nan_to_num(7.0), expected[0].nan_to_num(7.0))


def test_scores_between_two_floats_are_settled_by_torch():
    metric = resolve_metric("ip")
    # The product lies beside the middle between 1 and the float after it, by less than sums may err.
    q = torch.tensor([[1.0, 2.0**-24, 2.0**-74]]).repeat(2, 1)
    q[1] = torch.tensor([1.0, 0.5, 0.25])
    x = torch.tensor([[1.0, 1.0, 1.0], [2.0, 1.0, 0.0]])
    rows = torch.tensor([[0, 1], [1, 0]])
    ranking = prepare_ranking(metric, q, x, rows, None, (torch.empty(2, 2), torch.empty(2, 2).long()))
    assert ranking.run().tolist() == [0]
    found = best_candidates(metric, q, x, rows, 2, None, WORKSPACE)
    assert_same(found, best_candidates_eager(metric, q, x, rows, 2, None, WORKSPACE))


@pytest.mark.parametrize("size", [1e-30, 1e18, 1e30])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tiny_and_huge_vectors(case, size):
    metric = resolve_metric(*case)
    q, x, rows, ranks = data(metric, 5, 60, 20, 19)
    if metric.domain[1] < torch.inf:
        size = min(size, 1.0)
    found = best_candidates(metric, q * size, x * size, rows, 20, ranks, WORKSPACE)
    expected = best_candidates_eager(metric, q * size, x * size, rows, 20, ranks, WORKSPACE)
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0].nan_to_num(7.0), expected[0].nan_to_num(7.0))


def test_layouts_that_cpp_does_not_read():
    metric = resolve_metric("l2")
    q, x, rows, ranks = data(metric, 6, 80, 24, 12)
    expected = best_candidates_eager(metric, q, x, rows, 9, ranks, WORKSPACE)
    # Strided queries and candidates are copied; a strided or a float64 database is left to torch.
    strided = (torch.stack((each, each), 2)[..., 0] for each in (q, rows))
    own_q, own_rows = strided
    assert_same(best_candidates(metric, own_q, x, own_rows, 9, ranks, WORKSPACE), expected)
    assert_same(best_candidates(metric, q, x.T.contiguous().T, rows, 9, ranks, WORKSPACE), expected)
    assert_same(best_candidates(metric, q.double(), x.double(), rows, 9, ranks, WORKSPACE), expected)
    negated = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert negated.is_neg()
    assert_same(best_candidates(metric, q, negated, rows, 9, ranks, WORKSPACE), expected)


def test_small_rankings_do_not_wait_for_a_compiler(monkeypatch):
    metric = resolve_metric("l2")
    q, x, rows, ranks = data(metric, 6, 80, 24, 12)
    expected = best_candidates_eager(metric, q, x, rows, 9, ranks, WORKSPACE)
    asked = []
    monkeypatch.setattr(module, "library_is_loaded", lambda: False)
    monkeypatch.setattr(module, "library_is_ready", lambda device: False)
    monkeypatch.setattr(module, "library_compiles", lambda: bool(asked.append(1)))
    assert_same(best_candidates(metric, q, x, rows, 9, ranks, WORKSPACE), expected)
    assert not asked
    monkeypatch.setattr(module, "_WORTH_COMPILING", rows.numel() * 12)
    assert_same(best_candidates(metric, q, x, rows, 9, ranks, WORKSPACE), expected)
    assert asked == [1]
