"""Where calls of faiss run: on the caller's stream, under the lock of resources, or with one thread."""

import threading
import types

import faiss
import pytest
import torch
from recording_gpu_faiss import GpuIndex, recording_build

from elips_torch.core.metric import resolve_metric
from elips_torch.engines.faiss import brute_force, candidates, construct, forked, index_files, opaque, search
from elips_torch.engines.faiss.builds import load_installed
from elips_torch.engines.faiss.descriptions import FlatDescription
from elips_torch.engines.faiss.gpu_options import GpuOptions
from elips_torch.engines.faiss.gpu_resources import device_resources
from elips_torch.engines.faiss.inverted_file import FaissInvertedFile
from elips_torch.engines.faiss.row_search import RowSearch
from elips_torch.engines.faiss.search import placed, search_index
from elips_torch.engines.faiss.search_parameters import parameter_holders, search_parameters
from elips_torch.engines.faiss.stats import SearchCounter
from elips_torch.engines.faiss.transfer import to_gpu
from elips_torch.engines.faiss.tuning import explore, parameter_space
from elips_torch.kernels.selection import Selection

DIM = 8


@pytest.fixture(scope="module")
def vectors():
    return torch.randn(400, DIM, generator=torch.Generator().manual_seed(0))


def flat(vectors):
    index = faiss.IndexFlatL2(DIM)
    index.add(vectors.numpy())
    return index


def file_of(vectors, folder):
    path = folder / "flat.faiss"
    faiss.write_index(flat(vectors), str(path))
    return path


def lists(build, vectors):
    file = FaissInvertedFile(build, DIM, 4, "l2", niter=2)
    file.train(vectors)
    file.add(vectors)
    return file


CALLS = {
    "knn": lambda b, x, _: brute_force.knn_faiss(b, x, x, 3),
    "candidates": lambda b, x, _: candidates.brute_force(b, x, x, 3, resolve_metric("l2")),
    "search": lambda b, x, _: search_index(b, flat(x), x, 3),
    "range search": lambda b, x, _: search.range_search_index(b, flat(x), x, 1.0),
    "train": lambda b, x, _: opaque.train(b, faiss.index_factory(DIM, "SQ8"), x),
    "add": lambda b, x, _: opaque.append(b, flat(x), x),
    "reconstruct": lambda b, x, _: opaque.reconstruct(b, flat(x), torch.arange(3)),
    "read bytes": lambda b, x, _: opaque.from_bytes(b, opaque.to_bytes(b, flat(x))),
    "read a file": lambda b, x, folder: index_files.read_index(b, file_of(x, folder)),
    "construct": lambda b, x, _: construct.construct(b, FlatDescription("l2", None, x)),
    "lists": lambda b, x, _: lists(b, x).search(x, 3, 2),
    "tune": lambda b, x, _: explore(b, flat(x), x, torch.arange(400)[:, None], 1),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_call_runs_one_thread_in_a_forked_process(monkeypatch, vectors, tmp_path, name):
    build, told = load_installed(), []
    monkeypatch.setattr(forked, "was_forked", lambda: True)
    monkeypatch.setattr(forked, "set_threads", lambda build, threads: told.append(threads))
    monkeypatch.setattr(forked, "_told", threading.local())
    CALLS[name](build, vectors, tmp_path)
    assert told == [1]


def test_training_adding_and_asking_on_a_gpu_use_its_stream_and_its_memory(monkeypatch):
    build = recording_build(monkeypatch)
    index = GpuIndex(build.module, DIM, 1)
    rows = torch.randn(5, DIM)
    opaque.train(build, index, rows)
    assert opaque.append(build, index, rows).tolist() == list(range(5))
    opaque.append(build, index, rows.half())
    opaque.reconstruct(build, index, torch.arange(2))
    assert [call["name"] for call in index.calls] == ["train", "add", "add", "reconstruct"]
    for call in index.calls:
        assert (call["device"], call["stream"]) == (1, "stream of GPU 1")
    # No copy of what is as faiss reads it.
    assert [call["x"] == rows.data_ptr() for call in index.calls[:3]] == [True, True, False]


@pytest.mark.parametrize("shard", [True, False])
def test_an_index_over_several_gpus_takes_tensors_and_holds_their_resources(monkeypatch, shard):
    build = recording_build(monkeypatch)
    index = to_gpu(build, types.SimpleNamespace(d=DIM), [1, 0], GpuOptions(shard=shard))
    taken = []
    for number in (0, 1):
        resources = device_resources(build, number)
        resources.lock = Noted(number, taken)
    stats = SearchCounter()
    scores, ids = search_index(build, index, torch.randn(3, DIM).half(), 2, stats=stats)
    assert scores.shape == ids.shape == (3, 2)
    # In one order, whatever the order of the GPUs: else two threads could wait for each other.
    assert taken == [0, 1, -1, -1]
    assert stats.counts().searches == 1


class Noted:
    def __init__(self, number, taken):
        self.number, self.taken = number, taken

    def __enter__(self):
        self.taken.append(self.number)

    def __exit__(self, *error):
        self.taken.append(-1)


@pytest.mark.parametrize("description", ["Flat", "IVF4,Flat", "IVF4,PQ4x4", "HNSW8"])
def test_objects_of_faiss_keep_where_they_were_put(monkeypatch, description):
    build = recording_build(monkeypatch)
    # Some classes of faiss refuse attributes that they do not know.
    made = faiss.index_factory(DIM, description)
    build.module.index_cpu_to_gpu = lambda *arguments: made
    assert to_gpu(build, made, [1]) is made
    assert search.gpus_inside(made) == (1,)
    assert search.runs_with_cuvs(build, made) is False


def test_an_index_on_the_cpu_holds_nothing(vectors, monkeypatch):
    monkeypatch.setattr(search, "device_resources", None)
    with placed(load_installed(), flat(vectors)):
        pass


@pytest.mark.parametrize("used", [True, False, None])
def test_searches_count_whether_cuvs_ran_them(monkeypatch, used):
    build = recording_build(monkeypatch)
    index = GpuIndex(build.module, DIM, 0)
    if used is not None:
        index.uses_cuvs = used
    # Of an index made elsewhere only what faiss does by itself is known.
    monkeypatch.setattr(search, "cuvs_state", lambda requested, build: types.SimpleNamespace(enabled=True))
    stats = SearchCounter()
    search_index(build, index, torch.randn(3, DIM), 2, stats=stats)
    assert stats.counts().cuvs is (used is not False)
    assert stats.counts().cuvs_searches == (used is not False)


def test_the_space_of_parameters_is_that_of_where_an_index_lies(monkeypatch, vectors):
    build = recording_build(monkeypatch)
    build.module.ParameterSpace, build.module.GpuParameterSpace = lambda: "CPU", lambda: "GPU"
    group = to_gpu(build, types.SimpleNamespace(d=DIM), [0, 1])
    places = [flat(vectors), GpuIndex(build.module, DIM, 0), group]
    assert [parameter_space(build, index) for index in places] == ["CPU", "GPU", "GPU"]


def test_a_search_on_the_cpu_counts_no_cuvs(vectors):
    stats = SearchCounter()
    search_index(load_installed(), flat(vectors), vectors, 2, stats=stats)
    assert (stats.counts().cuvs, stats.counts().cuvs_searches) == (False, 0)


def test_removed_rows_are_hidden_on_a_gpu_which_removes_none(monkeypatch):
    build = recording_build(monkeypatch)
    index = GpuIndex(build.module, DIM, 0, found=[0, 1, 2, 3, 4, 5], ntotal=6)
    # Rows 1 and 3 were removed: places 0, 2, 4, 5 are rows 0 to 3.
    places = torch.tensor([0, 2, 4, 5])
    row_of = torch.full((6,), -1)
    row_of[places] = torch.arange(4)
    rows = RowSearch(build, index, resolve_metric("l2"), row_of, places)
    scores, found = rows.search(torch.randn(2, DIM), 3, Selection(), {}, 2**20)
    assert found.tolist() == [[0, 1, 2]] * 2
    assert scores.tolist() == [[0.0, 2.0, 4.0]] * 2
    # No selector goes along, which faiss does not take there; more rows are asked for instead.
    assert {call["params"] for call in index.calls} == {None}
    assert [call["k"] for call in index.calls] == [3, 6]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_lists_on_a_gpu_take_parameters(vectors):
    build = load_installed()
    index = faiss.index_factory(DIM, "IVF8,Flat")
    index.train(vectors.numpy())
    index.add(vectors.numpy())
    copy = to_gpu(build, index)
    assert parameter_holders(build, copy)["nprobe"][0].nprobe == 1
    params = search_parameters(build, copy, {"nprobe": 8})
    found = search_index(build, copy, vectors.cuda(), 3, params)[1]
    assert torch.equal(found.cpu()[:, 0], torch.arange(400))
