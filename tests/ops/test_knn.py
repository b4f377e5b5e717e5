import math

import pytest
import torch
from adversarial import CASES, DTYPES, NAMES, hard_cases, hard_sets, oracle_knn, vectors
from hypothesis import given, settings
from hypothesis import strategies as st

from elips_torch import METRICS, knn
from elips_torch.core.hardware import device_facts
from elips_torch.core.metric import resolve_metric
from elips_torch.core.native import native_reasons
from elips_torch.kernels.search_native import LIBRARY, library_compiles
from elips_torch.reference.knn import knn as reference_knn

MIB = 2**20


@pytest.fixture(params=["where it is compiled", "not compiled"], autouse=True)
def _in_cpp_or_torch(request, monkeypatch):
    """Run small searches by both of what the automatic choice takes."""
    if request.param == "not compiled":
        monkeypatch.setattr(LIBRARY, "is_ready", lambda options: False)
    elif not native_reasons(device_facts("cpu")):
        assert library_compiles()


def assert_same(found, expected):
    assert found[0].dtype == torch.float32
    assert found[1].dtype == torch.int64
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("metric", "p"), CASES, ids=NAMES)
def test_every_metric_and_dtype_equals_the_reference(metric, p, dtype):
    kind = resolve_metric(metric, p)
    for n, n_queries, dim in [(1, 1, 3), (63, 3, 1), (127, 1, 33), (90, 1, 100)]:
        q, x = vectors(kind, n_queries, dim, dtype=dtype), vectors(kind, n, dim, seed=1, dtype=dtype)
        full = reference_knn(q, x, n + 3, metric, p)
        for k in {1, min(10, n), n, n + 3}:
            found = knn(q, x, k, metric=metric, p=p)
            assert_same(found, (full.scores[:, :k], full.ids[:, :k]))


@pytest.mark.parametrize(("metric", "p"), CASES, ids=NAMES)
@pytest.mark.parametrize(("n", "n_queries"), [(0, 0), (0, 3), (5, 0), (500, 0)])
def test_empty_sides(metric, p, n, n_queries):
    kind = resolve_metric(metric, p)
    scores, ids = knn(torch.zeros(n_queries, 3), torch.zeros(n, 3), 4, metric=metric, p=p)
    assert torch.equal(scores, torch.full((n_queries, 4), kind.worst))
    assert torch.equal(ids, torch.full((n_queries, 4), -1))


@pytest.mark.parametrize("database_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("query_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", ["l2", "ip", "cosine", "l1", "canberra"])
def test_mixed_dtypes(metric, query_dtype, database_dtype):
    kind = resolve_metric(metric)
    q, x = vectors(kind, 3, 12, dtype=query_dtype), vectors(kind, 300, 12, seed=1, dtype=database_dtype)
    assert_same(knn(q, x, 6, metric=metric), oracle_knn(kind, q, x, 6))


@pytest.mark.parametrize(("metric", "p", "name"), hard_cases())
def test_hard_data(metric, p, name):
    kind = resolve_metric(metric, p)
    q, x = hard_sets(kind, 200, 6)[name]
    for k in (1, 12):
        assert_same(knn(q, x, k, metric=metric, p=p), oracle_knn(kind, q, x, k))
    one_feature = knn(q[:, :1], x[:, :1], 9, metric=metric, p=p)
    assert_same(one_feature, oracle_knn(kind, q[:, :1], x[:, :1], 9))


@pytest.mark.parametrize(("metric", "p"), CASES, ids=NAMES)
def test_masks_and_exclusions_equal_the_reference(metric, p):
    kind = resolve_metric(metric, p)
    generator = torch.Generator().manual_seed(0)
    for n in (63, 130):
        q, x = vectors(kind, 3, 5), (vectors(kind, n, 5, seed=1) * 3).round() / 3
        exclude = torch.randint(-1, n, (3, 20), generator=generator)
        few = torch.rand(n, generator=generator) < 0.05
        many = torch.rand(3, n, generator=generator) < 0.7
        many[1] = False
        for mask in (None, few, many, torch.ones(n, dtype=torch.bool)):
            expected = reference_knn(q, x, 12, metric, p, mask=mask, exclude=exclude)
            assert_same(knn(q, x, 12, metric=metric, p=p, mask=mask, exclude=exclude), expected)


def test_exclusions_outside_the_database_are_ignored():
    q, x = torch.zeros(1, 2), torch.eye(2)
    assert knn(q, x, 2, exclude=torch.tensor([[-1, 5, 1]])).ids.tolist() == [[0, -1]]
    assert knn(q, x, 2, exclude=torch.empty(1, 0, dtype=torch.int64)).ids.tolist() == [[0, 1]]


@pytest.mark.parametrize("metric", [m.name for m in METRICS if m.name != "lp"])
def test_the_layout_of_the_inputs_does_not_matter(metric):
    kind = resolve_metric(metric)
    q, x = vectors(kind, 7, 33), vectors(kind, 300, 33, seed=1)
    expected = oracle_knn(kind, q, x, 10)
    wide = torch.stack([x, x * 0.5], 2)
    assert_same(knn(q.T.contiguous().T, x.T.contiguous().T, 10, metric=metric), expected)
    assert_same(knn(q, wide[..., 0], 10, metric=metric), expected)
    assert_same(knn(q, x.flip(0).flip(0), 10, metric=metric), expected)
    repeated = knn(q[:1].expand(4, 33), x[:1].expand(300, 33), 10, metric=metric)
    assert torch.equal(repeated.ids, torch.arange(10).expand(4, 10))
    mask = torch.rand(300, 7, generator=torch.Generator().manual_seed(0)).T > 0.5
    assert_same(knn(q, x, 10, metric=metric, mask=mask), oracle_knn(kind, q, x, 10, mask))


@pytest.mark.parametrize("grad", [False, True])
def test_a_single_query_gives_single_results(grad):
    q, x = torch.rand(5, requires_grad=grad), torch.rand(100, 5)
    scores, ids = knn(q, x, 3)
    assert scores.shape == ids.shape == (3,)
    assert_same((scores[None].detach(), ids[None]), oracle_knn(resolve_metric("l2"), q[None].detach(), x, 3))


@pytest.mark.parametrize(("metric", "p"), CASES, ids=NAMES)
def test_the_workspace_changes_nothing(metric, p):
    kind = resolve_metric(metric, p)
    q, x = vectors(kind, 12, 24), (vectors(kind, 1000, 24, seed=1) * 2).round() / 2
    for k in (10, 700):
        expected = knn(q, x, k, metric=metric, p=p)
        assert_same(knn(q, x, k, metric=metric, p=p, workspace_bytes=MIB), expected)
        assert_same(expected, oracle_knn(kind, q, x, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("metric", ["l2", "ip", "cosine", "l1", "linf", "braycurtis"])
def test_many_tiles_of_clustered_and_repeated_rows(metric, dtype):
    kind = resolve_metric(metric)
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(40, 64, generator=generator)
    x = centres[torch.randint(0, 40, (12_000,), generator=generator)]
    x = x + 0.01 * torch.randn(12_000, 64, generator=generator)
    # Copies of a row lie in different tiles.
    x[6000:] = x[torch.randint(0, 6000, (6000,), generator=generator)]
    q, x = x[:6].to(dtype) + 0.001, x.to(dtype)
    for workspace in (16 * MIB, 256 * MIB):
        assert_same(knn(q, x, 10, metric=metric, workspace_bytes=workspace), oracle_knn(kind, q, x, 10))
    mask = torch.rand(6, 12_000, generator=generator) < 0.01
    assert_same(knn(q, x, 10, metric=metric, mask=mask), oracle_knn(kind, q, x, 10, mask))


@settings(deadline=None, max_examples=40)
@given(
    st.data(),
    st.sampled_from(CASES),
    st.integers(1, 4),
    st.integers(1, 80),
    st.integers(1, 12),
)
def test_near_ties_of_any_kind(data, case, dim, n, k):
    metric, p = case
    kind = resolve_metric(metric, p)
    base = data.draw(
        st.sampled_from([0.0, 0.5, 1.0] if kind.domain[0] == 0.0 else [0.0, 1.0, -3.0, 1e5, 1e-20])
    )
    step = data.draw(st.sampled_from([0.0, 2.0**-24, 2.0**-23, 1e-3]))
    places = data.draw(st.lists(st.integers(-3, 3), min_size=dim * (n + 2), max_size=dim * (n + 2)))
    grid = base * (1.0 + torch.tensor(places, dtype=torch.float64).view(-1, dim) * step)
    grid = grid.clamp(*kind.domain).float()
    q, x = grid[:2], grid[2:].repeat(3, 1)
    assert_same(knn(q, x, k, metric=metric, p=p), oracle_knn(kind, q, x, k))


@pytest.mark.parametrize(("metric", "p"), CASES, ids=NAMES)
@pytest.mark.parametrize("n", [20, 300])
def test_rows_that_hold_nan_come_last(metric, p, n):
    kind = resolve_metric(metric, p)
    q, x = vectors(kind, 3, 4), vectors(kind, n, 4, seed=1)
    bad = torch.tensor([2, 9, 15])
    x[2, 1] = x[9] = x[15, 3] = math.nan
    good = torch.ones(n, dtype=torch.bool).index_fill(0, bad, False)
    scores, ids = knn(q, x, n, metric=metric, p=p)
    expected = oracle_knn(kind, q, x, n - 3, good)
    assert_same((scores[:, :-3], ids[:, :-3]), expected)
    assert scores[:, -3:].isnan().all()
    assert torch.equal(ids[:, -3:], bad.expand(3, 3))
    assert_same(knn(q, x, 5, metric=metric, p=p), (expected[0][:, :5], expected[1][:, :5]))


def test_a_score_of_zero_has_no_sign():
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    for metric in ("l2", "ip", "cosine", "l1", "linf"):
        assert not knn(-x, x, 2, metric=metric).scores[:1].signbit().any()


def test_long_vectors():
    kind = resolve_metric("cosine")
    q, x = vectors(kind, 2, 40_000), vectors(kind, 60, 40_000, seed=1)
    expected = oracle_knn(kind, q, x, 3)
    assert_same(knn(q, x, 3, metric="cosine"), expected)
    assert_same(knn(q[:1], x, 3, metric="cosine"), (expected[0][:1], expected[1][:1]))
