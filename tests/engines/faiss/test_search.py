import multiprocessing
import statistics
import threading
import time

import faiss
import pytest
import torch
from recording_gpu_faiss import GpuIndex, recording_build
from torch.utils.data import DataLoader

from elips_torch.core.errors import ArgumentError, DtypeError, ImplementationError, ShapeError
from elips_torch.engines.faiss.builds import get_threads, load_installed
from elips_torch.engines.faiss.search import range_search_index, search_index
from elips_torch.engines.faiss.stats import SearchCounter

DIM = 16


@pytest.fixture(scope="module")
def build():
    return load_installed()


@pytest.fixture(scope="module")
def vectors():
    return torch.randn(3000, DIM, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["Flat", "IVF8,Flat", "PQ4x4", "HNSW8"])
def index(request, vectors):
    made = faiss.index_factory(DIM, request.param)
    made.train(vectors.numpy())
    made.add(vectors.numpy())
    return made


def by_hand(index, queries, k, **options):
    # Arrays give arrays, also where something has imported `faiss.contrib.torch_utils`.
    return [torch.from_numpy(each) for each in index.search(queries.numpy(), k, **options)]


@pytest.mark.parametrize("n_queries", [0, 1, 33])
def test_results_are_those_of_faiss(build, index, vectors, n_queries):
    wanted = by_hand(index, vectors[:n_queries], 7)
    found = search_index(build, index, vectors[:n_queries], 7)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float32])
def test_queries_of_any_dtype_and_strides_are_made_right(build, index, vectors, dtype):
    given = vectors[:40].to(dtype).T.contiguous().T[::2]
    assert not given.is_contiguous()
    wanted = by_hand(index, given.float().contiguous(), 5)
    found = search_index(build, index, given, 5)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    single = search_index(build, index, given[3], 5)
    assert torch.equal(single[1], wanted[1][3])
    offset = search_index(build, index, vectors[7:9], 5)
    assert torch.equal(offset[1], by_hand(index, vectors[7:9].clone(), 5)[1])


def test_parameters_reach_faiss(build, vectors):
    index = faiss.index_factory(DIM, "IVF8,Flat")
    index.train(vectors.numpy())
    index.add(vectors.numpy())
    params = faiss.SearchParametersIVF(nprobe=8)
    found = search_index(build, index, vectors[:50], 5, params)
    assert not torch.equal(found[1], search_index(build, index, vectors[:50], 5)[1])
    # By hand without `params`, which the search takes no more where something has imported torch_utils.
    index.nprobe = 8
    assert torch.equal(found[1], by_hand(index, vectors[:50], 5)[1])


def test_rows_within_a_radius(build, vectors):
    index = faiss.IndexFlatL2(DIM)
    index.add(vectors.numpy())
    wanted = index.range_search(vectors[:9].numpy(), 14.0)
    found = range_search_index(build, index, vectors[:9].T.contiguous().T, 14.0)
    assert found[0].dtype == found[2].dtype == torch.int64
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, torch.from_numpy(theirs.astype(ours.numpy().dtype)))


def test_what_cannot_be_searched_is_refused(build, vectors):
    with pytest.raises(DtypeError, match="index is IndexBinaryFlat, expected an index of float"):
        search_index(build, faiss.IndexBinaryFlat(DIM * 8), vectors[:2], 3)
    with pytest.raises(ShapeError, match="queries has dim 16, the index has dim 8"):
        search_index(build, faiss.IndexFlatL2(8), vectors[:2], 3)


def test_threads_share_an_index(build, index, vectors):
    wanted = search_index(build, index, vectors[:200], 9)
    stats, wrong = SearchCounter(), []

    def run():
        for _ in range(20):
            found = search_index(build, index, vectors[:200], 9, stats=stats)
            if not torch.equal(found[1], wanted[1]):
                wrong.append(found)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = stats.counts()
    assert not wrong
    assert (counts.searches, counts.queries, counts.fallbacks) == (40, 8000, 0)
    assert counts.bytes == 40 * 200 * (DIM * 4 + 9 * 12)
    stats.reset()
    assert stats.counts().searches == 0


class Neighbours(torch.utils.data.Dataset):
    def __init__(self, build, index, vectors):
        self.build, self.index, self.vectors = build, index, vectors

    def __len__(self):
        return 4

    def __getitem__(self, number):
        _, ids = search_index(self.build, self.index, self.vectors, 1)
        return ids[:, 0], get_threads(self.build)


# A newer Python warns of forking where there are threads, which is what is tested.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_workers_search_after_their_parent(build, vectors):
    index = faiss.IndexFlatL2(DIM)
    index.add(vectors.numpy())
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(2)
    try:
        search_index(build, index, vectors, 1)
        data = Neighbours(build, index, vectors)
        context = multiprocessing.get_context("fork")
        loader = DataLoader(data, num_workers=2, multiprocessing_context=context, timeout=60)
        for ids, threads in loader:
            assert ids[0].tolist() == list(range(3000))
            assert threads.tolist() == [1]
        assert faiss.omp_get_max_threads() == 2
    finally:
        faiss.omp_set_num_threads(before)


@pytest.mark.parametrize(("n_queries", "rows"), [(1, 500), (1000, 3000)])
def test_a_search_costs_hardly_more_than_by_hand(build, vectors, n_queries, rows):
    index = faiss.IndexFlatL2(DIM)
    index.add(vectors[:rows].numpy())
    queries = vectors[:n_queries]

    def seconds(call):
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def excess():
        ours, theirs = [], []
        for _ in range(15):
            theirs.append(seconds(lambda: by_hand(index, queries, 10)))
            ours.append(seconds(lambda: search_index(build, index, queries, 10)))
        limit = 1e-4 if n_queries == 1 else 0.05 * statistics.median(theirs)
        return (statistics.median(ours) - statistics.median(theirs)) / limit

    # Something else may run on the machine: one quiet round is enough.
    assert min(excess() for _ in range(5)) <= 1


def test_a_gpu_index_is_searched_on_its_own_device_and_the_callers_stream(monkeypatch):
    build = recording_build(monkeypatch)
    index = GpuIndex(build.module, DIM, 1)
    queries = torch.randn(6, DIM)
    scores, ids = search_index(build, index, queries, 3, "params")
    (call,) = index.calls
    assert (call["device"], call["stream"], call["params"]) == (1, "stream of GPU 1", "params")
    assert (call["n"], call["k"], call["x"]) == (6, 3, queries.data_ptr())
    assert (call["scores"], call["ids"]) == (scores.data_ptr(), ids.data_ptr())
    assert build.module.now == {}
    search_index(build, index, queries.half(), 3)
    assert index.calls[1]["x"] != queries.data_ptr()
    assert index.calls[1]["resources"] is call["resources"]
    assert build.module.StandardGpuResources.made == 1


def test_what_faiss_lacks_on_a_gpu_is_refused(monkeypatch):
    build = recording_build(monkeypatch)
    index = GpuIndex(build.module, DIM, 0)
    with pytest.raises(ArgumentError, match="k is 2049, faiss serves at most 2048"):
        search_index(build, index, torch.zeros(1, DIM), 2049)
    with pytest.raises(ImplementationError, match="no range search on a GPU"):
        range_search_index(build, index, torch.zeros(1, DIM), 1.0)
    assert index.calls == []
