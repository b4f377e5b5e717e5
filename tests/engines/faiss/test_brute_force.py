import types

import pytest
import torch
from recording_gpu_faiss import recording_build

from elips_torch import ArgumentError, DeviceError, DtypeError, ImplementationError, MetricError, ShapeError
from elips_torch.engines.faiss.brute_force import (
    SETTINGS,
    FaissSettings,
    apply_settings,
    check_build,
    current_settings,
    knn_faiss,
    knn_faiss_gpu,
)
from elips_torch.engines.faiss.builds import FaissBuild, Path, load_installed
from elips_torch.reference.knn import knn as reference_knn


@pytest.fixture(scope="module")
def build():
    return load_installed()


@pytest.fixture(autouse=True)
def _settings_as_before(build):
    before = current_settings(build)
    yield
    apply_settings(build, before)


def data(n=200, dim=12, n_queries=30):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n_queries, dim, generator=generator), torch.randn(n, dim, generator=generator)


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("k", [1, 7, 200])
def test_the_neighbours_are_those_of_the_reference(build, metric, setting, k):
    queries, database = data()
    apply_settings(build, setting)
    scores, ids = knn_faiss(build, queries, database, k, metric)
    wanted = reference_knn(queries, database, k, metric)
    assert torch.equal(ids, wanted.ids)
    torch.testing.assert_close(scores, wanted.scores, rtol=1e-4, atol=1e-4)


def test_settings_reach_the_build_and_none_leaves_a_value(build):
    before = current_settings(build)
    apply_settings(build, FaissSettings(database_block=77))
    assert current_settings(build) == FaissSettings(before.blas_threshold, 77, before.min_k_reservoir)
    assert str(FaissSettings()) == "defaults"
    assert str(FaissSettings(database_block=77)) == "database_block=77"
    assert None not in (before.blas_threshold, before.database_block, before.min_k_reservoir)


def stand_in(**members):
    return FaissBuild(
        types.SimpleNamespace(METRIC_L2=1, METRIC_INNER_PRODUCT=0, **members),
        {},
        "0",
        "generic",
        "",
        "unknown",
        Path("."),
    )


def test_vectors_and_results_are_not_copied():
    queries, database = data()
    seen, made = [], []

    def knn(q, x, k, metric):
        seen.extend([q.ctypes.data, x.ctypes.data, metric])
        made.extend([torch.zeros(len(q), k).numpy(), torch.zeros(len(q), k, dtype=torch.int64).numpy()])
        return made

    scores, ids = knn_faiss(stand_in(knn=knn), queries, database, 3, "ip")
    assert seen == [queries.data_ptr(), database.data_ptr(), 0]
    assert [scores.data_ptr(), ids.data_ptr()] == [each.ctypes.data for each in made]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"queries": torch.zeros(3, 5)}, ShapeError, "queries has dim 5"),
        ({"queries": torch.zeros(3, 12).half()}, DtypeError, "queries has dtype torch.float16"),
        ({"database": torch.zeros(9, 12).double()}, DtypeError, "database has dtype torch.float64"),
        ({"database": torch.zeros(12, 200).T}, ArgumentError, "database is not contiguous"),
        ({"k": 0}, ArgumentError, "k is 0, expected 1 to 200"),
        ({"k": 201}, ArgumentError, "k is 201, expected 1 to 200"),
        ({"metric": "cosine"}, MetricError, "metric is 'cosine'"),
    ],
)
def test_what_would_need_a_copy_or_is_not_served_is_refused(build, change, error, message):
    queries, database = data()
    arguments = {"queries": queries, "database": database, "k": 3, "metric": "ip"} | change
    with pytest.raises(error, match=message):
        knn_faiss(build, **arguments)


def test_a_build_that_works_passes_the_check_and_one_that_does_not_is_refused(build):
    check_build(build)

    def knn(q, x, k, metric):
        scores, ids = build.module.knn(q, x, k, metric=metric)
        return scores, ids[:, ::-1].copy()

    module = types.SimpleNamespace(METRIC_L2=1, METRIC_INNER_PRODUCT=0, knn=knn)
    broken = FaissBuild(module, {}, "0", "generic", "", "unknown", Path("there"))
    with pytest.raises(ImplementationError, match="in there returns wrong neighbours"):
        check_build(broken)


def test_the_gpu_call_is_made_as_faiss_wants_it(monkeypatch):
    # No driver is called: the stand-in only records, and "meta" tensors only have shapes.
    build = recording_build(monkeypatch)
    queries, database = (each.to("meta") for each in data())
    for metric in ("l2", "ip"):
        scores, ids = knn_faiss_gpu(build, queries, database, 3, metric)
        assert scores.shape == ids.shape == (30, 3)
        assert (scores.device.type, scores.dtype, ids.dtype) == ("meta", torch.float32, torch.int64)
    (resources, first, now), (again, second, _) = build.module.products
    assert [first.metric, second.metric] == [1, 0]
    assert (first.k, first.dims, first.numQueries, first.numVectors, first.device) == (3, 12, 30, 200, 0)
    # The caller's stream, and resources that are dear and made once.
    assert now == {"device": 0, "stream": "stream of GPU 0", "resources": resources}
    assert again is resources
    assert build.module.StandardGpuResources.made == 1


def test_what_lies_on_the_cpu_goes_through_the_gpu_within_the_workspace(monkeypatch):
    build = recording_build(monkeypatch)
    queries, database = (each.half() for each in data())
    scores, ids = knn_faiss_gpu(build, queries, database, 3, "ip", device=1, workspace_bytes=4001)
    ((_, call, now, vectors, parts),) = build.module.products
    assert (vectors, parts) == (2000, 2000)
    assert (now["device"], now["stream"], call.device) == (1, "stream of GPU 1", 1)
    assert (call.vectors, call.queries) == (database.data_ptr(), queries.data_ptr())
    assert (call.outDistances, call.outIndices) == (scores.data_ptr(), ids.data_ptr())
    assert (call.vectorType, call.queryType) == (2, 2)
    knn_faiss_gpu(build, queries, database, 3, device=1)
    assert len(build.module.products[1]) == 3
    with pytest.raises(ArgumentError, match="workspace_bytes is 100, expected at least 120"):
        knn_faiss_gpu(build, queries, database, 3, device=1, workspace_bytes=100)
    with pytest.raises(DeviceError, match="device is GPU 2, there are 2"):
        knn_faiss_gpu(build, queries, database, 3, device=2)
    on_gpu = (each.to("meta") for each in data())
    with pytest.raises(ArgumentError, match="workspace_bytes are for tensors on the CPU"):
        knn_faiss_gpu(build, *on_gpu, 3, workspace_bytes=4000)


def test_a_build_without_gpu_code_and_tensors_on_the_cpu_are_refused():
    queries, database = data()
    with pytest.raises(ImplementationError, match="has no GPU code"):
        knn_faiss_gpu(stand_in(), queries, database, 3)
    with pytest.raises(DeviceError, match="queries are on the CPU"):
        knn_faiss_gpu(stand_in(StandardGpuResources=object), queries, database, 3)
    many = torch.zeros(3000, 12, device="meta")
    with pytest.raises(ArgumentError, match="k is 2049, faiss serves at most 2048"):
        knn_faiss_gpu(stand_in(StandardGpuResources=object), many, many, 2049)


def test_tensors_elsewhere_are_refused_on_the_cpu(build):
    with pytest.raises(DeviceError, match="queries are on meta"):
        knn_faiss(build, *(each.to("meta") for each in data()), 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA GPU")
def test_the_real_build_refuses_a_gpu_that_is_not_there(build):
    if not build.has_gpu:
        pytest.skip("needs a faiss with GPU code")
    with pytest.raises(DeviceError, match="device is GPU 0, there are 0"):
        knn_faiss_gpu(build, *data(), 3, device=0)
    # Asking for one does not change how the build searches on a CPU.
    queries, database = data()
    assert torch.equal(knn_faiss(build, queries, database, 3)[1], reference_knn(queries, database, 3).ids)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("workspace", [None, 4000])
def test_rows_on_the_cpu_are_searched_by_a_gpu(build, metric, dtype, workspace):
    if not build.has_gpu:
        pytest.skip("needs a faiss with GPU code")
    queries, database = (each.to(dtype) for each in data())
    options = {"device": 0, "workspace_bytes": workspace}
    ids = knn_faiss_gpu(build, queries, database, 5, metric, **options)[1]
    wanted = reference_knn(queries, database, 5, metric)
    assert (ids == wanted.ids).float().mean() > 0.99


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_gpu_finds_the_neighbours_of_the_reference(build, metric, dtype):
    if not build.has_gpu:
        pytest.skip("needs a faiss with GPU code")
    queries, database = (each.to(dtype) for each in data())
    scores, ids = knn_faiss_gpu(build, queries.cuda(), database.cuda(), 5, metric)
    wanted = reference_knn(queries, database, 5, metric)
    assert scores.is_cuda
    assert (ids.cpu() == wanted.ids).float().mean() > 0.99
