import pytest
import torch

from elips_torch.core.metric import METRICS, resolve_metric
from elips_torch.kernels import group_search_triton, knn_exact
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


def search_of(database, metric, plane, k, exclude=None, workspace=WORKSPACE):
    excluded = 0 if exclude is None else exclude.shape[1]
    return triton_search(database, metric, plane, k, excluded, workspace)


def check(metric, queries, database, k, *, plane=None, ranks=None, mask=None, exclude=None, some=False):
    search = search_of(database, metric, plane, k, exclude)
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


def selections(n_queries, n_rows):
    """Return a mask for all, masks of each query, one that leaves three rows, and exclusions."""
    generator = torch.Generator().manual_seed(1)
    masks = torch.rand(n_queries, n_rows, generator=generator) < 0.3
    few = torch.zeros(n_rows, dtype=torch.bool)
    few[[3, n_rows // 2, n_rows - 1]] = True
    exclude = torch.randint(-1, n_rows, (n_queries, 3), generator=generator)
    return masks[0], masks, few, exclude


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine", "l1", "jensenshannon"])
def test_masks_exclusions_and_ranks(metric):
    kind = resolve_metric(metric)
    queries, database = data("random", n_rows=200, n_queries=3)
    row_mask, masks, few, exclude = selections(3, 200)
    ranks = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    # The nearest rows are the ones to leave out.
    nearest = knn(queries, database, 2, metric).ids
    check(kind, queries, database, 4, mask=row_mask, ranks=ranks)
    check(kind, queries, database, 4, mask=masks, exclude=torch.cat([exclude, nearest], 1))
    # Fewer rows than asked for.
    check(kind, queries, database, 4, mask=few, exclude=exclude)
    # None at all.
    check(kind, queries, database, 4, mask=torch.zeros(3, 200, dtype=torch.bool))


@pytest.mark.parametrize("storage", ["int8 plane", "bfloat16", "float16"])
@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_masks_and_exclusions_of_every_storage(metric, storage):
    kind = resolve_metric(metric)
    queries, database = data("random", n_rows=200, n_queries=3)
    row_mask, masks, _, exclude = selections(3, 200)
    plane = make_plane(kind, database, "int8") if storage == "int8 plane" else None
    database = database if plane is not None else database.to(getattr(torch, storage))
    check(kind, queries, database, 4, plane=plane, mask=masks, exclude=exclude)
    check(kind, queries, database, 4, plane=plane, mask=row_mask)


@pytest.mark.parametrize("metric", ["l1", "canberra"])
def test_half_databases_of_distances(metric):
    queries, database = data("random", n_rows=200, n_queries=3)
    _, masks, _, exclude = selections(3, 200)
    # Queries that the database's dtype cannot hold are left to another search.
    check(resolve_metric(metric), queries.half().float(), database.half(), 4, mask=masks, exclude=exclude)


@pytest.mark.parametrize("metric", ["ip", "l1"])
def test_more_neighbours_than_rows_through_the_whole_chain(metric, monkeypatch):
    monkeypatch.setattr(knn_exact, "is_small", lambda queries, database: False)
    monkeypatch.setattr(knn_exact, "CompleteSearch", NothingElse)
    kind = resolve_metric(metric)
    queries, database = data("random", n_rows=70, n_queries=3)
    _, masks, _, exclude = selections(3, 70)
    chosen = Selection(masks, exclude)
    scores, ids = knn_exact.knn_exact(
        queries, database, 90, kind, None, chosen, WORKSPACE, None, triton_search
    )
    expected = knn(queries, database, 90, metric, mask=masks, exclude=exclude)
    assert torch.equal(ids, expected.ids)
    assert torch.equal(scores, expected.scores)
    assert bool((ids[:, 70:] == -1).all())


class NothingElse:
    """Stands at the end of the chain and must not be reached."""

    def __init__(self, *args):
        pass

    def queries_at_once(self, k, workspace_bytes):
        raise AssertionError("a query was left to another search")


@pytest.mark.parametrize("metric", ["l2", "l1"])
def test_features_may_be_apart(metric):
    queries, database = data("random", n_rows=200, n_queries=3)
    check(resolve_metric(metric), queries, database.T.contiguous().T, 4)
    check(resolve_metric(metric), queries.T.contiguous().T, database, 4)


def test_one_and_two_queries_and_more_than_groups():
    metric = PRODUCTS[0]
    for n_queries in (1, 2):
        queries, database = data("random", n_queries=n_queries)
        check(metric, queries, database, 4)
    check(metric, *data("random", n_rows=70), 60)


def test_what_survives_in_masses_is_left_to_another_search(monkeypatch):
    monkeypatch.setattr(group_search_triton, "_MOST_GROUPS", 4)
    monkeypatch.setattr(group_search_triton, "_GROUPS_PER_NEIGHBOUR", 0)
    queries, database = data("random")
    database[:] = database[:1]
    search = search_of(database, PRODUCTS[0], None, 3)
    assert not search.run(queries, 3, None, Selection(), WORKSPACE)[2].any()


def test_a_small_workspace_splits_the_queries():
    queries, database = data("random", n_queries=9)
    whole = search_of(database, PRODUCTS[0], None, 4)
    parts = search_of(database, PRODUCTS[0], None, 4, workspace=60_000)
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
