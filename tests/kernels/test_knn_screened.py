"""Screened search: the reference's answers for any data, and that the screen is what finds them."""

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
    make,
    misleading,
)

from elips_torch.core.metric import resolve_metric
from elips_torch.kernels import knn_screened
from elips_torch.kernels.knn_approximated import ApproximatedSearch
from elips_torch.kernels.knn_complete import CompleteSearch
from elips_torch.kernels.knn_exact import knn_exact
from elips_torch.kernels.knn_screened import ScreenedSearch
from elips_torch.kernels.plane import encode, make_plane, mean_of
from elips_torch.kernels.screen import code_queries
from elips_torch.kernels.selection import Selection
from elips_torch.reference import knn as reference

KINDS = ["int8", "bf16"]
FEW = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(autouse=True)
def _small_problems_take_every_step(monkeypatch):
    monkeypatch.setattr("elips_torch.kernels.exact_tile._FEW_FEATURES", 0)


@pytest.fixture
def certified(monkeypatch):
    """List, per search that ran, its class and how many queries it certified."""
    seen = []
    for search in (ScreenedSearch, ApproximatedSearch, CompleteSearch):
        run = search.run

        def spy(self, *args, run=run):
            result = run(self, *args)
            seen.append((type(self), int(result[2].sum())))
            return result

        monkeypatch.setattr(search, "run", spy)
    return seen


def search(metric, kind, queries, database, k, ranks=None, selection=Selection(), workspace=WORKSPACE):
    plane = make_plane(resolve_metric(metric), database, kind)
    assert plane is not None
    return knn_exact(queries, database, k, resolve_metric(metric), ranks, selection, workspace, plane)


@pytest.mark.parametrize("metric", METRICS)
def test_the_comparison_is_with_the_reference(metric):
    generator = torch.Generator().manual_seed(0)
    q, x = make("few integers", *torch.randn(2, 60, 4, generator=generator), generator)
    q, ids, mask = (
        q[:2],
        torch.randperm(60, generator=generator),
        torch.rand(2, 60, generator=generator) < 0.2,
    )
    exclude = mask.long().argmax(1, keepdim=True)
    expected = reference.knn(q, x, 20, metric, ids=ids, mask=mask, exclude=ids[exclude])
    rows = torch.where(expected.ids < 0, -1, ids.argsort()[expected.ids])
    assert bool((rows == -1).any())
    assert_reference(metric, (expected.scores, rows), q, x, 20, ids, mask, exclude)


@pytest.mark.parametrize("name", NAMES)
@FEW
@given(data=st.data())
def test_answers_are_those_of_the_reference(name, data):
    metric, kind = data.draw(st.sampled_from(METRICS)), data.draw(st.sampled_from(KINDS))
    q, x, k, ids, mask, exclude = drawn_case(name, data)
    ranks = None if ids is None else ids.argsort().argsort()
    found = search(metric, kind, q, x, k, ranks, Selection(mask, exclude))
    assert_reference(metric, found, q, x, k, ids, mask, exclude)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [1025, 2500])
def test_many_features(dim, metric, kind):
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(30, dim, generator=generator)
    x = centres.repeat(20, 1) + torch.randn(600, dim, generator=generator) * 0.1
    x[300:310] = x[:10]
    q = x[:3] + torch.randn(3, dim, generator=generator) * 0.01
    assert_reference(metric, search(metric, kind, q, x, 5), q, x, 5)


@pytest.mark.parametrize("k", [599, 600, 601, 900])
def test_k_near_the_number_of_rows(k):
    generator = torch.Generator().manual_seed(0)
    q, x = torch.randn(2, 8, generator=generator), torch.randn(600, 8, generator=generator)
    for metric in METRICS:
        assert_reference(metric, search(metric, "int8", q, x, k), q, x, k)


@pytest.mark.parametrize("metric", METRICS)
def test_queries_that_are_not_finite_leave_the_others_right(metric):
    generator = torch.Generator().manual_seed(0)
    q, x = torch.randn(6, 16, generator=generator), torch.randn(900, 16, generator=generator)
    bad = q.clone()
    bad[0, 0], bad[2, 3], bad[4] = torch.nan, torch.inf, 1e30
    scores, rows = search(metric, "int8", bad, x, 3)
    good = [1, 3, 5]
    assert_reference(metric, (scores[good], rows[good]), q[good], x, 3)
    assert_reference(metric, (scores[4:5], rows[4:5]), bad[4:5], x, 3)


# That the tests above can fail.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
def test_without_the_bounds_the_answer_is_wrong(metric, kind, monkeypatch, certified):
    def careless(*args):
        coded = code_queries(*args)
        coded.terms[1:].zero_()
        coded.slack.zero_()
        return coded

    q, x = misleading(metric)
    expected = knn_exact(q, x, 5, resolve_metric(metric), None, Selection(), WORKSPACE)
    found = search(metric, kind, q, x, 5)
    assert torch.equal(found[1], expected[1])
    certified.clear()
    monkeypatch.setattr(knn_screened, "code_queries", careless)
    found = search(metric, kind, q, x, 5)
    assert certified[0] == (ScreenedSearch, 20)
    assert not torch.equal(found[1], expected[1])


@pytest.mark.parametrize("term", [1, 2], ids=["residual", "norm"])
@pytest.mark.parametrize("metric", METRICS)
def test_no_part_of_the_bounds_can_be_left_out(metric, term, monkeypatch):
    def careless(*args):
        coded = code_queries(*args)
        coded.terms[term].zero_()
        return coded

    generator = torch.Generator().manual_seed(0)
    q = torch.randn(20, 32, generator=generator)
    x = torch.randn(2048, 32, generator=generator)
    integers = torch.randint(-126, 127, (2048, 32), generator=generator).float()
    integers[:, 1] = 127.0
    if term == 1:
        # The codes of queries are exact, those of rows are coarse.
        x[:, 0], q = 300.0, integers[:20] * (torch.arange(32) > 0)
    else:
        x, q[:, 0] = integers * (torch.arange(32) > 0), 300.0
    x = torch.cat([x, -x])
    assert float(mean_of(resolve_metric(metric), x).abs().max()) < 1e-6
    expected = knn_exact(q, x, 5, resolve_metric(metric), None, Selection(), WORKSPACE)
    assert torch.equal(search(metric, "int8", q, x, 5)[1], expected[1])
    monkeypatch.setattr(knn_screened, "code_queries", careless)
    assert not torch.equal(search(metric, "int8", q, x, 5)[1], expected[1])


def test_without_room_for_ties_the_answer_is_wrong(monkeypatch, certified):
    """Far from the origin, scores differ by less than float32 can tell: the lower id wins."""
    generator = torch.Generator().manual_seed(0)
    ip = resolve_metric("ip")
    x = 2.0**20 + torch.randint(-8, 9, (4096, 16), generator=generator) / 8
    x[torch.randperm(4096, generator=generator)[100:]] -= 2.0**12
    q = torch.rand(100, 16, generator=generator)
    expected = knn_exact(q, x, 40, ip, None, Selection(), WORKSPACE)
    plane = encode(ip, x, torch.full((16,), 2.0**20), "int8")
    arguments = (q, x, 40, ip, None, Selection(), 2 * WORKSPACE, plane)
    certified.clear()
    assert torch.equal(knn_exact(*arguments)[1], expected[1])
    assert certified[0][1] > 0
    monkeypatch.setattr(knn_screened, "threshold", lambda rounding, lowest: lowest)
    assert not torch.equal(knn_exact(*arguments)[1], expected[1])


def test_one_feature():
    generator = torch.Generator().manual_seed(0)
    q, x = torch.randn(3, 1, generator=generator), torch.randn(4096, 1, generator=generator)
    assert_reference("l2", search("l2", "int8", q, x, 5), q, x, 5)


# That the screen does the work on ordinary data, and gives up on hard data.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
def test_ordinary_data_is_certified_and_few_rows_survive(metric, kind, certified, monkeypatch):
    survivors = []
    screen = ScreenedSearch._screen

    def spy(self, *args):
        found = screen(self, *args)
        survivors.append(found.owners.numel())
        return found

    monkeypatch.setattr(ScreenedSearch, "_screen", spy)
    q, x = clustered(20_000, 64, 100, torch.Generator().manual_seed(0))
    found = search(metric, kind, q, x, 10)
    assert certified == [(ScreenedSearch, 100)]
    assert sum(survivors) / 100 < (60 if kind == "int8" else 20)
    expected = knn_exact(q, x, 10, resolve_metric(metric), None, Selection(), WORKSPACE)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("name", ["duplicates", "one large row", "noise"])
@pytest.mark.parametrize("metric", METRICS)
def test_hard_data_moves_on_and_is_right(metric, name, certified):
    q, x = hard(name)
    found = search(metric, "int8", q, x, 10)
    assert certified[0][0] is ScreenedSearch
    if not (metric == "cosine" and name == "one large row"):
        assert certified[0][1] < 20
        assert len(certified) > 1
    expected = knn_exact(q.double(), x.double(), 10, resolve_metric(metric), None, Selection(), WORKSPACE)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("k", [10, 100])
def test_any_split_of_the_queries_gives_the_same_bits(k):
    q, x = clustered(30_000, 32, 600, torch.Generator().manual_seed(0))
    x[10_000:10_300] = x[:300]
    whole = search("l2", "int8", q, x, k)
    again = search("l2", "int8", q, x, k)
    assert torch.equal(whole[0], again[0])
    assert torch.equal(whole[1], again[1])
    for size in (1, 3, 100, 257):
        parts = q.split(size) if size > 3 else q[:60].split(size)
        scores, rows = (
            torch.cat(each)
            for each in zip(*(search("l2", "int8", part, x, k) for part in parts), strict=True)
        )
        assert torch.equal(scores, whole[0][: len(scores)])
        assert torch.equal(rows, whole[1][: len(rows)])


@pytest.mark.parametrize("workspace", [2**20, 2**21, 2**23])
def test_a_small_workspace_gives_the_same_bits(workspace, certified):
    q, x = clustered(30_000, 32, 100, torch.Generator().manual_seed(0))
    whole = search("l2", "int8", q, x, 10)
    found = search("l2", "int8", q, x, 10, workspace=workspace)
    assert torch.equal(found[0], whole[0])
    assert torch.equal(found[1], whole[1])
