"""Compiled passes give the bits of eager ones, and other sizes do not compile again."""

import pytest
import torch
from torch._dynamo.utils import counters

from elips_torch.core.compilation import compiler_reasons
from elips_torch.core.metric import resolve_metric
from elips_torch.kernels.knn_approximated import ApproximatedSearch
from elips_torch.kernels.knn_complete import CompleteSearch
from elips_torch.kernels.knn_exact import compiled_first, eager_first, knn_exact
from elips_torch.kernels.plane import make_plane
from elips_torch.kernels.screen_passes import COMPILED
from elips_torch.kernels.selection import Selection

pytestmark = [
    pytest.mark.skipif(bool(compiler_reasons("cpu")), reason="; ".join(compiler_reasons("cpu"))),
]
N_ROWS, DIM = 20_000, 64
WORKSPACE = 64 * 2**20


def data(n_rows=N_ROWS, n_queries=257, dim=DIM):
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(50, dim, generator=generator)
    owners = torch.randint(0, 50, (n_rows + n_queries,), generator=generator)
    points = centres[owners] + 0.5 * torch.randn(n_rows + n_queries, dim, generator=generator)
    points[n_rows // 2 : n_rows // 2 + 100] = points[:100]
    return points[n_rows:], points[:n_rows]


def both(metric, queries, database, k, selection=Selection(), kind="int8"):
    plane = make_plane(resolve_metric(metric), database, kind)
    arguments = (queries, database, k, resolve_metric(metric), None, selection, WORKSPACE, plane)
    return knn_exact(*arguments, compiled_first), knn_exact(*arguments, eager_first)


def assert_same(found, expected):
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.fixture
def no_other_search(monkeypatch):
    """Leave the work to the screen: what it does not certify fails."""

    def refuse(*_args):
        raise AssertionError("the screen left queries to another search")

    for search in (ApproximatedSearch, CompleteSearch):
        monkeypatch.setattr(search, "run", refuse)


def selections(n_queries):
    generator = torch.Generator().manual_seed(n_queries)
    exclude = torch.randint(-1, N_ROWS, (n_queries, 3), generator=generator)
    one, own = torch.rand(N_ROWS, generator=generator), torch.rand(n_queries, N_ROWS, generator=generator)
    return {
        "all": Selection(),
        "exclusions": Selection(exclude=exclude),
        "one mask": Selection(one < 0.7),
        "own masks": Selection(own < 0.7),
        "own masks and exclusions": Selection(own < 0.7, exclude),
    }


@pytest.mark.parametrize("name", selections(1))
@pytest.mark.parametrize("n_queries", [257, 3, 2, 1])
def test_compiled_equals_eager(n_queries, name, no_other_search):
    queries, database = data(n_queries=n_queries)
    assert_same(*both("l2", queries, database, 10, selections(n_queries)[name]))


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_compiled_scores_of_many_pairs_are_the_definition(metric, no_other_search, monkeypatch):
    """Enough pairs that their scores are compiled, too."""
    seen = []
    for name in ("l2_pairs", "ip_pairs"):
        compiled = getattr(COMPILED, name)
        run = type(compiled).__call__
        monkeypatch.setattr(
            type(compiled), "__call__", lambda self, *args, run=run: seen.append(self) or run(self, *args)
        )
    queries, database = data()
    found, expected = both(metric, queries, database, 100)
    assert_same(found, expected)
    assert getattr(COMPILED, f"{metric}_pairs") in seen


def test_integers_compile(no_other_search):
    queries, database = data()
    queries, database = (queries * 30).round().clamp(-127, 127), (database * 30).round().clamp(-128, 127)
    for part in (queries[:100], queries[:2]):
        assert_same(*both("l2", part, database, 10))


def test_rows_that_miss_their_scores_by_a_hair():
    """Near ties, offsets and zeros, where a compiled sum in another order might round otherwise."""
    queries, database = data(n_queries=40)
    steps = torch.arange(N_ROWS)[:, None]
    for q, x in (
        (queries, database[:1] + database[1:2] * steps * 2.0**-22),
        (queries + 1e3, database + 1e3),
        (queries * (torch.arange(40)[:, None] % 5 > 0), database * (steps % 3 > 0)),
        (queries, torch.where(steps % 100 == 0, database * 1e5, database)),
    ):
        for metric in ("l2", "cosine"):
            assert_same(*both(metric, q, x, 50))


def test_growth_does_not_compile_again():
    queries, database = data(n_rows=4 * N_ROWS + 1)
    counts = (257, 5, 2, 1)
    # Bounds that one block of products fills have code of their own.
    for n_queries in counts:
        for n_rows in (4 * N_ROWS + 1, 64 * 300):
            both("l2", queries[:n_queries], database[:n_rows], 10)
    before = counters["stats"]["unique_graphs"]
    assert before > 0
    for n_rows in (20_001, 20_008, 25_000, 40_064, 60_003):
        for n_queries in counts:
            assert_same(*both("l2", queries[:n_queries], database[:n_rows], 10))
    assert counters["stats"]["unique_graphs"] == before
