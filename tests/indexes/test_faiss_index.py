import copy
import io
import pickle
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import faiss
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from elips_torch import (
    ArgumentError,
    DeviceError,
    DtypeError,
    FactoryError,
    FaissIndex,
    FlatIndex,
    ImplementationError,
    IVFFlatIndex,
    MetricError,
    NonFiniteError,
    ParameterError,
    ShapeError,
    faiss_stats,
    load_index,
)
from elips_torch.testing import IndexContract
from elips_torch.testing.contract import assert_same, unchanged


class FaissContract(IndexContract):
    """As far as scores and order are faiss's own: ties go where it sends them."""

    index_class = FaissIndex
    description = "Flat"
    parameters: ClassVar = {}

    def make(self, metric="l2", **options):
        made = FaissIndex.from_factory(self.dim, self.description, metric, **{**self.parameters, **options})
        return made if made.is_trained else made.fit(self.vectors(256, seed=7))

    def test_ties_go_to_the_lower_id(self):
        index = self.make()
        index.add(self.vectors(1).expand(20, -1), ids=torch.arange(20).flip(0))
        assert sorted(index.search(self.vectors(1), k=20).ids[0].tolist()) == list(range(20))

    def test_scores_with_and_without_gradients_are_the_same(self):
        index = self.filled()
        queries = self.vectors(6, seed=2)
        traced = index.search(queries.clone().requires_grad_(), k=70)
        found = index.search(queries, k=70)
        assert torch.equal(traced.ids, found.ids)
        torch.testing.assert_close(traced.scores, found.scores, rtol=1e-5, atol=1e-5)

    def test_deterministic_mode(self):
        index = self.filled()
        queries = self.vectors(4, seed=2)
        wanted = index.search(queries, k=5)
        torch.use_deterministic_algorithms(True)
        try:
            assert_same(index.search(queries, k=5), wanted)
        finally:
            torch.use_deterministic_algorithms(False)

    def test_bad_construction_is_refused(self):
        with pytest.raises(MetricError, match="'l7'"):
            self.make("l7")
        with pytest.raises(ArgumentError, match="k is 0"):
            self.make(k=0)


class TestFlat(FaissContract):
    pass


class TestHNSW(FaissContract):
    description = "HNSW16"
    parameters: ClassVar = {"efSearch": 200}


class TestIVF(FaissContract):
    description = "IVF4,Flat"
    parameters: ClassVar = {"nprobe": 4}


DIM = 16
FAMILIES = {
    "HNSW16": {"efSearch": 400},
    "HNSW16,SQ8": {"efSearch": 400},
    "LSH": {},
    "RQ4x4": {},
    "NSG16,Flat": {"search_L": 250},
    "PQ8x4fs": {},
    "IVF4,PQ8x4fs": {"nprobe": 4},
    "RaBitQ": {},
    "IVF4,RQ4x4": {"nprobe": 4},
    "IVF4_HNSW8,Flat": {"nprobe": 4},
    "PCA8,HNSW16": {"efSearch": 400},
    "IVF4,PQ8x4np,RFlat": {"nprobe": 4, "k_factor": 8},
}


def data(n, seed=0):
    return torch.rand(n, DIM, generator=torch.Generator().manual_seed(seed))


def by_hand(index, queries, k):
    # Arrays give arrays, also where something has imported `faiss.contrib.torch_utils`.
    return [torch.from_numpy(each) for each in index.search(queries.numpy(), k)]


@pytest.fixture(params=FAMILIES)
def family(request):
    index = FaissIndex.from_factory(DIM, request.param)
    index.fit(data(700, seed=1))
    index.add(data(300), ids=torch.arange(300).flip(0) * 2)
    for name, value in FAMILIES[request.param].items():
        setattr(index, name, value)
        assert getattr(index, name) == value
    return index


def test_every_family_finds_what_faiss_finds(family):
    queries = data(20, seed=2)
    scores, rows = by_hand(family.faiss_index, queries, 7)
    found = family.search(queries, 7)
    assert torch.equal(found.ids, family.ids[rows])
    assert torch.equal(found.scores, scores)
    assert family.search(queries[3], 7).ids.tolist() == found.ids[3].tolist()


def test_every_family_serves_masks_and_exclusions(family):
    queries = data(6, seed=2)
    shared = family.ids % 8 == 0
    each = torch.rand(6, 300, generator=torch.Generator().manual_seed(4)) < 0.1
    exclude = family.search(queries, 5).ids
    for options in ({"mask": shared}, {"mask": each}, {"mask": shared, "exclude": exclude}):
        scores, ids = family.search(queries, 9, **options)
        assert (ids >= 0).all()
        rows = family._rows_of(ids)
        assert options["mask"].expand(6, 300).gather(1, rows).all()
        if "exclude" in options:
            assert not (ids[:, :, None] == exclude[:, None]).any()
        # Nothing that was asked for beats what was found, so far as faiss finds all.
        everything = family.search(queries, 300)
        kept = options["mask"].expand(6, 300).gather(1, family._rows_of(everything.ids.clamp_min(0)))
        kept &= everything.ids >= 0
        if "exclude" in options:
            kept &= ~(everything.ids[:, :, None] == exclude[:, None]).any(2)
        if bool((everything.ids >= 0).all()) and "RFlat" not in repr(family):
            for query in range(6):
                wanted = everything.scores[query][kept[query]][:9]
                torch.testing.assert_close(scores[query], wanted, rtol=1e-5, atol=1e-5)


def test_every_family_hides_what_is_removed_and_keeps_its_state(family):
    queries = data(6, seed=2)
    gone = family.search(queries, 2).ids.unique()
    assert family.remove(gone) == len(gone)
    # Inverted files whose searches would read them lose them at once.
    assert (f"hidden={len(gone)}" in repr(family)) == ("IVFPQFastScan" not in repr(family))
    found = family.search(queries, 5)
    assert (found.ids >= 0).all()
    assert not torch.isin(found.ids, gone).any()
    for clone in (copy.deepcopy(family), pickle.loads(pickle.dumps(family))):
        assert_same(clone.search(queries, 5), found)
    other = FaissIndex.from_factory(DIM, "Flat")
    other.load_state_dict(family.state_dict())
    assert_same(other.search(queries, 5), found)
    assert type(other.faiss_index) is type(family.faiss_index)
    assert other.search_parameters == family.search_parameters
    family.reset()
    assert family.search(queries, 2).ids.tolist() == [[-1, -1]] * 6


def test_a_pickle_is_hardly_larger_than_the_index():
    index = FaissIndex.from_factory(DIM, "Flat")
    index.add(data(4000))
    buffer = io.BytesIO()
    torch.save(index, buffer)
    assert buffer.tell() < 1.4 * index.memory_bytes()
    buffer.seek(0)
    assert_same(torch.load(buffer, weights_only=False).search(data(3), 4), index.search(data(3), 4))
    kept = []
    content = pickle.dumps(index, protocol=5, buffer_callback=kept.append)
    buffers = [bytes(each) for each in kept]
    assert_same(pickle.loads(content, buffers=buffers).search(data(3), 4), index.search(data(3), 4))


def test_a_file_holds_the_family_and_its_parameters(family, tmp_path):
    family.save(tmp_path / "index")
    other = load_index(tmp_path / "index")
    assert repr(other) == repr(family)
    assert_same(other.search(data(5, seed=2), 4), family.search(data(5, seed=2), 4))
    assert family.memory_bytes() == 300 * 16 + len(faiss.serialize_index(family.faiss_index))


def test_explain_says_that_faiss_serves(family):
    explanation = family.explain(data(3), 5)
    assert explanation.chosen == "faiss"
    name = type(family.faiss_index).__name__
    assert f"{name}.search of 3 x 300 x {DIM} float32, l2, k=5 on cpu" in str(explanation)
    assert family.explain(data(1)[0], implementation="faiss").reasons == {"faiss": []}
    with pytest.raises(ImplementationError, match=r"implementation is 'native', Index\w+\.search has"):
        family.explain(data(3), implementation="native")
    with pytest.raises(ShapeError, match="queries"):
        family.explain(torch.rand(3, DIM + 1))


def test_gradients_are_those_of_reconstructed_vectors_or_refused():
    index = FaissIndex.from_factory(DIM, "ITQ8,LSH").fit(data(300))
    index.add(data(50))
    queries = data(3, seed=2).requires_grad_()
    assert index.search(queries.detach(), 2).ids.shape == (3, 2)
    with pytest.raises(ImplementationError, match="IndexPreTransform does not reconstruct"):
        index.search(queries, 2)


def test_a_family_without_range_search_says_so():
    index = FaissIndex.from_factory(DIM, "PQ8x4fs").fit(data(300))
    index.add(data(50))
    with pytest.raises(ImplementationError, match="IndexPQFastScan does not search by radius"):
        index.range_search(data(2), 1.0)


def test_a_graph_that_takes_one_batch_says_so_and_changes_nothing():
    index = FaissIndex.from_factory(DIM, "NSG16,Flat")
    index.add(data(300))
    for change in (lambda: index.add(data(5)), lambda: index.upsert(data(2), [1, 400])):
        with unchanged(index), pytest.raises(ImplementationError, match="IndexNSGFlat does not add"):
            change()
    with pytest.raises(ParameterError, match=r"set index\.search_L = 9"):
        index.search(data(2), search_L=9)


def test_a_graph_is_not_asked_for_more_than_it_holds():
    # faiss would look for further rows for ever.
    index = FaissIndex.from_factory(DIM, "NSG16,Flat", search_L=1000)
    index.add(data(150))
    scores, ids = index.search(data(4, seed=2), 170)
    assert (ids[:, :150].sort(1).values == torch.arange(150)).all()
    assert (ids[:, 150:] == -1).all()
    assert scores[:, 150:].isinf().all()
    assert index.search_L == 150
    index.remove(torch.arange(140))
    assert (index.search(data(4, seed=2), 20).ids >= 0).sum(1).tolist() == [10] * 4


def test_labels_of_faiss_become_ids():
    labels = torch.arange(200, 0, -1) * 5
    queries = data(6, seed=2)
    for description, options in (("IDMap,HNSW16", {}), ("IDMap2,Flat", {}), ("IVF4,Flat", {"nprobe": 4})):
        given = faiss.index_factory(DIM, description)
        given.train(data(300, seed=1).numpy())
        given.add_with_ids(data(200).numpy(), labels.numpy())
        index = FaissIndex(given)
        for name, value in options.items():
            setattr(index, name, value)
            setattr(given, name, value)
        wanted = by_hand(given, queries, 4)
        del given
        found = index.search(queries, 4)
        assert torch.equal(found.ids, wanted[1])
        assert torch.equal(found.scores, wanted[0])
        assert index.add(data(1, seed=9)).tolist() == [1001]
        torch.testing.assert_close(index.reconstruct([1001, 1000]), torch.cat([data(1, seed=9), data(1)]))


def test_parameters_are_named_and_checked():
    index = FaissIndex.from_factory(DIM, "IVF4_HNSW8,Flat", nprobe=2)
    index.fit(data(300))
    index.add(data(300))
    assert index.search_parameters == ("nprobe", "quantizer_efSearch", "workspace_bytes")
    assert index.nprobe == index.faiss_index.nprobe == 2
    exact = FlatIndex(DIM)
    exact.add(data(300))
    queries = data(8, seed=2)
    found = index.search(queries, 5, nprobe=4, quantizer_efSearch=16)
    assert torch.equal(found.ids, exact.search(queries, 5).ids)
    assert index.nprobe == 2
    with pytest.raises(ParameterError, match="no search parameter 'efSearch', it has nprobe"):
        index.search(queries, efSearch=3)
    with pytest.raises(ArgumentError, match="nprobe is 0"):
        index.nprobe = 0


@pytest.mark.parametrize("description", ["IVF4,RQ4x4fs_Nrq2x4", "IVF4,LSQ4x4fs_Nlsq2x4"])
def test_fast_scans_of_additive_codes_take_masks_and_removals(description):
    index = FaissIndex.from_factory(DIM, description, nprobe=4).fit(data(700, seed=1))
    index.add(data(300))
    queries, mask = data(9, seed=2), torch.arange(300) % 2 == 0
    found = index.search(queries, 7, mask=mask)
    # Which rows come first depends on how many are asked for: the sums of codes are rounded.
    assert bool(((found.ids >= 0) & (found.ids % 2 == 0)).all())
    assert bool((found.scores.diff(dim=1) >= 0).all())
    index.remove([0, 2])
    assert not torch.isin(index.search(queries, 300).ids, torch.tensor([0, 2])).any()
    with pytest.raises(ParameterError, match="faiss takes nprobe for no single call of IndexIVF"):
        index.search(queries, 3, nprobe=2)
    # What refines such a scan has a parameter of its own.
    refined = FaissIndex.from_factory(DIM, description + ",RFlat", nprobe=4).fit(data(700, seed=1))
    refined.add(data(300))
    assert bool((refined.search(queries, 7, mask=mask, k_factor=4).ids % 2 == 0).all())


def counted(search):
    """Return by how much a search raises the counts of searches and queries."""
    before = faiss_stats()
    search()
    after = faiss_stats()
    assert after.bytes > before.bytes or after.searches == before.searches
    return after.searches - before.searches, after.queries - before.queries


def test_each_search_of_a_user_is_counted_once():
    vectors = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    index = FaissIndex.from_factory(8, "IVF8,Flat", nprobe=1).fit(vectors)
    index.add(vectors)
    queries, few = vectors[:6], torch.arange(500) % 100 == 0
    own = few.expand(6, -1)
    radius = torch.tensor([1.0, 2.0, 1.0, 3.0, 3.0, 1.0])
    # Few rows that are visible take several rounds, and each radius takes one.
    for search in (
        lambda: index.search(queries, 5),
        lambda: index.search(queries, 5, mask=few),
        lambda: index.search(queries, 5, mask=own),
        lambda: index.range_search(queries, 1.0),
        lambda: index.range_search(queries, radius),
    ):
        assert counted(search) == (1, 6)
    lists = IVFFlatIndex(8, nlist=8, nprobe=1).fit(vectors)
    lists.add(vectors)
    for mask in (None, few, own):
        assert counted(lambda mask=mask: lists.search(queries, 5, mask=mask, implementation="faiss")) == (
            1,
            6,
        )
    assert counted(lambda: lists.search(queries, 5)) == (0, 0)
    with pytest.raises(NonFiniteError):
        counted(lambda: index.search(queries * torch.nan, 5, mask=few))


def test_what_is_no_index_of_faiss_is_refused():
    with pytest.raises(DtypeError, match="faiss_index is of type Tensor"):
        FaissIndex(data(3))
    with pytest.raises(MetricError, match="metric is 'cosine', faiss_index has 'l2'"):
        FaissIndex(faiss.IndexFlatL2(4), metric="cosine")
    with pytest.raises(FactoryError, match="'HNSF32'"):
        FaissIndex.from_factory(DIM, "HNSF32")
    with pytest.raises(DtypeError, match="dim is 'Flat', expected an int"):
        FaissIndex.from_factory("Flat", DIM)
    with pytest.raises(DtypeError, match="description is None, expected a string"):
        FaissIndex.from_factory(DIM, None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to move to")
def test_a_gpu_that_is_not_there_is_refused():
    index = FaissIndex.from_factory(DIM, "HNSW8")
    index.add(data(30))
    for place in ("cuda", "meta"):
        with unchanged(index), pytest.raises(DeviceError, match="FaissIndex"):
            index.to(place)


def test_a_state_that_does_not_fit_is_refused():
    index, other = FaissIndex.from_factory(DIM, "HNSW8"), FaissIndex.from_factory(DIM, "LSH")
    index.add(data(30))
    other.add(data(20))
    state = index.state_dict()
    shifted = {**state, "places": state["places"] + 1}
    broken = {**state, "faiss": state["faiss"][:-50]}
    foreign = FaissIndex.from_factory(DIM, "Flat", "ip").state_dict()
    for bad, message in ((shifted, "different rows"), (broken, "cannot read"), (foreign, "metric 'ip'")):
        with unchanged(other), pytest.raises(RuntimeError, match=message):
            other.load_state_dict(bad)
    with unchanged(other), pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({name: value for name, value in state.items() if name != "faiss"})


class Neighbours(Dataset):
    def __init__(self, index, queries):
        self.index, self.queries = index, queries

    def __len__(self):
        return len(self.queries)

    def __getitem__(self, item):
        return self.index.search(self.queries[item], 5).ids


# A newer Python warns of forking where there are threads, which is what is tested.
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("description", ["HNSW8", "IVF4,PQ8x4fs"])
def test_a_forked_worker_searches_after_its_parent(description):
    index = FaissIndex.from_factory(DIM, description).fit(data(700, seed=1))
    index.add(data(300))
    queries = data(64, seed=2)
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(2)
    try:
        # The parent has used its threads before it forks.
        wanted = index.search(queries, 5).ids
        loader = DataLoader(
            Neighbours(index, queries), 32, num_workers=1, multiprocessing_context="fork", timeout=60
        )
        assert torch.equal(torch.cat(list(loader)), wanted)
    finally:
        faiss.omp_set_num_threads(before)


def test_threads_may_search_one_index(family):
    queries = data(40, seed=2)
    wanted = family.search(queries, 5)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: family.search(queries, 5), range(12)))
    assert all(torch.equal(each.ids, wanted.ids) for each in found)


@pytest.mark.parametrize("n_queries", [1, 1000])
def test_a_search_costs_hardly_more_than_by_hand(n_queries):
    vectors = torch.randn(10_000, 64, generator=torch.Generator().manual_seed(0))
    index = FaissIndex.from_factory(64, "Flat")
    index.add(vectors)
    there, queries = index.faiss_index, vectors[:n_queries]

    def seconds(call):
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def excess():
        ours, theirs = [], []
        for _ in range(15):
            theirs.append(seconds(lambda: by_hand(there, queries, 10)))
            ours.append(seconds(lambda: index.search(queries, 10)))
        limit = 1e-4 if n_queries == 1 else 0.05 * statistics.median(theirs)
        return (statistics.median(ours) - statistics.median(theirs)) / limit

    # Something else may run on the machine: one quiet round is enough.
    assert min(excess() for _ in range(5)) <= 1
