import pytest
import torch

from elips_torch.core.metric import resolve_metric
from elips_torch.kernels.distance_bounds import distance_error_bound
from elips_torch.kernels.distance_group_min_triton import METRICS, distance_group_min_triton
from elips_torch.kernels.triton_language import HIGHEST_DISTANCE

KINDS = [
    *[resolve_metric(name) for name in METRICS if name != "lp"],
    *[resolve_metric("lp", p) for p in (0.5, 1.0, 2.0, 3.0, 20.0)],
]
DATA = {
    "random": lambda x: x,
    "sparse": lambda x: x * (x > 0.6),
    "alike": lambda x: 1.0 - x * 2.0**-22,
    "all sizes": lambda x: x * torch.logspace(-25, 0, x.shape[1]),
}


def vectors(shape, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def check(queries, database, metric, group, mask=None):
    found = distance_group_min_triton(queries, database, metric, group=group, mask=mask)
    exact = metric.score(queries.double()[:, None], database.double()[None])
    n_queries, n_rows = exact.shape
    shape, missing = (n_queries, -1, group), -n_rows % group
    if mask is not None:
        exact = torch.where(mask, exact, torch.tensor(HIGHEST_DISTANCE).double())
    sums = torch.nn.functional.pad(database.double().abs().sum(1), (0, missing)).view(-1, group).amax(1)
    bound = distance_error_bound(
        metric,
        found,
        queries.shape[1],
        query_sums=queries.double().abs().sum(1, keepdim=True),
        row_sums=sums,
    )
    expected = torch.nn.functional.pad(exact, (0, missing), value=torch.inf).view(shape).amin(2)
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    assert bound.isfinite().all()
    assert bool(((found.double() - expected).abs() <= bound).all())
    return found, bound


@pytest.mark.parametrize("metric", KINDS, ids=lambda metric: f"{metric.name}-{metric.p}")
@pytest.mark.parametrize("data", DATA)
def test_minima_are_within_their_bound(data, metric):
    queries, database = DATA[data](vectors((3, 48), 0)), DATA[data](vectors((127, 48), 1))
    database[::5] = queries[1]
    check(queries, database, metric, 16)


@pytest.mark.parametrize("metric", KINDS, ids=lambda metric: f"{metric.name}-{metric.p}")
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 63, 7), (17, 100, 100)], ids=str)
def test_every_shape(shape, metric):
    n_queries, n_rows, dim = shape
    check(vectors((n_queries, dim), 0), vectors((n_rows, dim), 1), metric, 32)


@pytest.mark.parametrize("metric", KINDS, ids=lambda metric: f"{metric.name}-{metric.p}")
def test_the_bound_says_something(metric):
    found, bound = check(vectors((3, 48), 0), vectors((40, 48), 1), metric, 8)
    assert bool((bound < 1e-2 * found).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_floats_are_taken_as_they_are(dtype):
    check(vectors((3, 20), 0).to(dtype), vectors((50, 20), 1).to(dtype), resolve_metric("canberra"), 8)


@pytest.mark.parametrize("group", [1, 4, 64, 128])
@pytest.mark.parametrize("wide", [False, True], ids=["per row", "per pair"])
def test_a_mask_leaves_rows_out(group, wide):
    mask = torch.rand((9, 150) if wide else (150,), generator=torch.Generator().manual_seed(2)) > 0.7
    mask[..., :64] = False
    queries, database = vectors((9, 10), 0), vectors((150, 10), 1)
    found = distance_group_min_triton(queries, database, resolve_metric("l1"), group=group, mask=mask)
    exact = torch.where(mask, resolve_metric("l1").score(queries.double()[:, None], database.double()), 3e38)
    expected = torch.nn.functional.pad(exact, (0, -150 % group), value=3e38).view(9, -1, group).amin(2)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=0.0)
    assert group > 64 or (found[:, 0] == torch.tensor(HIGHEST_DISTANCE)).all()


def test_negative_features():
    queries, database = vectors((4, 12), 0) - 0.5, vectors((40, 12), 1) - 0.5
    for metric in KINDS:
        if metric.domain == (-torch.inf, torch.inf):
            check(queries, database, metric, 16)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_a_distance_that_overflows_is_not_bounded():
    found = distance_group_min_triton(
        torch.full((1, 4), 1e30), torch.zeros(3, 4), resolve_metric("lp", 3.0), group=2
    )
    assert (found == torch.inf).all()
    assert (distance_error_bound(resolve_metric("lp", 3.0), found, 4) == torch.inf).all()


def test_what_the_kernel_does_not_take_is_refused():
    with pytest.raises(ValueError, match="'l2'"):
        distance_group_min_triton(torch.zeros(1, 2), torch.zeros(1, 2), resolve_metric("l2"), group=2)
    with pytest.raises(ValueError, match="float64"):
        distance_group_min_triton(
            torch.zeros(1, 2), torch.zeros(1, 2).double(), resolve_metric("l1"), group=2
        )
    with pytest.raises(ValueError, match="query_sums"):
        distance_error_bound(resolve_metric("jensenshannon"), torch.zeros(1, 1), 2)
