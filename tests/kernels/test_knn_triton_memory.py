"""Memory of a search in Triton: torch's part of it, with stand-ins for the kernels."""

import importlib.util

import pytest
import torch
from memory_meter import MemoryMeter
from triton_stand_ins import AFTER_SCANS, allocates_only_its_result, groups_of

from elips_torch.core.metric import resolve_metric
from elips_torch.kernels.feature_range import all_in_range, magnitude_sums
from elips_torch.kernels.plane import make_plane
from elips_torch.kernels.selection import Selection
from elips_torch.ops.knn import knn

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
from elips_torch.kernels import group_search_triton, knn_triton

N_ROWS, N_QUERIES, DIM = 4000, 60, 8
WORKSPACE = 2**20


@allocates_only_its_result
def group_max(queries, codes, scales, biases, residuals, norms, q_bias, q_residual, q_norm, *, group, mask):
    bounds = (queries.double() @ codes.double().T) * scales + residuals * q_residual[:, None]
    if biases is not None:
        bounds += biases * q_bias[:, None]
    if mask is not None:
        bounds = torch.where(mask, bounds, -3e38)
    return groups_of(bounds, group, -3e38).amax(2).float()


@allocates_only_its_result
def distance_group_min(queries, database, metric, *, group, mask):
    distances = metric.score(queries[:, None].double(), database.double())
    if mask is not None:
        distances = torch.where(mask, distances, 3e38)
    return groups_of(distances, group, 3e38).amin(2).float()


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch):
    for name, function in {
        "group_max_triton": group_max,
        "distance_group_min_triton": distance_group_min,
    }.items():
        monkeypatch.setattr(knn_triton, name, function)
    for name, function in AFTER_SCANS.items():
        monkeypatch.setattr(group_search_triton, name, function)


def data(name, dim=DIM):
    generator = torch.Generator().manual_seed(0)
    queries = torch.rand(N_QUERIES, dim, generator=generator)
    database = torch.rand(N_ROWS, dim, generator=generator)
    match name:
        case "duplicates":
            database[:] = database[0].clone()
        case "few survive for most queries, many for one":
            database[1000:3000] = database[0].clone()
            queries[7] = database[0]
        case "one large row":
            database[100] *= 1e6
    return queries, database


DATA = ["random", "duplicates", "few survive for most queries, many for one", "one large row"]


def searched(metric, queries, database, k, *, plane=None, mask=None, exclude=None, workspace=WORKSPACE):
    """Search, compare what is certified with eager search, and return the peaks of both steps."""
    excluded = 0 if exclude is None else exclude.shape[1]
    with MemoryMeter() as making:
        search = knn_triton.triton_search(database, metric, plane, k, excluded, workspace)
    with MemoryMeter() as running:
        scores, rows, certified = search.run(queries, k, None, Selection(mask, exclude), workspace)
    options = {"mask": mask, "exclude": exclude, "screen": "none", "implementation": "eager"}
    expected = knn(queries, database, k, metric=metric.name, **options)
    assert torch.equal(rows[certified], expected.ids[certified])
    assert torch.equal(scores[certified], expected.scores[certified])
    kept = 0 if search.plane is None or plane is not None else search.plane.terms.nbytes
    return making.peak, running.peak + kept, certified


@pytest.mark.parametrize("k", [3, 100])
@pytest.mark.parametrize("metric", ["l2", "cosine", "l1", "jensenshannon"])
@pytest.mark.parametrize("name", DATA)
def test_a_search_stays_within_the_workspace(name, metric, k):
    making, running, certified = searched(resolve_metric(metric), *data(name), k)
    assert making <= WORKSPACE
    assert running <= WORKSPACE
    if name == "random" and metric != "jensenshannon":
        assert bool(certified.all())


@pytest.mark.parametrize("metric", ["ip", "braycurtis"])
@pytest.mark.parametrize("name", DATA)
def test_masks_and_exclusions_do_too(name, metric):
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(N_QUERIES, N_ROWS, generator=generator) < 0.8
    exclude = torch.randint(-1, N_ROWS, (N_QUERIES, 20), generator=generator)
    peaks = searched(resolve_metric(metric), *data(name), 10, mask=mask, exclude=exclude)
    assert max(peaks[:2]) <= WORKSPACE


@pytest.mark.parametrize("kind", ["int8", "bf16"])
def test_a_plane_does_too(kind):
    metric = resolve_metric("l2")
    queries, database = data("one large row")
    peaks = searched(metric, queries, database, 10, plane=make_plane(metric, database, kind))
    assert max(peaks[:2]) <= WORKSPACE


@pytest.mark.parametrize("metric", ["l2", "l1", "jensenshannon"])
def test_many_features_do_too(metric):
    queries, database = data("random", dim=1500)
    # Norms are computed in pieces of a fixed size, above the least workspace.
    workspace = 4 * WORKSPACE
    peaks = searched(resolve_metric(metric), queries[:20], database[:200], 10, workspace=workspace)
    assert max(peaks[:2]) <= workspace


@pytest.mark.parametrize("metric", ["ip", "l1"])
def test_a_database_whose_features_are_apart_is_copied_within_the_workspace_or_left_alone(metric):
    kind = resolve_metric(metric)
    queries, database = data("random")
    apart = database.T.contiguous().T
    making, running, certified = searched(kind, queries, apart, 10, workspace=2 * WORKSPACE)
    assert making + running <= 2 * WORKSPACE
    assert bool(certified.all())
    assert knn_triton.triton_search(apart, kind, None, 10, 0, database.nbytes) is None


def test_one_query_for_which_too_much_survives_is_left_to_another_search():
    queries, database = data("random")
    database[100:] = 10.0
    queries[7] = 10.0
    certified = searched(resolve_metric("l2"), queries, database, 3)[2]
    assert not certified[7]
    assert certified.sum() == N_QUERIES - 1


def test_checks_of_a_database_are_made_tile_by_tile():
    database = data("random", dim=300)[1]
    for check in (all_in_range, magnitude_sums):
        with MemoryMeter() as meter:
            check(database, WORKSPACE // 4)
        assert meter.peak <= WORKSPACE // 4 + 8 * N_ROWS
        assert meter.peak < database.nbytes / 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", [0, N_ROWS - 1])
def test_a_value_out_of_range_is_seen_wherever_it_stands(place, dtype):
    database = data("random")[1].to(dtype)
    database[::7] = 0.0
    assert all_in_range(database, WORKSPACE)
    for value in (torch.inf, torch.nan, *((2.0**-101, 2.0**101) if dtype != torch.float16 else ())):
        broken = database.clone()
        broken[place, 2] = -value
        assert not all_in_range(broken, WORKSPACE // 16)


def test_sums_are_those_of_float64():
    database = data("random")[1] - 0.5
    assert torch.equal(magnitude_sums(database, 10_000), database.double().abs().sum(1))
