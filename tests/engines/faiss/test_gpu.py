import contextlib
import dataclasses
import subprocess
import sys
import textwrap
import threading
import types

import faiss
import pytest
import torch
from recording_gpu_faiss import recording_build

from elips_torch.core.errors import ArgumentError, DeviceError, ImplementationError
from elips_torch.engines.faiss import cuvs
from elips_torch.engines.faiss.builds import load_installed
from elips_torch.engines.faiss.cuvs import cuvs_state
from elips_torch.engines.faiss.gpu_options import GpuOptions, cloner_options
from elips_torch.engines.faiss.gpu_resources import device_resources, on_current_stream
from elips_torch.engines.faiss.products import multiply_on_gpu
from elips_torch.engines.faiss.search import search_index
from elips_torch.engines.faiss.transfer import to_cpu, to_gpu

INDEX = types.SimpleNamespace(d=8)


def test_options_reach_the_copy_and_resources_are_made_once_for_a_device(monkeypatch):
    build = recording_build(monkeypatch)
    options = GpuOptions(
        use_float16=True, indices_options="cpu", reserve_vectors=9, temp_memory_bytes=5, pinned_memory_bytes=7
    )
    assert to_gpu(build, INDEX, [1], options).getDevice() == 1
    to_gpu(build, INDEX, [1], dataclasses.replace(options, temp_memory_bytes=6))
    (resources, device, index, made), (again, *_) = build.module.copies
    assert again is resources
    assert (device, index) == (1, INDEX)
    assert resources.calls == [("pinned", 7), ("temp", 5), ("temp", 6)]
    assert (made.useFloat16, made.useFloat16CoarseQuantizer, made.usePrecomputed) == (True, False, False)
    assert (made.indicesOptions, made.reserveVecs, made.use_cuvs) == (0, 9, False)
    with pytest.raises(ArgumentError, match="pinned_memory_bytes is 8, faiss took 7 on GPU 1"):
        to_gpu(build, INDEX, [1], GpuOptions(pinned_memory_bytes=8))


@pytest.mark.parametrize("shard", [True, False])
def test_several_gpus_share_the_vectors_or_repeat_them(monkeypatch, shard):
    build = recording_build(monkeypatch)
    made = to_gpu(build, INDEX, [1, 0], GpuOptions(shard=shard))
    ((resources, gpus, _, options),) = build.module.copies
    assert gpus == [1, 0]
    assert resources == [device_resources(build, number).resources for number in gpus]
    assert options.shard == options.common_ivf_quantizer == shard
    assert made.lies_on == (1, 0)


def test_gpus_that_are_not_there_are_refused(monkeypatch):
    build = recording_build(monkeypatch)
    with pytest.raises(DeviceError, match="device is GPU 2, there are 2"):
        to_gpu(build, INDEX, [0, 2])
    with pytest.raises(ArgumentError, match=r"devices is \[0, 0\]"):
        to_gpu(build, INDEX, [0, 0])
    assert build.module.copies == []
    assert build.module.StandardGpuResources.made == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA GPU")
def test_the_real_build_refuses_a_gpu_that_is_not_there():
    build = load_installed()
    index = faiss.IndexFlatL2(8)
    with pytest.raises((DeviceError, ImplementationError), match=r"there are 0|no GPU code"):
        to_gpu(build, index)
    assert to_cpu(build, index) is index


@pytest.mark.parametrize("several", [False, True])
def test_the_real_build_takes_the_options(several):
    build = load_installed()
    if not build.has_gpu:
        pytest.skip("needs a faiss with GPU code")
    options = GpuOptions(use_float16_coarse=True, precomputed_tables=True, reserve_vectors=3, shard=True)
    made = cloner_options(build, options, several=several)
    assert (made.useFloat16CoarseQuantizer, made.usePrecomputed, made.reserveVecs) == (True, True, 3)
    assert not several or (made.shard and made.common_ivf_quantizer)


@pytest.mark.parametrize(
    "change", [{"indices_options": "8bit"}, {"memory_space": "x"}, {"reserve_vectors": -1}]
)
def test_options_that_mean_nothing_are_refused(change):
    with pytest.raises(ArgumentError, match=next(iter(change))):
        GpuOptions(**change)


def test_products_on_a_gpu_are_asked_for_as_faiss_wants_them(monkeypatch):
    build = recording_build(monkeypatch)
    queries, database = torch.randn(4, 8).bfloat16(), torch.randn(30, 8).bfloat16()
    scores, ids = torch.empty(4, 3), torch.empty(4, 3, dtype=torch.int64)
    multiply_on_gpu(build, 0, queries, database, 0, scores, ids)
    ((resources, call, now),) = build.module.products
    assert now == {"device": 0, "stream": "stream of GPU 0", "resources": resources}
    assert (call.metric, call.k, call.dims, call.device) == (0, 3, 8, 0)
    assert (call.numVectors, call.numQueries, call.vectorType, call.queryType) == (30, 4, 3, 3)
    assert (call.vectors, call.queries) == (database.data_ptr(), queries.data_ptr())
    assert (call.outDistances, call.outIndices) == (scores.data_ptr(), ids.data_ptr())


def test_cuvs_falls_back_or_is_required(monkeypatch):
    assert cuvs_state("off") == cuvs.CuvsState("off", cuvs_state().available, False, "it was switched off")
    build = recording_build(monkeypatch)
    assert cuvs_state("auto", build).reason.endswith("has no code for cuVS")
    with pytest.raises(ImplementationError, match=r"cuVS is required: .* has no code"):
        cuvs_state("require", build)
    with pytest.raises(ArgumentError, match="requested is 'yes'"):
        cuvs_state("yes")
    build.module.should_use_cuvs = lambda config: config.use_cuvs
    build.module.GpuIndexConfig = types.SimpleNamespace
    for has_package in (True, False):
        monkeypatch.setattr(cuvs, "_has_package", lambda found=has_package: found)
        reason = cuvs_state("auto", build).reason
        assert "compiled with GPU, without cuVS" in reason
        assert ("the package cuvs is installed, which faiss does not use" in reason) is has_package
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with_cuvs = dataclasses.replace(build, compile_options="GPU NVIDIA_CUVS CUVS")
    assert cuvs_state("require", with_cuvs).enabled
    assert not cuvs_state("off", with_cuvs).enabled
    assert cuvs_state("off", with_cuvs).available


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_gpu_finds_what_the_cpu_finds_on_any_stream(dtype):
    build = load_installed()
    vectors = torch.randn(5000, 32)
    index = faiss.IndexFlatL2(32)
    index.add(vectors.numpy())
    copy = to_gpu(build, index)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        queries = vectors[:100].cuda().to(dtype)
        _, ids = search_index(build, copy, queries, 5)
        found = ids.cpu()
    assert (found == search_index(build, index, queries.cpu(), 5)[1]).float().mean() > 0.99
    assert to_cpu(build, copy).ntotal == 5000


def test_the_stream_is_set_on_the_device_of_the_index_which_is_not_the_current_one(monkeypatch):
    build = load_installed()
    if not build.has_gpu:
        pytest.skip("needs a faiss with GPU code")
    current, calls = [0], []

    @contextlib.contextmanager
    def device(number):
        before, current[0] = current[0], number
        yield
        current[0] = before

    resources = types.SimpleNamespace(
        getDefaultStream=lambda number: "before",
        setDefaultStream=lambda number, stream: calls.append((number, stream)),
    )
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    streams = {number: types.SimpleNamespace(cuda_stream=64 + number) for number in (0, 1)}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda number=0: streams[number])
    held = types.SimpleNamespace(resources=resources, lock=threading.Lock())
    asked = []
    monkeypatch.setattr(build.module, "cast_integer_to_cudastream_t", lambda n: asked.append(n) or n)
    with on_current_stream(build, 1, held):
        assert calls == [(1, 65)]
        assert held.lock.locked()
    assert calls == [(1, 65), (1, "before")]
    assert asked == [65]
    assert not held.lock.locked()


def test_faiss_is_as_it_was_after_its_code_for_streams_is_used():
    if not load_installed().has_gpu:
        pytest.skip("needs a faiss with GPU code")
    code = """
        import faiss, torch
        from elips_torch.engines.faiss import gpu_resources
        from elips_torch.engines.faiss.builds import load_installed

        def state():
            owners = [faiss, *(each for each in vars(faiss).values() if isinstance(each, type))]
            return [dict(vars(owner)) for owner in owners]

        before = state()
        utils = gpu_resources._torch_utils(load_installed())
        assert callable(utils.using_stream)
        after = state()
        assert all(a.keys() == b.keys() for a, b in zip(before, after, strict=True))
        assert all(a[k] is b[k] for a, b in zip(before, after, strict=True) for k in a)
        index = faiss.IndexFlatL2(4)
        index.add(torch.eye(4).numpy())
        odd = faiss.SearchParameters(sel=faiss.IDSelectorRange(1, 3))
        assert index.search(torch.eye(4).numpy(), 1, params=odd)[1][0, 0] == 1
        # Who imports it has tensors taken, as before.
        import faiss.contrib.torch_utils
        assert index.search(torch.eye(4), 1)[1][:, 0].tolist() == [0, 1, 2, 3]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=300)
