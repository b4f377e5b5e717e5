"""The nearest row is the one that the definition names, whatever the product says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elips_torch.core.metric import resolve_metric
from elips_torch.kernels import nearest_row
from elips_torch.kernels.nearest_row import nearest_rows
from elips_torch.reference.knn import knn

METRICS = ("l2", "ip", "cosine")


def expected(queries, database, metric):
    return knn(queries, database, 1, metric).ids[:, 0]


def found(queries, database, metric, workspace_bytes=2**28):
    return nearest_rows(queries, database, resolve_metric(metric), workspace_bytes)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "k", "dim"), [(1, 1, 1), (300, 7, 3), (90, 64, 17), (30, 400, 5), (0, 4, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_the_reference(metric, n, k, dim, dtype):
    generator = torch.Generator().manual_seed(n + k)
    queries = torch.randn(n, dim, generator=generator).to(dtype)
    database = torch.randn(k, dim, generator=generator).to(dtype)
    if n == 0:
        assert found(queries, database, metric).shape == (0,)
        return
    for workspace in (2**20, 2**28):
        assert torch.equal(found(queries, database, metric, workspace), expected(queries, database, metric))


@pytest.mark.parametrize("metric", METRICS)
def test_equal_rows_give_the_first(metric):
    generator = torch.Generator().manual_seed(0)
    some = torch.randn(40, 6, generator=generator)
    database = torch.cat([some, some, torch.zeros(2, 6)])
    queries = torch.cat([some, torch.zeros(1, 6), torch.randn(50, 6, generator=generator)])
    assert torch.equal(found(queries, database, metric), expected(queries, database, metric))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e18])
def test_values_of_any_size(metric, scale):
    generator = torch.Generator().manual_seed(1)
    database = torch.randn(50, 4, generator=generator) * scale
    queries = torch.randn(60, 4, generator=generator) * scale
    assert torch.equal(found(queries, database, metric), expected(queries, database, metric))


@pytest.mark.parametrize("metric", METRICS)
def test_queries_whose_squares_are_lost(metric):
    generator = torch.Generator().manual_seed(5)
    directions = 1.0 + 0.01 * torch.rand(60, 2, generator=generator)
    queries = torch.cat([directions, (directions + directions.roll(1, 0)) / 2]) * 1e-24
    assert torch.equal(found(queries, directions, metric), expected(queries, directions, metric))


@pytest.mark.parametrize("metric", METRICS)
def test_rows_closer_than_the_product_tells_apart(metric):
    # Far from the origin, neighbours differ by a few units in the last place.
    generator = torch.Generator().manual_seed(2)
    database = 1000 + torch.randint(0, 3, (60, 8), generator=generator) * 2.0**-13
    queries = 1000 + torch.randint(0, 3, (80, 8), generator=generator) * 2.0**-13
    assert torch.equal(found(queries, database, metric), expected(queries, database, metric))


@pytest.mark.parametrize("metric", METRICS)
def test_several_tiles_of_rows(metric, monkeypatch):
    monkeypatch.setattr(nearest_row, "_LARGEST_WIDTH", 16)
    monkeypatch.setattr(nearest_row, "_CELLS", 64)
    generator = torch.Generator().manual_seed(3)
    database = torch.randint(-2, 3, (75, 4), generator=generator).float()
    queries = torch.randint(-2, 3, (90, 4), generator=generator).float()
    assert torch.equal(found(queries, database, metric), expected(queries, database, metric))


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_any_small_integers(data):
    dim, k, n = (data.draw(st.integers(1, top)) for top in (4, 20, 10))
    values = st.integers(-3, 3)
    rows = st.lists(values, min_size=dim, max_size=dim)
    database, queries = (
        torch.tensor(data.draw(st.lists(rows, min_size=size, max_size=size))).float() for size in (k, n)
    )
    for metric in METRICS:
        assert torch.equal(found(queries, database, metric), expected(queries, database, metric))


@pytest.mark.parametrize("outlier", [1.0, 1e5])
def test_most_queries_are_decided_by_the_product(outlier, monkeypatch):
    generator = torch.Generator().manual_seed(4)
    decided = []
    decide = nearest_row._Tables.decide

    def count(self, queries, *rest):
        decided.append(len(queries))
        return decide(self, queries, *rest)

    monkeypatch.setattr(nearest_row._Tables, "decide", count)
    queries = torch.randn(1000, 32, generator=generator)
    database = torch.randn(100, 32, generator=generator)
    # A row far away from all others makes a product no less certain of these.
    queries[7] *= outlier
    database[3] *= outlier
    assert torch.equal(found(queries, database, "l2"), expected(queries, database, "l2"))
    assert sum(decided) < 20
