"""Tensors on the CPU that `knn` takes through a GPU, by parts."""

import ctypes

import pytest
import torch
from recording_gpu_faiss import recording_build

from elips_torch import knn
from elips_torch.core.errors import ArgumentError, DeviceError, ImplementationError
from elips_torch.engines.faiss.builds import load_installed
from elips_torch.ops import knn_faiss
from elips_torch.reference.knn import knn as reference


def data(n_rows=300, n_queries=7, dim=24):
    generator = torch.Generator().manual_seed(0)
    queries, database = (torch.rand(n, dim, generator=generator) for n in (n_queries, n_rows))
    mask = torch.rand(n_queries, n_rows, generator=generator) < 0.02
    return queries, database, mask, torch.randint(-1, n_rows, (n_queries, 4), generator=generator)


def stand_in_for_gpus(monkeypatch):
    """Let calls go to a stand-in for faiss's GPU part, which records them and finds rows 0, 1, ..."""
    build = recording_build(monkeypatch)
    record = build.module.bfKnn_tiling

    def find(resources, call, vectors, queries):
        record(resources, call, vectors, queries)
        (ctypes.c_int64 * (call.numQueries * call.k)).from_address(call.outIndices)[:] = [
            *range(call.k)
        ] * call.numQueries

    monkeypatch.setattr(build.module, "bfKnn_tiling", find, raising=False)
    monkeypatch.setattr(knn_faiss, "load_installed", lambda: build)
    return build


@pytest.mark.parametrize(
    ("metric", "dtype"), [("l2", torch.float32), ("ip", torch.float16), ("cosine", None)]
)
def test_tensors_on_the_cpu_go_through_a_gpu_within_the_workspace(monkeypatch, metric, dtype):
    build = stand_in_for_gpus(monkeypatch)
    queries, database, mask, exclude = data()
    queries, database = (each.to(dtype).requires_grad_() for each in (queries, database))
    options = {"implementation": "faiss", "device": "cuda:1", "workspace_bytes": 2**21}
    scores, ids = knn(queries, database, 300, metric=metric, **options)
    call = build.module.products[0][1]
    (_, _, now, vectors, parts) = build.module.products[0]
    assert (vectors, parts) == (2**20, 2**20)
    assert (now["device"], now["stream"], call.device) == (1, "stream of GPU 1", 1)
    assert (call.numVectors, call.numQueries, call.k) == (300, 7, 300)
    kind = 2 if dtype == torch.float16 else 1
    assert (call.vectorType, call.queryType) == (kind, kind)
    if metric != "cosine":
        assert call.vectors == database.data_ptr()
    # All rows were candidates, which are scored and ordered by the definition, with gradients.
    expected = reference(queries, database, 300, metric, None)
    assert torch.equal(ids, expected.ids)
    assert torch.equal(scores, expected.scores)
    scores.sum().backward()
    assert bool(queries.grad.abs().sum() > 0)
    hidden = knn(queries, database, 300, metric=metric, mask=mask, exclude=exclude, **options)
    assert torch.equal(
        hidden.ids, reference(queries, database, 300, metric, None, mask=mask, exclude=exclude).ids
    )


def test_a_gpu_to_go_through_that_means_nothing_is_refused(monkeypatch):
    queries, database, _, _ = data()
    with pytest.raises(ArgumentError, match="device is for implementation='faiss', implementation is 'auto'"):
        knn(queries, database, 3, device="cuda:0")
    for device in ("cpu", "nowhere", 3.5):
        with pytest.raises(DeviceError, match=f"device is {device!r}, expected a GPU"):
            knn(queries, database, 3, implementation="faiss", device=device)
    with pytest.raises(ArgumentError, match="device is for tensors on the CPU, these are on meta"):
        knn(queries.to("meta"), database.to("meta"), 3, implementation="faiss", device="cuda")
    if not torch.cuda.is_available():
        error = DeviceError if load_installed().has_gpu else ImplementationError
        with pytest.raises(error, match=r"there are 0|has no GPU code"):
            knn(queries, database, 3, implementation="faiss", device="cuda:0")
        with pytest.raises(error, match=r"there are 0|has no GPU code"):
            knn(queries, database[:0], 3, implementation="faiss", device="cuda:0")
    stand_in_for_gpus(monkeypatch)
    with pytest.raises(ImplementationError, match="on GPUs, not 'l1'"):
        knn(queries, database, 3, metric="l1", implementation="faiss", device="cuda:0")
    with pytest.raises(DeviceError, match="device is GPU 2, there are 2"):
        knn(queries, database, 3, implementation="faiss", device="cuda:2")
    many = torch.rand(3000, 4)
    with pytest.raises(ImplementationError, match="faiss serves 2048 on a GPU"):
        knn(many[:2], many, 2049, implementation="faiss", device="cuda:0")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_a_gpu_finds_what_the_cpu_finds_by_parts(metric):
    if not load_installed().has_gpu:
        pytest.skip("needs a faiss with GPU code")
    queries, database, _, _ = data(n_rows=40_000, dim=64)
    options = {"metric": metric, "implementation": "faiss"}
    found = knn(queries, database, 10, device="cuda:0", workspace_bytes=2**20, **options)
    assert not found.scores.is_cuda
    assert (found.ids == knn(queries, database, 10, **options).ids).float().mean() > 0.99
