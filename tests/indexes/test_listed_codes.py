"""Codes in lists lie together after a search, and nobody can tell but by the time that it takes."""

import copy
import io
import pickle
import threading

import pytest
import torch
from coded_contract import clustered
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel

from elips_torch import IVFPQIndex, IVFSQIndex
from elips_torch.indexes import listed_codes
from elips_torch.indexes.inverted_lists import InvertedLists
from elips_torch.testing.contract import assert_same

DIM = 24

FAMILIES = {
    "scalars": lambda metric: IVFSQIndex(DIM, 7, metric=metric, niter=2, nprobe=3),
    "six bits": lambda metric: IVFSQIndex(DIM, 7, "int6", metric, niter=2, nprobe=3),
    "short floats": lambda metric: IVFSQIndex(DIM, 7, "fp16", metric, niter=2, nprobe=3),
    "parts": lambda metric: IVFPQIndex(DIM, 7, 6, 8, metric, niter=2, nprobe=3, min_points_per_centroid=1),
    "half bytes": lambda metric: IVFPQIndex(
        DIM, 7, 8, 4, metric, niter=2, nprobe=3, min_points_per_centroid=1
    ),
}


@pytest.fixture(autouse=True)
def _few_codes_are_moved_too(monkeypatch):
    monkeypatch.setattr(listed_codes, "_FEW_BYTES", 0)


def made(family="scalars", metric="l2", n=600):
    index, rows = FAMILIES[family](metric), clustered(700, DIM, 0)
    index.fit(rows)
    index.add(rows[:n])
    return index


def search(index, queries, **options):
    return index.search(queries, 5, implementation="native", **options)


def is_together(index):
    """Whether the codes of each list follow each other."""
    lists = index.assignments[index.code_places.argsort()]
    return len(lists.unique_consecutive()) == len(lists.unique())


def agrees(index, seed=9):
    """Fail unless the codes are where they are said to be, and all searches find the same."""
    placed = index._placed_codes()
    if placed.slots_are_known:
        slots = index.lists.slots
        assert torch.equal(placed.of_slots[slots >= 0], index.code_places[slots[slots >= 0]])
    assert torch.equal(index.code_places.sort().values, torch.arange(index.ntotal, dtype=torch.int32))
    plain = type(index)._from_config(index.config(), None)
    plain.load_state_dict(index.state_dict())
    for n_queries in (1, 6, 50):
        queries = clustered(n_queries, DIM, seed)
        wanted = plain.search(queries, 5, implementation="eager")
        assert_same(search(index, queries), wanted)
        assert_same(index.search(queries, 5, implementation="eager"), wanted)
    assert torch.equal(index.reconstruct(index.ids), plain.reconstruct(plain.ids))


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("family", FAMILIES)
def test_results_are_the_same_and_the_order_of_rows_stays(family, metric):
    index = made(family, metric)
    codes, ids, assignments = index.codes, index.ids.clone(), index.assignments.clone()
    assert not is_together(index)
    agrees(index)
    assert is_together(index)
    assert not torch.equal(index.listed_codes, codes)
    assert torch.equal(index.codes, codes)
    assert torch.equal(index.ids, ids)
    assert torch.equal(index.assignments, assignments)
    queries = clustered(20, DIM, 1)
    mask = torch.rand(20, index.ntotal, generator=torch.Generator().manual_seed(3)) < 0.3
    exclude = index.search(queries, 4).ids
    for options in ({"mask": mask}, {"mask": mask[0]}, {"exclude": exclude}, {"workspace_bytes": 2**20}):
        found = index.search(queries, 5, implementation="native", **options)
        assert_same(found, index.search(queries, 5, implementation="eager", **options))


def test_few_new_codes_lie_at_the_end_until_there_are_many():
    index = made()
    search(index, clustered(3, DIM, 1))
    for n, moves in ((150, False), (149, False), (3, True)):
        index.add(clustered(n, DIM, n))
        before = index.listed_codes.data_ptr()
        agrees(index)
        assert is_together(index) == moves
        assert (index.listed_codes.data_ptr() != before) == moves


def test_small_indexes_and_those_that_nobody_searches_are_left_alone(monkeypatch):
    index = made()
    index.range_search(clustered(3, DIM, 1), 1.0)
    assert not is_together(index)
    monkeypatch.setattr(listed_codes, "_FEW_BYTES", 600 * DIM)
    search(index, clustered(3, DIM, 1))
    assert not is_together(index)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["add", "upsert", "remove", "load", "copy", "pickle", "cast", "write", "search"]),
            st.integers(0, 6),
        ),
        max_size=9,
    ),
    family=st.sampled_from(list(FAMILIES)),
)
def test_any_sequence_of_changes_and_searches(steps, family):
    index = made(family, n=300)
    for step, number in steps:
        if step == "search":
            agrees(index, number)
        elif step == "remove":
            index.remove(index.ids[number :: max(2, number)])
        elif step == "add":
            index.add(clustered(3**number // 2, DIM, number))
        elif step == "upsert":
            index.upsert(clustered(40, DIM, number), torch.arange(40) * (number + 1))
        elif step == "load":
            index.load_state_dict({**index.state_dict(), "ids": index.ids.flip(0)})
        elif step == "copy":
            index = copy.deepcopy(index)
        elif step == "pickle":
            index = pickle.loads(pickle.dumps(index))
        elif step == "cast":
            index = index.to(torch.float16)
        elif index.ntotal:
            # Behind the back of the index.
            index.listed_codes[number::7].bitwise_xor_(1)
            index.code_places.copy_(index.code_places.flip(0))
            index.assignments[number::5] = index.assignments[0].item()
    agrees(index)


def test_a_checkpoint_holds_codes_in_the_order_of_rows():
    index, unsearched = made(), made()
    search(index, clustered(3, DIM, 1))
    kept, wanted = index.state_dict(), unsearched.state_dict()
    assert kept.keys() == wanted.keys()
    assert not any("listed" in name or "places" in name for name in kept)
    assert all(torch.equal(kept[name], wanted[name]) for name in kept)
    index.index_in_state_dict = False
    assert "codes" not in index.state_dict()


def test_no_spare_memory_is_pickled():
    index = made()
    for _ in range(3):
        index.add(clustered(40, DIM, 1))
        search(index, clustered(3, DIM, 1))
    saved = io.BytesIO()
    torch.save(index, saved)
    # Codes, places, lists and ids; centroids and ranges; what describes the modules.
    assert saved.getbuffer().nbytes < index.ntotal * (DIM + 4 + 4 + 8) + 4 * DIM * 9 + 40_000


def test_averaged_models_follow():
    model = nn.ModuleDict({"layer": nn.Linear(2, 2), "index": made()})
    average = AveragedModel(model)
    search(model["index"], clustered(3, DIM, 1))
    model["index"].remove(model["index"].ids[:50])
    model["index"].add(clustered(50, DIM, 7))
    for _ in range(2):
        average.update_parameters(model)
    copied = average.module["index"]
    assert torch.equal(copied.codes, model["index"].codes)
    agrees(copied)


def test_memory_that_is_short_leaves_codes_where_they_are(monkeypatch):
    index = made()

    def short(*args):
        raise MemoryError

    with monkeypatch.context() as patches:
        patches.setattr(listed_codes, "ask_for_huge_pages", short)
        agrees(index)
    assert not is_together(index)


def test_shared_memory():
    index = made().share_memory()
    assert is_together(index)
    for _ in range(2):
        agrees(index)
        assert index.listed_codes.is_shared()
        assert index.code_places.is_shared()


def test_places_that_somebody_has_spoiled_are_refused():
    index = made()
    search(index, clustered(3, DIM, 1))
    index.code_places[5] = 10**9
    with pytest.raises(IndexError, match=r"code_places is 0 to 1000000000, expected 0 <= place < 600"):
        search(index, clustered(3, DIM, 1))


def test_lists_that_another_thread_makes_anew_go_with_their_own_places(monkeypatch):
    index = made()
    queries = clustered(40, DIM, 2)
    search(index, queries)
    # Behind the back of the index; as many slots as before.
    index.assignments.copy_((index.assignments + 1) % 7)
    reached, go_on, found = threading.Event(), threading.Event(), []
    unhurt = InvertedLists.rebuild

    def slow(lists, *args):
        change = unhurt(lists, *args)
        if threading.current_thread().name == "first":
            reached.set()
            go_on.wait(20)
        return change

    monkeypatch.setattr(InvertedLists, "rebuild", slow)
    first = threading.Thread(target=lambda: search(index, queries), name="first")
    first.start()
    assert reached.wait(20)
    found.append(search(index, queries))
    go_on.set()
    first.join()
    assert_same(found[0], index.search(queries, 5, implementation="eager"))


@pytest.mark.parametrize("family", ["scalars", "short floats", "parts"])
def test_threads_that_search_first_find_the_same(family):
    index = made(family)
    queries = clustered(40, DIM, 2)
    expected = index.search(queries, 5, implementation="eager")
    scattered = index.codes
    for _ in range(25):
        with torch.no_grad():
            index._load_rows({**rows_of(index), "codes": scattered}, assign=True)
        found = [None] * 4
        start = threading.Barrier(len(found))

        def run(number, found=found, start=start):
            start.wait()
            found[number] = search(index, queries)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(len(found))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert is_together(index)
        for each in found:
            assert_same(each, expected)


def rows_of(index):
    return {name: getattr(index, name).clone() for name in index.row_tensors}
