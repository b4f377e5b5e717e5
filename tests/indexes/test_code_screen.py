"""What screens codes follows whatever happens to these, and decides nothing about results."""

import copy
import io
import pickle
import threading

import pytest
import torch
from coded_contract import clustered
from hypothesis import given, settings
from hypothesis import strategies as st

from elips_torch import IVFPQIndex, IVFSQIndex, PQIndex, SQIndex
from elips_torch.core.hardware import device_facts
from elips_torch.core.native import native_reasons
from elips_torch.indexes import code_screen
from elips_torch.indexes.code_screen import CodeScreen
from elips_torch.indexes.inverted_lists import SlotChange
from elips_torch.kernels.coded_rows import CodeGrid
from elips_torch.kernels.plane import encode
from elips_torch.testing.contract import assert_same

REASONS = native_reasons(device_facts("cpu"))
if not device_facts("cpu").vnni:
    REASONS.append("int8 products are slow here, and no terms are kept")
pytestmark = pytest.mark.skipif(bool(REASONS), reason="; ".join(REASONS))
DIM = 24

FAMILIES = {
    "scalars": lambda metric: SQIndex(DIM, "int8", metric),
    "bytes": lambda metric: PQIndex(DIM, 6, metric=metric, niter=2, min_points_per_centroid=1),
    "half bytes": lambda metric: PQIndex(DIM, 8, 4, metric, niter=2, min_points_per_centroid=1),
    "short floats": lambda metric: SQIndex(DIM, "fp16", metric),
}
LISTED = {
    "scalars in lists": lambda metric: IVFSQIndex(DIM, 5, metric=metric, niter=2),
    "bytes in lists": lambda metric: IVFPQIndex(DIM, 5, 6, metric=metric, niter=2, min_points_per_centroid=1),
    "short floats in lists": lambda metric: IVFSQIndex(DIM, 5, "bf16", metric, niter=2),
}


def made(family="scalars", metric="l2", n=700, searched=True):
    index = {**FAMILIES, **LISTED}[family](metric)
    rows = clustered(700, DIM, 0)
    index.fit(rows)
    index.add(rows[:n])
    if searched:
        # The code is compiled at the first large search, or here; the terms are made when it is there.
        for _ in range(2):
            index.search(rows[:2], 3, implementation="native")
        assert index._screening.is_made
    return index


def agrees(index, queries=None, k=5, **parameters):
    """Fail unless searches find what those among the decoded vectors do, bit for bit."""
    queries = clustered(7, DIM, 9) if queries is None else queries
    found = index.search(queries, k, implementation="native", **parameters)
    plain = "eager" if hasattr(index, "nlist") else "decoded"
    assert_same(found, index.search(queries, k, implementation=plain, **parameters))


def terms_as_new(index):
    """Return the terms of the rows, and what they are when they are made anew."""
    known = index._screening._made
    rows = torch.arange(index.ntotal)
    if isinstance(known.fixed, CodeGrid):
        anew = CodeScreen()
        anew.of(index._metric, index._packed(), index._decode, (), index.ntotal, lambda: (rows, rows))
        assert torch.equal(anew._made.fixed.steps, known.fixed.steps)
        terms = anew._made.tensors["terms"]
    else:
        # About the mean of the rows that there were.
        plane = encode(index._metric, index._decode(rows), known.fixed, "int8")
        assert torch.equal(known.tensors["codes"][: index.ntotal], plane.codes)
        terms = plane.terms
    return known.tensors["terms"][: index.ntotal], terms


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n_queries", [1, 5, 21, 70])
def test_results_are_those_among_decoded_vectors(family, metric, n_queries):
    index = made(family, metric, searched=False)
    queries = clustered(n_queries, DIM, 1)
    mask = torch.rand(n_queries, 700, generator=torch.Generator().manual_seed(3)) < 0.3
    exclude = index.search(queries, 4).ids
    for options in ({}, {"mask": mask}, {"mask": mask[0]}, {"exclude": exclude}, {"workspace_bytes": 2**20}):
        for k in (1, 12, 300):
            agrees(index, queries, k, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_far_from_the_origin_and_features_that_do_not_vary(family):
    index = FAMILIES[family]("l2")
    rows = clustered(600, DIM, 0) + 1e3
    rows[:, 3] = 7.0
    index.fit(rows)
    index.add(rows)
    for n_queries in (1, 40):
        agrees(index, clustered(n_queries, DIM, 1) + 1e3)
        agrees(index, 1e4 * clustered(n_queries, DIM, 1))


CHANGES = {
    "add": lambda index: index.add(clustered(50, DIM, 2)),
    "upsert": lambda index: index.upsert(clustered(60, DIM, 3), torch.arange(30, 90)),
    "upsert all": lambda index: index.upsert(clustered(700, DIM, 3), index.ids),
    "remove": lambda index: index.remove(index.ids[::3]),
    "reset": lambda index: (index.reset(), index.add(clustered(90, DIM, 4))),
    "load": lambda index: index.load_state_dict(copy.deepcopy(index).state_dict()),
    "load others": lambda index: index.load_state_dict(made("scalars", n=80).state_dict()),
    "cast": lambda index: index.half(),
    "share": lambda index: index.share_memory(),
    "write": lambda index: index.codes[:90].copy_(index.codes[90:180].clone()),
    "learn": lambda index: index.quantizer.minimum.mul_(-2.0),
    "put": lambda index: setattr(index.quantizer, "extent", 3.0 * index.quantizer.extent),
    "fit": lambda index: (index.reset(), index.fit(clustered(300, DIM, 5)), index.add(clustered(90, DIM, 5))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change):
    index = made()
    CHANGES[change](index)
    for _ in range(2):
        agrees(index)
        agrees(index, clustered(40, DIM, 8))
    terms, anew = terms_as_new(index)
    assert torch.equal(terms, anew)


def test_learned_centroids_that_are_moved_are_seen():
    index = made("bytes")
    index.quantizer.codebooks[0].neg_()
    agrees(index)


@pytest.mark.parametrize("qtype", ["int8", "int6", "int4"])
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_features_whose_steps_are_below_zero(qtype, metric):
    index, rows = SQIndex(DIM, qtype, metric), clustered(700, DIM, 0)
    index.fit(rows)
    index.add(rows)
    index.quantizer.extent[:6].neg_()
    for n_queries in (1, 40):
        agrees(index, clustered(n_queries, DIM, 1))


@pytest.mark.parametrize("family", [*FAMILIES, *LISTED])
def test_what_is_written_while_terms_are_made_is_seen(family, monkeypatch):
    index, make = made(family, searched=False), code_screen._make

    def make_and_write(*arguments):
        found = make(*arguments)
        codes = index.listed_codes if family in LISTED else index.codes
        codes[:350].copy_(codes[350:].clone())
        return found

    with monkeypatch.context() as patches:
        patches.setattr(code_screen, "_make", make_and_write)
        index.search(clustered(3, DIM, 1), 5, implementation="native")
    assert not index._screening.know(index._searched_tensors())
    agrees(index)


@pytest.mark.parametrize("change", ["add", "upsert", "remove"])
@pytest.mark.parametrize("family", [*FAMILIES, *LISTED])
def test_changes_that_the_index_makes_are_followed(family, change, monkeypatch):
    index = made(family)
    made_anew = []
    monkeypatch.setattr(code_screen, "_make", lambda *args: made_anew.append(args))
    CHANGES[change](index)
    index.search(clustered(3, DIM, 1), 5, implementation="native")
    assert not made_anew


@pytest.mark.parametrize("owner", [SlotChange, code_screen], ids=["carry", "fill"])
@pytest.mark.parametrize("change", ["add", "upsert", "remove"])
def test_a_change_that_memory_is_short_for_happens_all_the_same(monkeypatch, change, owner):
    def short(*args):
        raise MemoryError

    index = made()
    with monkeypatch.context() as patches:
        patches.setattr(owner, "carry" if owner is SlotChange else "fill_terms", short)
        CHANGES[change](index)
    assert not index._screening.is_made
    agrees(index)


def test_growth_is_amortised(monkeypatch):
    index, rows = made(n=10), clustered(1, DIM, 2)
    places = []
    for _ in range(400):
        index.add(rows)
        terms = index._screening._made.tensors["terms"]
        assert len(terms) == index.ntotal
        places.append(terms.data_ptr())
    assert len(set(places)) < 10
    agrees(index)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["add", "upsert", "remove", "load", "copy", "cast", "write", "search"]),
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
            agrees(index, clustered(2 + 10 * number, DIM, number))
        elif step == "remove":
            index.remove(index.ids[number :: max(4, number)])
        elif step == "add":
            index.add(clustered(3**number // 2, DIM, number))
        elif step == "upsert":
            index.upsert(clustered(40, DIM, number), torch.arange(40) * (number + 1))
        elif step == "load":
            index.load_state_dict({**index.state_dict(), "ids": index.ids.flip(0)})
        elif step == "copy":
            index = copy.deepcopy(index)
        elif step == "cast":
            index = index.to(torch.float16)
        else:
            index.codes[number::7].bitwise_xor_(1)
    agrees(index)
    agrees(index, clustered(30, DIM, 7))
    terms, anew = terms_as_new(index)
    assert torch.equal(terms, anew)


def test_terms_are_no_state():
    index = made()
    assert not any("terms" in name for name in index.state_dict())
    for twin in (copy.deepcopy(index), pickle.loads(pickle.dumps(index))):
        assert not twin._screening.is_made
        agrees(twin)
    saved = io.BytesIO()
    torch.save(index, saved)
    # Codes and ids, what was learned, and what describes the module.
    assert saved.getbuffer().nbytes < 700 * (DIM + 8) + 8 * DIM + 20_000


@pytest.mark.parametrize("family", [*FAMILIES, *LISTED])
def test_their_memory_is_counted_before_they_are_made(family):
    index = made(family, searched=False)
    stored, places = sum(tensor.nbytes for tensor in index.stored_tensors()), 700
    if family in LISTED:
        # The lists are no buffers.
        stored += index.lists.nbytes
        places = index.lists.capacity
        # Where the code of the row in each slot lies.
        stored += 4 * places
    before = index.memory_bytes()
    for _ in range(2):
        index.search(clustered(3, DIM, 1), 3, implementation="native")
    screen = index._screening._made
    shared = screen.fixed
    if isinstance(shared, CodeGrid):
        tensors = (shared.steps, shared.zero, shared.mean, shared.table, shared.scalars, shared.features)
    else:
        tensors = (shared,)
    tensors = (*tensors, *screen.tensors.values())
    assert all(len(each) == places for each in screen.tensors.values())
    assert before == stored + sum(each.nbytes for each in tensors if each is not None)
    assert index.memory_bytes() == before
    unscreened = {**FAMILIES, **LISTED}[family]("l1")
    assert not unscreened.is_screened


def test_counting_memory_compiles_nothing(monkeypatch):
    monkeypatch.setattr("elips_torch.kernels.search_native.LIBRARY.load", lambda options: 1 / 0)
    index = made(searched=False)
    # Codes, ids and terms; ranges; the grid.
    assert index.memory_bytes() == 700 * (DIM + 8 + 8) + 2 * 4 * DIM + 18 * DIM


@pytest.mark.parametrize("listed", [False, True])
def test_threads_that_search_first_find_the_same(listed):
    index = made("bytes in lists" if listed else "bytes", "l2")
    queries = clustered(40, DIM, 2)
    expected = index.search(queries, 5, implementation="eager" if listed else "decoded")
    for _ in range(30):
        index._screening.forget()
        index._searches.clear()
        found = [None] * 4
        start = threading.Barrier(len(found))

        def search(number, found=found, start=start):
            start.wait()
            found[number] = index.search(queries, 5, implementation="native")

        threads = [threading.Thread(target=search, args=(number,)) for number in range(len(found))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for each in found:
            assert_same(each, expected)


def test_what_was_learned_may_be_learned_further():
    index = made("bytes")
    codebooks = index.quantizer._buffers.pop("codebooks")
    index.quantizer.codebooks = torch.nn.Parameter(codebooks.clone())
    agrees(index)


def test_nothing_is_kept_once_that_is_not_wanted():
    index = made("short floats")
    before = index.memory_bytes()
    index.screen = "none"
    agrees(index)
    assert not index._screening.is_made
    assert index.memory_bytes() < before
