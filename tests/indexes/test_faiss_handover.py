"""Indexes of faiss inside modules, handed over with the ids and the removals of these."""

import copy
import multiprocessing

import faiss
import pytest
import torch
from faiss_agreement import assert_agree, by_hand, uniform

from elips_torch import (
    ArgumentError,
    ConversionError,
    FaissIndex,
    IndexFileError,
    PreTransformIndex,
    from_faiss,
    pack_bits,
    read_faiss,
    write_faiss,
)
from elips_torch.engines.faiss import handover

DIM, N = 16, 300
IDS = torch.arange(N).flip(0) * 3 + 5
QUERIES = uniform(12, seed=2)
# With settings under which a search sees all rows.
HERE_TOO = {
    "Flat": {},
    "SQ6": {},
    "PQ4x4np": {},
    "PCA8,SQfp16": {},
    "L2norm,Flat": {},
    "IVF4,Flat": {"nprobe": 4},
    "IVF4,SQ8": {"nprobe": 4},
    "IVF4,PQ4x4np": {"nprobe": 4},
    "PCA8,IVF4,SQ8": {"nprobe": 4},
}
TAKING_OUT = {
    "LSH": {},
    "RQ4x4": {},
    "RaBitQ": {},
    "PQ4x4fs": {},
    "IVF4,PQ4x4fs": {"nprobe": 4},
    "IVF4,RaBitQ": {"nprobe": 4},
    "IVF4,RQ4x4": {"nprobe": 4},
    "IVF4,PRQ2x2x4": {"nprobe": 4},
    "IVF4_HNSW8,Flat": {"nprobe": 4},
}
KEEPING = {
    "HNSW16": {"efSearch": 400},
    "NSG16,Flat": {"search_L": 250},
    "PCA8,HNSW16": {"efSearch": 400},
    "SQ8,RFlat": {"k_factor": 8},
    "IVF4,PQ4x4np,RFlat": {"nprobe": 4, "k_factor": 8},
    "IVF4,PQ4+4": {"nprobe": 4, "k_factor": 8},
}


def filled(description, parameters, metric="l2"):
    index = FaissIndex.from_factory(DIM, description, metric)
    index.fit(uniform(700, seed=1))
    index.add(uniform(N), ids=IDS)
    for name, value in parameters.items():
        setattr(index, name, value)
    return index


def expected(index, queries, k):
    """Return what faiss finds in the index inside, under the ids of the rows that are not hidden."""
    id_of = {int(place): int(label) for place, label in zip(index.places, index.ids, strict=True)}
    scores, places = by_hand(index.faiss_index, queries, N if len(id_of) < index.faiss_index.ntotal else k)
    kept = [
        [(score, id_of[place]) for score, place in zip(*row, strict=True) if place in id_of][:k]
        for row in zip(scores.tolist(), places.tolist(), strict=True)
    ]
    values = torch.tensor(kept, dtype=torch.float64)
    return values[..., 0].float(), values[..., 1].long()


@pytest.mark.parametrize("description", [*HERE_TOO, *TAKING_OUT, *KEEPING])
def test_ids_go_to_faiss_and_into_files(description, tmp_path):
    index = filled(description, {**HERE_TOO, **TAKING_OUT, **KEEPING}[description])
    wanted = expected(index, QUERIES, 7)
    assert_agree(by_hand(index.to_faiss(), QUERIES, 7), wanted)
    write_faiss(index, tmp_path / "a.faiss")
    assert_agree(by_hand(faiss.read_index(str(tmp_path / "a.faiss")), QUERIES, 7), wanted)
    back = FaissIndex.read(tmp_path / "a.faiss")
    assert back.ids.sort().values.tolist() == IDS.sort().values.tolist()
    if description != "NSG16,Flat":  # faiss does not write its search_L
        assert_agree(back.search(QUERIES, 7), wanted)


@pytest.mark.parametrize("description", [*HERE_TOO, *TAKING_OUT])
def test_what_was_removed_does_not_go_along(description):
    index = filled(description, {**HERE_TOO, **TAKING_OUT}[description])
    index.remove(IDS[::3])
    # Their rows are new, and lie behind the others.
    index.upsert(uniform(4, seed=8), IDS[[1, 100, 4, 200]])
    made = index.to_faiss()
    assert made.ntotal == index.ntotal == 200
    assert_agree(by_hand(made, QUERIES, 9), expected(index, QUERIES, 9))
    if description in HERE_TOO:
        brought = from_faiss(index)
        assert_agree(brought.search(QUERIES, 9), expected(index, QUERIES, 9))
        assert brought.ids.sort().values.tolist() == index.ids.sort().values.tolist()


@pytest.mark.parametrize(
    "description",
    [
        "Flat",
        "IVF4,Flat",
        "PCA8,IVF4,PQ4x4np",
        "BIVF4",
        "BFlat",
        "IVF4,PQ4x4fs",
        "PCA8,IVF4,PQ4x4fs",
        "PQ4x4fs",
    ],
)
def test_faiss_puts_equal_scores_in_the_same_order(description, tmp_path):
    shuffled = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    rows = uniform(N).round()[shuffled % 40]
    ascending, index = (FaissIndex.from_factory(DIM, description).fit(rows) for _ in range(2))
    ascending.add(rows, ids=torch.arange(N) * 3)
    index.add(rows, ids=shuffled)
    index.remove(shuffled[::7])
    index.upsert(rows[:20], shuffled[:20])
    for each in (ascending, index):
        wanted = each.search(rows[:50], 9).ids
        assert len(set(each.search(rows[:50], 9).scores.flatten().tolist())) < 400, "equal scores"
        write_faiss(each, tmp_path / "a.faiss")
        back = FaissIndex.read(tmp_path / "a.faiss")
        queries = pack_bits(rows[:50]) if description.startswith("B") else rows[:50]
        assert torch.equal(by_hand(each.to_faiss(), queries, 9)[1], wanted)
        assert torch.equal(by_hand(back.to_faiss(), queries, 9)[1], wanted)
        assert torch.equal(back.search(rows[:50], 9).ids, wanted)
    # Labels that ascend stay where faiss keeps them.
    assert isinstance(index.to_faiss(), faiss.IndexIDMap2 | faiss.IndexBinaryIDMap2)
    if "IVF" in description:
        assert not isinstance(ascending.to_faiss(), faiss.IndexIDMap2 | faiss.IndexBinaryIDMap2)


@pytest.mark.parametrize("description", ["IVF16,Flat", "IVF16,SQ8", "BIVF16"])
@pytest.mark.parametrize("left", [4, 0])
def test_lists_that_hold_nothing_go_along(description, left):
    index = FaissIndex.from_factory(DIM, description).fit(uniform(700, seed=1).round())
    index.add(uniform(5).round(), ids=[9, 8, 7, 6, 5])
    index.remove([9, 8, 7, 6, 5][left:])
    made = index.to_faiss()
    assert made.ntotal == left
    index.nprobe = 16
    bits = QUERIES.round()
    rows = pack_bits(bits) if description.startswith("B") else bits
    assert torch.equal(by_hand(index.to_faiss(), rows, 4)[1], index.search(bits, 4).ids)


@pytest.mark.parametrize("description", HERE_TOO)
def test_ids_come_over_and_go_on(description):
    index = filled(description, HERE_TOO[description])
    brought = from_faiss(index)
    assert_agree(brought.search(QUERIES, 7), expected(index, QUERIES, 7))
    index.remove(IDS[:2])
    assert from_faiss(index).add(uniform(2, seed=3)).tolist() == index.add(uniform(2, seed=3)).tolist()


@pytest.mark.parametrize("description", KEEPING)
def test_families_that_take_nothing_out_say_so(description, tmp_path):
    index = filled(description, KEEPING[description])
    index.remove(IDS[:100])
    wanted = index.search(QUERIES, 5)
    with pytest.raises(ConversionError, match=r"100 of 300 rows are hidden, and faiss's Index\w+ takes none"):
        index.to_faiss()
    with pytest.raises(ConversionError, match="hidden"):
        write_faiss(index, tmp_path / "a.faiss")
    assert not list(tmp_path.iterdir())
    assert torch.equal(index.search(QUERIES, 5).ids, wanted.ids)
    index.reset()
    index.add(uniform(N), ids=IDS)
    assert index.to_faiss().ntotal == N


@pytest.mark.parametrize("description", ["Flat", "SQ8", "IVF4,Flat", "HNSW16"])
def test_the_cosine_goes_along(description):
    index = filled(description, {"nprobe": 4} if "IVF" in description else {}, "cosine")
    queries = 3 * QUERIES
    wanted = expected(index, queries / queries.norm(dim=1, keepdim=True), 7)
    assert_agree(by_hand(index.to_faiss(), queries, 7), wanted)
    if description != "HNSW16":
        brought = from_faiss(index)
        assert_agree(brought.search(queries, 7), wanted)
        assert isinstance(brought, PreTransformIndex) or brought.metric == "cosine"


def test_numbers_of_rows_stay_numbers_of_rows():
    index = FaissIndex.from_factory(DIM, "HNSW16")
    index.add(uniform(N))
    assert type(index.to_faiss()) is faiss.IndexHNSWFlat
    index = FaissIndex.from_factory(DIM, "Flat")
    index.add(uniform(N))
    index.remove(list(range(1, N)))
    assert isinstance(index.to_faiss(), faiss.IndexFlat)
    assert from_faiss(index).ids.tolist() == [0]


@pytest.mark.parametrize("description", ["Flat", "IVF4,Flat", "HNSW16"])
def test_empty_and_untrained_indexes_go_along(description):
    index = FaissIndex.from_factory(DIM, description)
    assert index.to_faiss().ntotal == 0
    assert index.to_faiss().is_trained == index.is_trained
    if description != "HNSW16":
        assert from_faiss(index).ntotal == 0
        index = filled(description, {})
        index.remove(IDS)
        assert (index.to_faiss().ntotal, from_faiss(index).ntotal) == (0, 0)


@pytest.mark.parametrize("description", ["Flat", "IVF4,Flat", "HNSW16"])
def test_nothing_is_shared(description):
    index = filled(description, {"nprobe": 4} if "IVF" in description else {})
    made, wanted = index.to_faiss(), expected(index, QUERIES, 7)
    index.reset()
    index.add(uniform(5, seed=4))
    assert_agree(by_hand(made, QUERIES, 7), wanted)
    del index
    assert_agree(by_hand(made, QUERIES, 7), wanted)


def test_labels_behind_transforms_become_ids(tmp_path):
    made = faiss.index_factory(DIM, "PCA8,IDMap2,Flat")
    made.train(uniform(700, seed=1).numpy())
    made.add_with_ids(uniform(N).numpy(), IDS.numpy())
    index = FaissIndex(made)
    assert torch.equal(index.ids, IDS)
    wanted = by_hand(made, QUERIES, 7)
    assert_agree(index.search(QUERIES, 7), wanted)
    del made
    assert_agree(by_hand(index.to_faiss(), QUERIES, 7), wanted)
    assert_agree(from_faiss(index).search(QUERIES, 7), wanted)


def test_lists_in_files_are_left_as_they_are(tmp_path):
    made = faiss.index_factory(DIM, "IVF4,Flat")
    made.train(uniform(700, seed=1).numpy())
    lists = faiss.OnDiskInvertedLists(4, made.code_size, str(tmp_path / "lists"))
    made.replace_invlists(lists)
    made.add(uniform(N).numpy())
    before = (tmp_path / "lists").read_bytes()
    index = FaissIndex(made)
    index.remove([0, 1])
    with pytest.raises(ConversionError, match="OnDiskInvertedLists, which faiss does not copy"):
        index.to_faiss()
    assert (tmp_path / "lists").read_bytes() == before


def test_tables_are_made_on_gpus_only():
    with pytest.raises(ArgumentError, match="precomputed_tables"):
        filled("IVF4,PQ4x4np", {}).to_faiss(precomputed_tables=True)
    with pytest.raises(ConversionError, match="FaissIndex holds no bits"):
        filled("Flat", {}).to_faiss(binary=True)


def test_a_family_without_counterpart_is_read_by_faiss(tmp_path):
    path = tmp_path / "graph.faiss"
    index = filled("HNSW16", {})
    write_faiss(index, path)
    with pytest.raises(ConversionError, match=r"graph.faiss.*IndexHNSWFlat.*FaissIndex\.read\(path\)"):
        read_faiss(path)
    read = FaissIndex.read(path, k=3, efSearch=400)
    assert (read.k, read.efSearch, type(read.faiss_index)) == (3, 400, faiss.IndexHNSWFlat)
    assert torch.equal(read.ids, IDS)
    assert_agree(read.search(QUERIES), expected(read, QUERIES, 3))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(IndexFileError, match=r"graph\.faiss"):
        FaissIndex.read(path)


@pytest.mark.parametrize("description", ["BIVF4", "IVF4,PQ4x4fs", "PCA8,IVF4,PQ4x4fs"])
def test_hidden_rows_leave_lists_that_take_no_selector(description):
    index = FaissIndex.from_factory(DIM, description).fit(uniform(700, seed=1).round())
    index.add(uniform(N).round(), ids=IDS)
    index.nprobe = 4
    kept = IDS[torch.arange(N) % 3 > 0]
    vectors, before = index.reconstruct(kept), index.search(QUERIES.round(), N)
    assert index.remove(IDS[::3]) == 100
    assert index.faiss_index.ntotal == index.ntotal == 200
    assert torch.equal(index.reconstruct(kept), vectors)
    after = index.search(QUERIES.round(), 200)
    is_kept = torch.isin(before.ids, kept)
    assert torch.equal(after.scores, before.scores[is_kept].view(-1, 200))
    assert torch.equal(after.ids.sort().values, before.ids[is_kept].view(-1, 200).sort().values)
    # Rows that come again are at the end, those of other ids are where they were.
    index.upsert(uniform(3, seed=8).round(), kept[[50, 7, 9]])
    index.add(uniform(2, seed=9).round(), ids=[1, 2])
    assert index.faiss_index.ntotal == index.ntotal == 202
    others = torch.tensor([place not in (50, 7, 9) for place in range(200)])
    assert torch.equal(index.reconstruct(kept[others]), vectors[others])
    again = FaissIndex.from_factory(DIM, description)
    again.load_state_dict(index.state_dict())
    again.nprobe = 4
    for other in (again, copy.deepcopy(index)):
        assert_agree(other.search(QUERIES.round(), 9), index.search(QUERIES.round(), 9))
    index.remove(index.ids)
    assert index.faiss_index.ntotal == 0
    assert index.search(QUERIES.round(), 2).ids.unique().tolist() == [-1]


def test_lists_in_a_file_are_left_alone(tmp_path):
    inner = faiss.index_binary_factory(DIM, "BIVF4")
    bits = pack_bits(uniform(N).round())
    inner.train(bits.numpy())
    lists = faiss.OnDiskInvertedLists(inner.nlist, inner.code_size, str(tmp_path / "lists"))
    inner.replace_invlists(lists)
    inner.add(bits.numpy())
    inner.nprobe = 4
    index = FaissIndex(inner)
    index.remove(list(range(0, N, 2)))
    assert lists.compute_ntotal() == index.faiss_index.ntotal == N
    assert (index.search(QUERIES.round(), 40).ids % 2 == 1).all()


@pytest.mark.parametrize("bits", [True, False])
def test_lists_that_are_mapped_are_not_written_to(bits, tmp_path):
    rows = pack_bits(uniform(N).round()) if bits else uniform(N)
    inner = faiss.index_binary_factory(DIM, "BIVF4") if bits else faiss.index_factory(DIM, "IVF4,Flat")
    inner.train(rows.numpy())
    inner.add(rows.numpy())
    inner.nprobe = 4
    write, read = (
        (faiss.write_index_binary, faiss.read_index_binary) if bits else (faiss.write_index, faiss.read_index)
    )
    write(inner, str(tmp_path / "a.faiss"))
    before = (tmp_path / "a.faiss").read_bytes()
    index = FaissIndex(read(str(tmp_path / "a.faiss"), faiss.IO_FLAG_MMAP_IFC))
    index.remove(list(range(0, N, 2)))
    made = index.to_faiss()
    assert made.ntotal == N // 2
    queries = QUERIES.round() if bits else QUERIES
    given = pack_bits(queries) if bits else queries
    assert torch.equal(by_hand(made, given, 9)[1], index.search(queries, 9).ids)
    assert (tmp_path / "a.faiss").read_bytes() == before


@pytest.mark.parametrize("description", ["BIVF4", "IVF4,PQ4x4fs"])
def test_the_index_that_was_given_keeps_its_rows(description):
    given = FaissIndex.from_factory(DIM, description).fit(uniform(700, seed=1).round())
    given.add(uniform(N).round(), ids=IDS)
    given.nprobe = 4
    one, other = (FaissIndex(given.faiss_index) for _ in range(2))
    wanted = other.search(QUERIES.round(), 9)
    one.remove(list(range(100)))
    assert one.nprobe == 4
    assert given.faiss_index.ntotal == N
    assert_agree(other.search(QUERIES.round(), 9), wanted)


@pytest.mark.parametrize("step", ["copied", "_take_out", "list_labels"])
def test_a_removal_without_memory_hides_rows(step, monkeypatch):
    index = FaissIndex.from_factory(DIM, "BIVF4").fit(uniform(700, seed=1).round())
    index.add(uniform(N).round(), ids=IDS)
    index.nprobe = 4

    def fail(*arguments, **options):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(handover, step, fail)
        index.remove(IDS[::3])
    assert index.faiss_index.ntotal == N
    assert index.ntotal == 200
    found = index.search(QUERIES.round(), 50).ids
    assert not torch.isin(found, IDS[::3]).any()
    assert (found >= 0).all()
    # The next one finds it.
    index.remove(IDS[1])
    assert index.faiss_index.ntotal == 199


def _remove_in_child(index, status):
    index.remove([1, 2, 3])
    status.value = index.ntotal


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("description", ["BIVF4", "IVF4,PQ4x4fs"])
def test_a_forked_process_removes(description):
    index = FaissIndex.from_factory(DIM, description).fit(uniform(2000, seed=1).round())
    index.add(uniform(2000).round())
    index.search(uniform(500).round(), 5)
    context = multiprocessing.get_context("fork")
    status = context.Value("i", 0)
    child = context.Process(target=_remove_in_child, args=(index, status))
    child.start()
    child.join(60)
    if child.is_alive():
        child.kill()
    assert status.value == 1997
