"""Indexes of bits of any family, as modules."""

import copy
import math
import pickle
from typing import ClassVar

import faiss
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from elips_torch import (
    ArgumentError,
    ConversionError,
    DtypeError,
    FactoryError,
    FaissIndex,
    FlatIndex,
    ImplementationError,
    MetricError,
    NotFittedError,
    ParameterError,
    ShapeError,
    from_faiss,
    load_index,
    pack_bits,
    unpack_bits,
    write_faiss,
)
from elips_torch.engines.faiss.builds import load_installed
from elips_torch.engines.faiss.search_parameters import takes_parameters
from elips_torch.testing import IndexContract
from elips_torch.testing.contract import assert_same, unchanged

BITS = 64
# Under these settings every family looks at all rows.
FAMILIES = {
    "BFlat": {},
    "BIVF4": {"nprobe": 4},
    "BIVF4_HNSW8": {"nprobe": 4},
    "BHNSW16": {"efSearch": 400},
}
HASHES = ("BHash8", "BHash4x8")


def codes(n, seed=0):
    return torch.randint(0, 256, (n, BITS // 8), generator=torch.Generator().manual_seed(seed)).byte()


def vectors(n, seed=0):
    return unpack_bits(codes(n, seed))


def by_hand(index, queries, k):
    distances, labels = index.search(queries.numpy(), k)
    return torch.from_numpy(distances), torch.from_numpy(labels)


class BitsContract(IndexContract):
    """Every verb of every index, on zeros and ones; ties go where faiss sends them."""

    index_class = FaissIndex
    dim = BITS
    description = "BFlat"
    parameters: ClassVar = {}

    def vectors(self, n, seed=0):
        return vectors(n, seed)

    def make(self, metric="l2", **options):
        made = FaissIndex.from_factory(self.dim, self.description, metric, **{**self.parameters, **options})
        return made if made.is_trained else made.fit(self.vectors(256, seed=7))

    def test_files_round_trip(self, tmp_path):
        index, path = self.filled(k=4), tmp_path / "index.safetensors"
        index.save(path)
        for other in (FaissIndex.load(path), load_index(path)):
            assert other.config() == index.config()
            self.assert_equal(copy.deepcopy(index), other)

    def test_best_first_and_padded(self):
        index = self.filled(10)
        scores, ids = index.search(self.vectors(4, seed=2), k=13)
        assert (ids[:, 10:] == -1).all()
        assert (scores[:, 10:] == torch.inf).all()
        assert (scores[:, 1:10] >= scores[:, :9]).all()
        assert all(sorted(row) == sorted(index.ids.tolist()) for row in ids[:, :10].tolist())

    def test_ties_go_to_the_lower_id(self):
        index = self.make()
        index.add(self.vectors(1).expand(20, -1), ids=torch.arange(20).flip(0))
        assert sorted(index.search(self.vectors(1), k=20).ids[0].tolist()) == list(range(20))

    def test_an_empty_index_finds_nothing(self):
        index = self.make()
        scores, ids = index.search(self.vectors(2), k=3)
        assert (ids == -1).all()
        assert (scores == torch.inf).all()
        assert index.range_search(self.vectors(2), 1.0).lims.tolist() == [0, 0, 0]

    def test_range_search_agrees_with_search(self):
        index = self.filled()
        queries = self.vectors(4, seed=2)
        full = index.search(queries, k=60)
        for radius in (0.0, 25, 30.5, 31.0, math.inf, full.scores[:, 7].clone(), full.scores[:, 7] + 0.5):
            lims, scores, ids = index.range_search(queries, radius)
            for query, limit in enumerate(torch.as_tensor(radius).expand(4).tolist()):
                part = slice(int(lims[query]), int(lims[query + 1]))
                within = full.scores[query] < limit
                wanted = dict(
                    zip(full.ids[query][within].tolist(), full.scores[query][within].tolist(), strict=True)
                )
                assert dict(zip(ids[part].tolist(), scores[part].tolist(), strict=True)) == wanted
                assert scores[part].tolist() == sorted(scores[part].tolist())

    def test_gradients_equal_those_of_the_dense_computation(self):
        index = self.filled()
        queries = self.vectors(6, seed=2).requires_grad_()
        scores, ids = index.search(queries, k=5)
        assert_same(index.search(queries.detach(), k=5), type(index.search(queries, 5))(scores.detach(), ids))
        scores.sum().backward()
        candidates = index.reconstruct(ids.flatten()).view(6, 5, -1)
        torch.testing.assert_close(queries.grad, 2 * (queries.detach()[:, None] - candidates).sum(1))

    def test_bad_construction_is_refused(self):
        with pytest.raises(MetricError, match="'l7'"):
            self.make("l7")
        with pytest.raises(MetricError, match="metric is 'ip', an index of bits has Hamming distances"):
            self.make("ip")
        with pytest.raises(ArgumentError, match="k is 0"):
            self.make(k=0)

    def test_the_finite_check_can_be_switched_off(self):
        # What is no bit cannot be kept.
        index = self.filled(check_finite=False)
        bad = self.vectors(3)
        bad[1, 0] = math.nan
        with (
            unchanged(index),
            pytest.raises(ArgumentError, match="vectors has values other than 0 and 1 in row 1"),
        ):
            index.add(bad)
        with pytest.raises(ArgumentError, match="queries has values other than 0 and 1 in row 1"):
            index.search(bad)


class TestFlat(BitsContract):
    pass


class TestIVF(BitsContract):
    description = "BIVF4"
    parameters: ClassVar = {"nprobe": 4}


class TestHNSW(BitsContract):
    description = "BHNSW16"
    parameters: ClassVar = {"efSearch": 200}

    @pytest.fixture(autouse=True)
    def one_thread(self):
        # With more, no two graphs of the same vectors are the same.
        before = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)
        yield
        faiss.omp_set_num_threads(before)

    def test_deterministic_mode(self):
        index, queries = self.filled(), self.vectors(4, seed=2)
        wanted = index.search(queries, k=5)
        torch.use_deterministic_algorithms(True)
        try:
            assert_same(index.search(queries, k=5), wanted)
        finally:
            torch.use_deterministic_algorithms(False)

    def test_range_search_agrees_with_search(self):
        with pytest.raises(ImplementationError, match="IndexBinaryHNSW does not search by radius"):
            self.filled().range_search(self.vectors(2), 20)


@pytest.fixture(params=FAMILIES)
def family(request):
    index = FaissIndex.from_factory(BITS, request.param)
    index.fit(codes(700, seed=1))
    index.add(codes(300), ids=torch.arange(300).flip(0) * 2)
    for name, value in FAMILIES[request.param].items():
        setattr(index, name, value)
        assert getattr(index, name) == value
    return index


def test_every_family_finds_what_faiss_finds(family):
    queries = codes(20, seed=2)
    distances, labels = by_hand(family.faiss_index, queries, 9)
    for given in (
        queries,
        unpack_bits(queries),
        unpack_bits(queries, torch.float16),
        queries.T.contiguous().T,
    ):
        scores, ids = family.search(given, 9)
        assert scores.dtype == torch.float32
        assert torch.equal(scores, distances.float())
        assert torch.equal(ids, family.ids[labels])
    single = family.search(queries[3], 9)
    assert torch.equal(single.ids, ids[3])
    assert torch.equal(family.search(unpack_bits(queries[3]), 9).ids, ids[3])


def test_every_family_agrees_with_the_exact_index(family):
    exact = FlatIndex(BITS)
    exact.add(family.reconstruct(family.ids), ids=family.ids)
    queries, hidden = vectors(12, seed=2), family.ids[::7]
    mask = torch.rand(12, 300, generator=torch.Generator().manual_seed(5)) < 0.4
    for selection in ({}, {"mask": mask[0]}, {"mask": mask}, {"exclude": hidden.expand(12, -1)}):
        found, wanted = family.search(queries, 20, **selection), exact.search(queries, 20, **selection)
        assert torch.equal(found.scores, wanted.scores)
        near = wanted.scores < wanted.scores[:, -1:]
        for mine, theirs, some in zip(found.ids, wanted.ids, near, strict=True):
            assert sorted(mine[some].tolist()) == sorted(theirs[some].tolist())


def test_vectors_come_back_and_may_go(family):
    assert torch.equal(family.reconstruct(family.ids), vectors(300))
    assert torch.equal(pack_bits(family.reconstruct(598)), codes(300)[0])
    family.remove([598, 4])
    family.upsert(codes(2, seed=9), ids=[596, 1001])
    assert 598 not in family
    assert torch.equal(family.reconstruct([596, 1001]), vectors(2, seed=9))
    found = family.search(codes(300), 1)
    assert not torch.isin(found.ids, torch.tensor([598, 4])).any()
    assert int((found.scores == 0).sum()) == 297
    family.reset()
    assert family.add(codes(5)).tolist() == [1002, 1003, 1004, 1005, 1006]
    assert torch.equal(family.search(codes(5), 1).ids[:, 0], family.ids)


@pytest.mark.parametrize("description", [*FAMILIES, *HASHES])
def test_state_copies_and_files_keep_the_index(description, tmp_path):
    index = FaissIndex.from_factory(BITS, description, k=4)
    index.fit(codes(300)).add(codes(300), ids=torch.arange(300) * 3 + 1)
    index.remove(7)
    other = FaissIndex.from_factory(BITS, description, k=4)
    other.load_state_dict(index.state_dict())
    index.save(tmp_path / "own")
    same = [other, copy.deepcopy(index), pickle.loads(pickle.dumps(index)), load_index(tmp_path / "own")]
    for each in same:
        assert_same(each.search(codes(9, seed=2)), index.search(codes(9, seed=2)))
        assert each.memory_bytes() == index.memory_bytes()
        # Inverted files lose it.
        assert ("hidden=1" in repr(each)) == ("BinaryIVF" not in repr(each))
    index.upsert(codes(1, seed=3), ids=[10])
    assert all(bool((each.search(codes(1, seed=3)).scores > 0).all()) for each in same)


def test_a_checkpoint_of_bits_is_none_of_floats():
    bits, floats = FaissIndex.from_factory(BITS, "BFlat"), FaissIndex.from_factory(BITS, "Flat")
    for one, other, message in (
        (bits, floats, "bits, expected one of floats"),
        (floats, bits, "floats, expected one of"),
    ):
        with unchanged(other), pytest.raises(RuntimeError, match=message):
            other.load_state_dict(one.state_dict())


@pytest.mark.parametrize("description", ["BFlat", "BIVF4", "BHNSW16"])
def test_an_index_goes_to_faiss_with_its_ids_and_back(description, tmp_path):
    index = FaissIndex.from_factory(BITS, description, **FAMILIES[description])
    index.fit(codes(300)).add(codes(300), ids=torch.arange(300).flip(0) * 5)
    if description != "BHNSW16":
        index.remove([0, 50])
    path = tmp_path / "bits.faiss"
    write_faiss(index, path)
    queries = codes(8, seed=2)
    wanted = index.search(queries, 6)
    plain = faiss.read_index_binary(str(path))
    distances, labels = by_hand(plain, queries, 6)
    assert torch.equal(distances.float(), wanted.scores)
    assert index.to_faiss(binary=True).ntotal == index.ntotal
    # At the same distance faiss may go another way.
    for mine, theirs, scores in zip(wanted.ids, labels, wanted.scores, strict=True):
        near = scores < scores[-1]
        assert sorted(mine[near].tolist()) == sorted(theirs[near].tolist())
    back = FaissIndex.read(path, **FAMILIES[description])
    assert sorted(back.ids.tolist()) == sorted(index.ids.tolist())
    assert torch.equal(back.search(queries, 6).scores, wanted.scores)
    assert torch.equal(back.reconstruct(index.ids), index.reconstruct(index.ids))
    if description == "BFlat":
        assert type(from_faiss(index)) is FlatIndex
        assert torch.equal(from_faiss(index).search(unpack_bits(queries), 6).scores, wanted.scores)


def test_rows_that_a_graph_cannot_give_up_keep_it_from_faiss():
    index = FaissIndex.from_factory(BITS, "BHNSW16")
    index.add(codes(30))
    index.remove(3)
    with pytest.raises(
        ConversionError, match="1 of 30 rows are hidden, and faiss's IndexBinaryHNSW takes none out"
    ):
        index.to_faiss()


def test_an_index_of_faiss_comes_with_its_labels():
    ids = torch.arange(300).flip(0) * 5
    inner = faiss.IndexBinaryHNSW(BITS, 8)
    inner.add(codes(300).numpy())
    for kind in (faiss.IndexBinaryIDMap, faiss.IndexBinaryIDMap2):
        mapped = kind(faiss.IndexBinaryFlat(BITS))
        mapped.add_with_ids(codes(300).numpy(), ids.numpy())
        assert torch.equal(FaissIndex(mapped).ids, ids)
    lists = faiss.index_binary_factory(BITS, "BIVF4")
    lists.train(codes(300).numpy())
    lists.add_with_ids(codes(300).numpy(), ids.numpy())
    index = FaissIndex(lists)
    index.nprobe = 4
    assert sorted(index.ids.tolist()) == sorted(ids.tolist())
    assert torch.equal(index.reconstruct(ids), vectors(300))
    # That one is as it was.
    lists.nprobe = 4
    _, labels = by_hand(lists, codes(5), 1)
    assert torch.equal(labels[:, 0], ids[:5])
    assert torch.equal(index.search(codes(5), 1).ids, labels)
    assert FaissIndex(inner).faiss_index is inner


def test_parameters_of_one_call_reach_faiss():
    index = FaissIndex.from_factory(BITS, "BIVF16_HNSW8")
    index.fit(codes(700)).add(codes(700))
    if not takes_parameters(load_installed(), index.faiss_index):
        with pytest.raises(ParameterError, match="no single call of IndexBinaryIVF"):
            index.search(codes(3), 5, nprobe=16)
        return
    wide = index.search(codes(30, seed=2), 5, nprobe=16, quantizer_efSearch=64)
    assert index.nprobe == 1
    assert bool((wide.scores < index.search(codes(30, seed=2), 5).scores).any())
    index.nprobe = 16
    assert torch.equal(index.search(codes(30, seed=2), 5).scores, wide.scores)
    assert (index.nlist, index.quantizer_efSearch) == (16, 16)


def test_what_does_not_fit_is_refused(tmp_path):
    index = FaissIndex.from_factory(BITS, "BIVF4")
    with pytest.raises(NotFittedError, match="IndexBinaryIVF takes no vectors"):
        index.add(codes(3))
    with pytest.raises(NotFittedError, match="IndexBinaryIVF cannot be searched"):
        index.search(codes(3))
    index.fit(codes(300)).add(codes(300))
    with pytest.raises(ShapeError, match="queries has 7 bytes, the index has 64 bits"):
        index.search(codes(3)[:, :7])
    with pytest.raises(ShapeError, match=r"vectors has shape \(8,\), expected \(N, D / 8\)"):
        index.add(codes(1)[0])
    for wrong in (codes(3).long(), codes(3).bool()):
        with pytest.raises(DtypeError, match=r"queries has dtype torch\.\w+, expected floats of 0"):
            index.search(wrong)
        with unchanged(index), pytest.raises(DtypeError, match="expected floats of 0 and 1, or uint8 bits"):
            index.add(wrong)
    with pytest.raises(ParameterError, match=r"nprobe for no search by radius; set index\.nprobe = 2"):
        index.range_search(codes(3), 9, nprobe=2)
    with pytest.raises(ImplementationError, match="ParameterSpace takes no IndexBinaryIVF"):
        index.explore(vectors(3), torch.zeros(3, 1, dtype=torch.int64))
    index.workspace_bytes = -5
    with pytest.raises(ArgumentError, match="workspace_bytes is -5"):
        index.search(codes(3))
    index.workspace_bytes = 2**20
    with pytest.raises(DtypeError, match=r"queries has dtype torch\.uint8, expected float32"):
        FaissIndex.from_factory(BITS, "HNSW8").search(codes(3))
    with pytest.raises(ImplementationError, match="ParameterSpace takes no IndexBinaryIVF"):
        index.set_parameters("nprobe=3")
    with pytest.raises(ConversionError, match=r"index is IndexBinaryIVF.* FaissIndex"):
        from_faiss(index)
    with pytest.raises(FactoryError, match="no index of 'BHNSW8' for dim 12"):
        FaissIndex.from_factory(12, "BHNSW8")
    with pytest.raises(FactoryError, match="no index of 'Boat'"):
        FaissIndex.from_factory(64, "Boat")
    with pytest.raises(MetricError, match="metric is 'cosine', faiss_index has 'l2'"):
        FaissIndex(faiss.IndexBinaryFlat(BITS), metric="cosine")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        write_faiss(index, tmp_path)


class Neighbours(Dataset):
    def __init__(self, index, queries):
        self.index, self.queries = index, queries

    def __len__(self):
        return len(self.queries)

    def __getitem__(self, item):
        return self.index.search(self.queries[item], 5).ids


# A newer Python warns of forking where there are threads, which is what is tested.
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_worker_searches_after_its_parent(family):
    queries = codes(64, seed=2)
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(2)
    try:
        wanted = family.search(queries, 5).ids
        loader = DataLoader(
            Neighbours(family, queries), 32, num_workers=1, multiprocessing_context="fork", timeout=60
        )
        assert torch.equal(torch.cat(list(loader)), wanted)
    finally:
        faiss.omp_set_num_threads(before)


def test_compiled_searches_are_the_same(family):
    search = torch.compile(lambda queries: family.search(queries, 5), fullgraph=True, backend="eager")
    for queries in (codes(6, seed=2), vectors(6, seed=2)):
        assert_same(search(queries), family.search(queries, 5))
