"""Moving to GPUs with options; without a GPU a stand-in takes the copies and records what was asked for."""

import copy
import pickle
import types
from contextlib import nullcontext

import faiss
import pytest
import torch

from elips_torch import (
    ArgumentError,
    DeviceError,
    DtypeError,
    FaissIndex,
    FlatIndex,
    GpuOptions,
    IVFPQIndex,
    ParameterError,
)
from elips_torch.engines.faiss import search
from elips_torch.indexes import faiss_conversion, faiss_state

DIM = 8
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA GPU")


def data(n=400, seed=0):
    return torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed))


def lists(description="IVF8,Flat"):
    index = FaissIndex.from_factory(DIM, description, nprobe=8).fit(data())
    index.add(data(), ids=torch.arange(400) + 1000)
    return index


@pytest.fixture
def copies(monkeypatch):
    made = []

    def to_gpu(build, index, devices, options):
        made.append((type(index).__name__, tuple(devices), options))
        copied = faiss.clone_index(index)
        if isinstance(copied, faiss.IndexIVF):
            # As one that comes back from a GPU.
            copied.set_direct_map_type(faiss.DirectMap.NoMap)
        return copied

    for module in (faiss_state, faiss_conversion):
        monkeypatch.setattr(module, "to_gpu", to_gpu)
    monkeypatch.setattr(faiss_state, "cuda_device", lambda number: torch.device("cpu"))
    monkeypatch.setattr(faiss_conversion, "check_gpu", lambda build, number: None)
    return made


def test_a_module_moves_with_its_options(copies):
    index = lists()
    wanted = index.search(data(5, seed=1), 3)
    before = index.faiss_index
    assert index.to_gpus([1, 0], shard=True, use_float16=True, indices_options="cpu") is index
    assert copies == [
        ("IndexIVFFlat", (1, 0), GpuOptions(shard=True, use_float16=True, indices_options="cpu"))
    ]
    assert index.faiss_index is not before
    assert torch.equal(index.search(data(5, seed=1), 3).ids, wanted.ids)
    assert torch.equal(index.reconstruct(torch.arange(1000, 1005)), data()[:5])
    for other in (copy.deepcopy(index), pickle.loads(pickle.dumps(index))):
        assert other._gpu_options == index._gpu_options
        assert torch.equal(other.search(data(5, seed=1), 3).ids, wanted.ids)


def test_later_moves_keep_the_options(copies):
    index = lists()
    index.to_gpus([1, 0], shard=True)
    options = GpuOptions(shard=True)
    index._on_device(index.faiss_index, torch.device("cuda", 1))
    index._on_device(index.faiss_index, torch.device("cuda", 3))
    assert [each[1:] for each in copies[1:]] == [((1, 0), options), ((3,), options)]


def test_options_that_there_are_not_change_nothing(copies):
    index = lists()
    before = index.faiss_index
    with pytest.raises(ParameterError, match="no option 'use_fp16'"):
        index.to_gpus([0], use_fp16=True)
    assert index.faiss_index is before
    assert copies == []


@pytest.mark.parametrize("device", ["cuda:1", ["cuda:1", torch.device("cuda", 0)]])
def test_an_index_of_this_library_goes_to_faiss_on_gpus(copies, device):
    index = IVFPQIndex(DIM, 4, 4, nbits=4).fit(data(700))
    index.add(data())
    index.to_faiss(device, precomputed_tables=True, reserve_vectors=9, use_float16_coarse=True)
    ((name, numbers, options),) = copies
    assert name == "IndexIVFPQ"
    assert numbers == ((1,) if device == "cuda:1" else (1, 0))
    assert options == GpuOptions(precomputed_tables=True, reserve_vectors=9, use_float16_coarse=True)
    with pytest.raises(ArgumentError, match="use_float16: options of indexes on GPUs, device is None"):
        index.to_faiss(use_float16=True)
    with pytest.raises(DeviceError, match=r"device is \['cuda:0', 'cpu'\], expected GPUs only"):
        index.to_faiss(["cuda:0", "cpu"])
    with pytest.raises(ParameterError, match="no option 'fast'"):
        index.to_faiss("cuda", fast=True)


def test_tuning_on_gpus_searches_there_and_puts_parameters_back(copies, monkeypatch):
    index = lists()
    index.to_gpus([1, 0])
    vars(index.faiss_index)["lies_on"] = (1, 0)
    index.nprobe = 3
    queries, seen = data(20, seed=1), []

    class Space(faiss.ParameterSpace):
        def explore(self, searched, *arguments):
            seen.append(searched)
            return super().explore(searched, *arguments)

    monkeypatch.setattr(faiss, "GpuParameterSpace", Space, raising=False)
    monkeypatch.setattr(
        search, "device_resources", lambda build, number: types.SimpleNamespace(lock=nullcontext())
    )
    exact = torch.cdist(queries, data()).topk(5, largest=False).indices + 1000
    points = index.explore(queries, exact)
    assert seen == [index.faiss_index]
    assert points[-1].recall > 0.9
    assert index.nprobe == 3


@without_gpu
@pytest.mark.parametrize(
    "device", ["foo", "cuda:x", "", -1, 3.5, True, b"cpu", {}, torch.float32, [], ["foo"], ["cpu"], [[]]]
)
def test_what_is_no_device_is_refused_by_name(device):
    for index in (FaissIndex.from_factory(DIM, "Flat"), FlatIndex(DIM)):
        with pytest.raises(DeviceError, match=r"device is .*, expected (GPUs only|the CPU, a GPU such as)"):
            index.to_faiss(device)


@pytest.mark.parametrize("devices", ["cuda:0", ["cuda:0"], [0.0], [True], b"\0", [[0]], None])
def test_numbers_of_gpus_are_numbers(devices):
    index = FaissIndex.from_factory(DIM, "Flat")
    with pytest.raises(DtypeError, match=r"devices is .*, expected the numbers of GPUs"):
        index.to_gpus(devices)


def test_gpus_that_are_not_there_are_refused():
    index = lists()
    before = index.faiss_index
    with pytest.raises((DeviceError, RuntimeError), match=r"there are 0|no GPU code"):
        index.to_gpus([0])
    assert index.faiss_index is before
    with pytest.raises(DtypeError, match=r"devices is 0, expected the numbers of GPUs, such as \[0\]"):
        index.to_gpus(0)
    assert index.faiss_index is before


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    "options",
    [{}, {"use_float16_coarse": True, "indices_options": "cpu"}, {"memory_space": "unified"}],
    ids=str,
)
def test_on_a_gpu_rows_are_found_removed_and_kept(options):
    index = lists()
    wanted = index.search(data(20, seed=1), 5).ids
    index.to_gpus([0], **options)
    assert index.device.type == "cuda"
    found = index.search(data(20, seed=1).cuda(), 5)
    assert found.ids.is_cuda
    assert (found.ids.cpu() == wanted).float().mean() > 0.98
    # Faiss removes nothing on a GPU.
    assert index.remove(wanted[0]) == 5
    assert not set(index.search(data(20, seed=1)[0].cuda(), 100).ids.tolist()) & set(wanted[0].tolist())
    index.nprobe = 1
    assert index.faiss_index.nprobe == 1
    index.add(data(50, seed=3).cuda())
    assert index.ntotal == 445
    assert index.cpu().ntotal == 445
