import pytest
import torch

from elips_torch.core.metric import METRICS, resolve_metric
from elips_torch.kernels.rescore_triton import rescore_triton, work_items

KINDS = [
    *[resolve_metric(metric.name) for metric in METRICS if metric.name != "lp"],
    *[resolve_metric("lp", p) for p in (0.5, 1.0, 2.0, 2.5, 40.0)],
]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def vectors(shape, dtype, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def every_pair(n_queries, n_groups):
    return torch.arange(n_queries).repeat(n_groups), torch.arange(n_groups).repeat_interleave(n_queries)


def some_pairs(n_queries, n_groups, share):
    queries, groups = every_pair(n_queries, n_groups)
    keep = torch.rand(len(queries), generator=torch.Generator().manual_seed(3)) < share
    return queries[keep], groups[keep]


def check(queries, database, pairs, group, metric, slots=None):
    found = rescore_triton(queries, database, *pairs, group, metric, rows=slots)
    rows = pairs[1][:, None] * group + torch.arange(group)
    exists = rows < (len(database) if slots is None else len(slots))
    if slots is not None:
        rows = slots[rows.clamp_max(len(slots) - 1)]
        exists &= rows >= 0
    x = database.double()[rows.clamp(0, len(database) - 1)]
    expected = metric.score(queries.double()[pairs[0]][:, None], x)
    assert found.dtype == torch.float64
    assert torch.equal(found.isnan(), ~exists | expected.isnan())
    # The order of float64 additions differs, and the interpreter's powers are not correctly rounded.
    tolerance = 1e-12 if metric.name == "lp" else 4 * database.shape[1] * 2.0**-53
    scale = expected.abs().clamp_min(1.0 if metric.higher_is_better else 0.0)
    error = ((found - expected).abs() - tolerance * scale)[exists]
    floor = 1e-15 if metric.name == "jensenshannon" else 0.0
    assert bool((error[~error.isnan()] <= floor).all())


@pytest.mark.parametrize("metric", KINDS, ids=lambda metric: f"{metric.name}-{metric.p}")
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 63, 7), (3, 127, 48), (17, 40, 100)], ids=str)
def test_scores_are_those_of_the_definition(shape, metric):
    n_queries, n_rows, dim = shape
    queries, database = vectors((n_queries, dim), torch.float32, 0), vectors((n_rows, dim), torch.float32, 1)
    database[::3] = queries[0]
    queries[:, ::5] = 0.0
    database[:, ::5] = 0.0
    check(queries, database, every_pair(n_queries, -(-n_rows // 16)), 16, metric)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("metric", ["l2", "cosine", "jensenshannon"])
def test_every_dtype(metric, dtype):
    queries, database = vectors((5, 33), dtype, 0), vectors((70, 33), dtype, 1)
    check(queries, database, every_pair(5, 5), 16, resolve_metric(metric))


@pytest.mark.parametrize("share", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("group", [1, 4, 32, 128])
def test_every_size_of_group_and_any_choice_of_pairs(group, share):
    queries, database = vectors((9, 10), torch.float32, 0), vectors((150, 10), torch.float32, 1)
    check(queries, database, some_pairs(9, -(-150 // group), share), group, resolve_metric("l2"))


def test_zero_vectors_and_negative_features():
    queries, database = vectors((4, 12), torch.float32, 0) - 0.5, vectors((40, 12), torch.float32, 1) - 0.5
    queries[0] = 0.0
    database[::4] = 0.0
    for metric in KINDS:
        if metric.domain == (-torch.inf, torch.inf):
            check(queries, database, every_pair(4, 3), 16, metric)


def test_large_offsets_do_not_cancel():
    queries, database = vectors((4, 12), torch.float32, 0) + 1e4, vectors((40, 12), torch.float32, 1) + 1e4
    check(queries, database, every_pair(4, 3), 16, resolve_metric("l2"))


def test_the_features_of_rows_may_be_part_of_wider_ones():
    queries, database = vectors((4, 24), torch.float32, 0), vectors((40, 32), torch.float32, 1)
    check(queries[:, :20], database[:, 4:24], every_pair(4, 3), 16, resolve_metric("l1"))


@pytest.mark.parametrize("at_once", [1, 4])
def test_work_covers_every_pair_once(at_once):
    groups = torch.tensor([0, 0, 0, 0, 0, 2, 5, 5, 5, 5, 5, 5, 5, 5, 7])
    items = work_items(groups, 8, at_once)
    covered = []
    for first in items[items < len(groups)].tolist():
        stretch = [p for p in range(first, min(first + at_once, len(groups))) if groups[p] == groups[first]]
        covered += stretch
    assert covered == list(range(len(groups)))
    assert work_items(groups[:0], 8, at_once).shape == (0,)


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("n_slots", [16, 90, 200])
def test_rows_may_lie_in_any_places(n_slots, metric):
    queries, database = vectors((6, 40), torch.float32, 0), vectors((50, 40), torch.float32, 1)
    slots = torch.randint(-1, 50, (n_slots,), generator=torch.Generator().manual_seed(2))
    slots[:16:3] = -1
    check(queries, database, every_pair(6, -(-n_slots // 16)), 16, resolve_metric(metric), slots)
