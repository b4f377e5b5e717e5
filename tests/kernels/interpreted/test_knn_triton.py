import pytest
import torch

from elips_torch.core.metric import METRICS, resolve_metric
from elips_torch.kernels import knn_triton
from elips_torch.kernels.knn_triton import triton_search
from elips_torch.kernels.plane import make_plane
from elips_torch.kernels.selection import Selection
from elips_torch.reference.knn import knn

WORKSPACE = 2**26
KINDS = [resolve_metric(m.name, 3.0 if m.name == "lp" else None) for m in METRICS]
PRODUCTS = [metric for metric in KINDS if metric.form == "product"]


def data(name, n_rows=500, n_queries=5, dim=20):
    generator = torch.Generator().manual_seed(0)
    queries = torch.rand(n_queries, dim, generator=generator)
    database = torch.rand(n_rows, dim, generator=generator)
    if name == "ties":
        database = database[torch.randint(0, 40, (n_rows,), generator=generator)]
        queries[0] = database[3]
    if name == "zeros":
        database[::3] = 0.0
        queries[1] = 0.0
    if name == "norms":
        database *= 10.0 ** torch.linspace(-3, 3, n_rows)[:, None]
    return queries, database


def check(metric, queries, database, k, *, plane=None, ranks=None, mask=None, exclude=None, some=False):
    excluded = 0 if exclude is None else exclude.shape[1]
    search = triton_search(database, metric, plane, k + excluded, WORKSPACE)
    assert search is not None
    found = search.run(queries, k, ranks, Selection(mask, exclude), WORKSPACE)
    certified = found[2]
    assert bool(certified.any() if some else certified.all())
    p = metric.p if metric.name == "lp" else None
    expected = knn(queries, database, k, metric.name, p, ids=ranks, mask=mask, exclude=exclude)
    ids = found[1] if ranks is None else torch.where(found[1] < 0, -1, ranks[found[1]])
    assert torch.equal(found[0][certified], expected.scores[certified])
    assert torch.equal(ids[certified], expected.ids[certified])


@pytest.mark.parametrize("metric", KINDS, ids=lambda metric: metric.name)
def test_every_metric(metric):
    check(metric, *data("random", n_rows=300), 7)


@pytest.mark.parametrize("name", ["zeros", "norms"])
@pytest.mark.parametrize("metric", ["l2", "ip", "canberra"])
def test_hard_data(metric, name):
    check(resolve_metric(metric), *data(name, n_rows=300), 7, some=True)


@pytest.mark.parametrize("kind", ["int8", "bf16", None])
@pytest.mark.parametrize("metric", PRODUCTS, ids=lambda metric: metric.name)
@pytest.mark.parametrize("name", ["random", "ties"])
def test_planes(metric, kind, name):
    queries, database = data(name, n_rows=400)
    plane = None if kind is None else make_plane(metric, database, kind)
    check(metric, queries, database, 12, plane=plane, some=name != "random")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metric", PRODUCTS, ids=lambda metric: metric.name)
def test_half_databases(metric, dtype):
    queries, database = data("random")
    check(metric, queries, database.to(dtype), 5)


@pytest.mark.parametrize("metric", [PRODUCTS[0], KINDS[3]], ids=lambda metric: metric.name)
def test_masks_exclusions_and_ranks(metric):
    queries, database = data("random")
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(5, 500, generator=generator) < 0.3
    exclude = torch.randint(-1, 500, (5, 3), generator=generator)
    ranks = torch.randperm(500, generator=generator)
    check(metric, queries, database, 6, mask=mask)
    check(metric, queries, database, 6, mask=mask[0], ranks=ranks)
    check(metric, queries, database, 6, exclude=exclude)
    # Fewer rows than asked for.
    few = torch.zeros(500, dtype=torch.bool)
    few[[3, 99, 400]] = True
    check(metric, queries, database, 6, mask=few, exclude=exclude)


def test_one_and_two_queries_and_more_than_groups():
    metric = PRODUCTS[0]
    for n_queries in (1, 2):
        queries, database = data("random", n_queries=n_queries)
        check(metric, queries, database, 4)
    check(metric, *data("random", n_rows=70), 60)


def test_what_survives_in_masses_is_left_to_another_search(monkeypatch):
    monkeypatch.setattr(knn_triton, "_MOST_GROUPS", 4)
    monkeypatch.setattr(knn_triton, "_GROUPS_PER_NEIGHBOUR", 0)
    queries, database = data("random")
    database[:] = database[:1]
    search = triton_search(database, PRODUCTS[0], None, 3, WORKSPACE)
    assert not search.run(queries, 3, None, Selection(), WORKSPACE)[2].any()


def test_a_small_workspace_splits_the_queries():
    queries, database = data("random", n_queries=9)
    whole = triton_search(database, PRODUCTS[0], None, 4, WORKSPACE)
    parts = triton_search(database, PRODUCTS[0], None, 4, 32 * 500 + 3 * (12 * 16 + 32 * 32 * 16))
    assert parts.step < 9 <= whole.step
    first, second = (each.run(queries, 4, None, Selection(), WORKSPACE) for each in (whole, parts))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_cancellation_does_not_break_ties():
    """Sums in another order differ by more than the scores do."""
    generator = torch.Generator().manual_seed(0)
    database = torch.zeros(1024, 64)
    database[:, 0] = -1.0
    for row in range(0, 1024, 8):
        places = torch.randperm(64, generator=generator)[:4]
        database[row] = 0.0
        database[row, places] = torch.tensor([2.0**30, -(2.0**30), 2.0**-30, -(2.0**-30)])
    check(resolve_metric("ip"), torch.ones(2, 64), database, 5, some=True)
