import pytest
import torch

from elips_torch import METRICS, knn
from elips_torch.core.metric import resolve_metric
from elips_torch.kernels import knn_approximated
from elips_torch.kernels.approximate import (
    approximate_scores,
    error_bound,
    has_approximation,
    prepare_queries,
    query_offset,
    row_norms,
)
from elips_torch.kernels.knn_approximated import ApproximatedSearch
from elips_torch.kernels.knn_complete import CompleteSearch

SCREENED = [m.name for m in METRICS if m.form != "elementwise"]
# Each hides differences that decide below the rounding of float32.
HARD = {
    "random": lambda q, x: (q, x),
    "offset": lambda q, x: (q + 1e4, x + 1e4),
    "one large row": lambda q, x: (q, torch.cat([x[:-1], x[-1:] * 1e6])),
    "norms of all sizes": lambda q, x: (q, x * torch.logspace(-18, 18, len(x))[:, None]),
    "tiny": lambda q, x: (q * 1e-30, x * 1e-30),
    "huge": lambda q, x: (q * 3e38, x * 3e38),
    "opposite": lambda q, x: (q, -q[:1] * (1.0 + torch.arange(len(x))[:, None] * 2.0**-23)),
}


@pytest.fixture(autouse=True)
def _small_problems_take_every_step(monkeypatch):
    monkeypatch.setattr("elips_torch.kernels.exact_tile._FEW_FEATURES", 0)


def data(name, n=400, dim=32):
    generator = torch.Generator().manual_seed(0)
    q, x = torch.rand(6, dim, generator=generator) * 2 - 1, torch.rand(n, dim, generator=generator) * 2 - 1
    return HARD[name](q, x)


def cases(dtype):
    for name in SCREENED:
        for p in (1.0, 1.5, 2.0, 3.0, 40.0) if name == "lp" else (None,):
            if has_approximation(resolve_metric(name, p), dtype):
                yield name, p


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", HARD)
def test_the_bound_holds(name, dtype):
    queries, database = data(name)
    for metric, p in cases(dtype):
        kind = resolve_metric(metric, p)
        prepared, query_norms = prepare_queries(kind, queries, dtype)
        rows = database.to(dtype)
        norms = row_norms(kind, rows)
        approximate = approximate_scores(kind, prepared, rows, norms)
        bound = error_bound(kind, approximate, query_norms, norms, queries.shape[1], dtype)
        exact = kind.score(queries[:, None].double(), database[None].double())
        error = (approximate.double() + query_offset(kind, query_norms) - exact).abs()
        # Where nothing is known the bound or the difference is infinite or NaN.
        known = bound.isfinite() & error.isfinite()
        assert bool((error <= bound.expand_as(error))[known].all()), (metric, p)
        if name in ("random", "offset"):
            assert known.all(), (metric, p)


def answers(metric, name, k=8):
    queries, database = data(name)
    return knn(queries, database, k, metric=metric, implementation="eager"), knn(
        queries.double(), database.double(), len(database), metric=metric
    )


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_with_a_bound_that_certifies_anything_the_answer_is_wrong(metric, monkeypatch):
    """The tests of exactness can fail: they rest on the bound."""

    def certify_all(metric, scores, query_norms, norms, dim, dtype):
        return torch.full_like(query_norms, -torch.inf)

    found, complete = answers(metric, "offset")
    assert torch.equal(found.ids, complete.ids[:, :8])
    monkeypatch.setattr(knn_approximated, "error_bound", certify_all)
    found, complete = answers(metric, "offset")
    assert not torch.equal(found.ids, complete.ids[:, :8])


def precisions_used(monkeypatch, queries, database, k, **options):
    used = []
    for search in (ApproximatedSearch, CompleteSearch):
        run = search.run

        def spy(self, *args, run=run):
            used.append(getattr(self, "dtype", "complete"))
            return run(self, *args)

        monkeypatch.setattr(search, "run", spy)
    knn(queries, database, k, implementation="eager", **options)
    return used


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine", "l1", "linf", "braycurtis", "gower"])
def test_ordinary_data_is_certified_in_float32(metric, monkeypatch):
    queries, database = data("random")
    used = precisions_used(monkeypatch, queries.abs(), database.abs(), 5, metric=metric)
    assert used == [torch.float32]


def test_hard_data_moves_on_until_it_is_certified(monkeypatch):
    queries, database = data("offset")
    used = precisions_used(monkeypatch, queries, database, 5)
    assert used == [torch.float32, torch.float64]


def test_duplicates_are_settled_by_a_complete_search(monkeypatch):
    queries, database = data("random")
    used = precisions_used(monkeypatch, queries, database[:1].expand(400, -1), 5)
    assert used == [torch.float32, torch.float64, "complete"]


def test_a_reduced_float32_product_is_not_used_to_screen(monkeypatch):
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        assert precisions_used(monkeypatch, *data("random"), 5) == [torch.float64]
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
