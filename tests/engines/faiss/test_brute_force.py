import types

import pytest
import torch

from elips_torch import ArgumentError, DeviceError, DtypeError, ImplementationError, MetricError, ShapeError
from elips_torch.engines.faiss import brute_force
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
    calls, resources = [], []

    def knn_gpu(res, xq, xb, k, *, metric, device):
        calls.append((res, tuple(xq.shape), tuple(xb.shape), k, metric, device))
        return xq.new_empty(len(xq), k), xq.new_empty(len(xq), k, dtype=torch.int64)

    def make():
        resources.append(object())
        return resources[-1]

    build = stand_in(StandardGpuResources=make, knn_gpu=knn_gpu)
    imported = []
    monkeypatch.setattr(brute_force.importlib, "import_module", imported.append)
    queries, database = (each.to("meta") for each in data())
    for metric in ("l2", "ip"):
        scores, ids = knn_faiss_gpu(build, queries, database, 3, metric)
        assert scores.shape == ids.shape == (30, 3)
    assert calls == [(resources[0], (30, 12), (200, 12), 3, metric, 0) for metric in (1, 0)]
    # Resources are dear and made once.
    assert len(resources) == 1
    assert set(imported) == {"faiss.contrib.torch_utils"}


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
def test_the_real_build_is_called_as_far_as_the_driver(build):
    if not build.has_gpu:
        pytest.skip("needs a faiss with GPU code")
    with pytest.raises((RuntimeError, AssertionError), match=r"(?i)nvidia|cuda"):
        knn_faiss_gpu(build, *(each.to("meta") for each in data()), 3)
    # Taking tensors on a GPU does not change how the build searches on a CPU.
    queries, database = data()
    assert torch.equal(knn_faiss(build, queries, database, 3)[1], reference_knn(queries, database, 3).ids)


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
