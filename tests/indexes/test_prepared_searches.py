"""Searches that are prepared for later calls answer like those that are not, whatever happens between."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from preparing import AMONG_CENTROIDS, DIM, FAMILIES, agrees, made, vectors

from elips_torch import FlatIndex, NonFiniteError
from elips_torch.core.hardware import DeviceFacts, device_facts
from elips_torch.core.native import native_reasons
from elips_torch.kernels.prepared_native import PreparedSearch

pytestmark = pytest.mark.skipif(
    bool(native_reasons(device_facts("cpu"))), reason="; ".join(native_reasons(device_facts("cpu")))
)


@pytest.fixture
def prepared(monkeypatch):
    """Watch searches of indexes that were prepared: how many queries each has left open."""
    counts = []
    run = PreparedSearch.run

    def counting(self, queries):
        found = run(self, queries)
        if self.shape[1] not in AMONG_CENTROIDS:
            counts.append(0 if found[2] is None else found[2].numel())
        return found

    monkeypatch.setattr(PreparedSearch, "run", counting)
    return counts


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_a_search_that_prepares_nothing(family, metric, prepared):
    index = made(family, metric)
    for n, k in ((1, 5), (3, 1), (40, 12), (700, 7)):
        for seed in (1, 2):
            agrees(index, vectors(n, seed), k)
    assert len(prepared) >= 8
    assert sum(prepared) < 50


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_queries_of_other_dtypes_and_strides(dtype, prepared):
    index = made()
    agrees(index, vectors(6, 1, dtype))
    agrees(index, vectors(12, 1, dtype)[::2])
    agrees(index, vectors(DIM, 1, dtype)[:, :1].expand(-1, DIM))
    assert len(prepared) == 3


CHANGES = {
    "add": lambda index: index.add(vectors(40, 7)),
    "upsert": lambda index: index.upsert(vectors(300, 8), torch.arange(300)),
    "remove": lambda index: index.remove(torch.arange(0, 900, 2)),
    "reset": lambda index: (index.reset(), index.add(vectors(200, 9))),
    "load": lambda index: index.load_state_dict(made(n=800).state_dict()),
    "fit": lambda index: (index.reset(), index.fit(vectors(700, 3)), index.add(vectors(700, 3))),
    "write": lambda index: index.vectors.mul_(-0.5),
    "write ids": lambda index: index.ids.copy_(index.ids.flip(0)),
    "move centroids": lambda index: index.coarse.vectors[:6].mul_(-1.0),
    "cast": lambda index: index.half(),
    "share": lambda index: index.share_memory(),
    "nothing": lambda index: None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change, prepared):
    index = made()
    queries = vectors(6, 1)
    agrees(index, queries)
    CHANGES[change](index)
    agrees(index, queries)
    agrees(index, queries)
    assert len(prepared) == 3


def test_search_parameters_are_seen(prepared):
    index = made()
    queries = vectors(6, 1)
    few, more = agrees(index, queries, 200, nprobe=1), agrees(index, queries, 200, nprobe=6)
    assert not torch.equal(few, more)
    index.nprobe = 6
    assert torch.equal(agrees(index, queries, 200), more)
    agrees(index, queries, workspace_bytes=2**20)


@pytest.mark.parametrize("family", ["lists", "plain products"])
def test_copies_do_not_share_them(family):
    index = made(family)
    queries = vectors(6, 1)
    index.search(queries, 5)
    twin = copy.deepcopy(index)
    twin.remove(twin.ids[:700])
    agrees(twin, queries)
    agrees(index, queries)


def test_learnable_vectors_are_never_prepared(prepared):
    index = FlatIndex(DIM, "l2", learnable=True, screen="int8")
    index.add(vectors())
    with torch.no_grad():
        index.search(vectors(3, 1), 5, implementation="native")
        index.search(vectors(3, 1), 5)
    assert not prepared


def test_masks_and_exclusions_are_kept(prepared):
    index = made()
    queries = vectors(6, 1)
    best = agrees(index, queries)
    mask = torch.ones(index.ntotal, dtype=torch.bool)
    mask[best[:, 0]] = False
    prepared.clear()
    assert not torch.isin(agrees(index, queries, mask=mask), best[:, 0]).any()
    assert not (agrees(index, queries, exclude=best[:, :1]) == best[:, :1]).any()
    assert not prepared


def test_short_lists_are_read_on(prepared):
    index = made(n=500)
    index.remove(torch.arange(440))
    ids = agrees(index, vectors(5, 1), 40)
    assert (ids >= 0).all()
    assert sum(prepared) == 5


def test_queries_that_are_open_are_searched_again(prepared):
    # Ties next to the middle between two float32 numbers cannot be told from products that round.
    index = FlatIndex(8, "ip")
    rows = torch.zeros(300, 8)
    rows[:, :3] = torch.tensor([1.0, 2.0**-24, 2.0**-30])
    index.add(rows)
    queries = torch.zeros(40, 8)
    queries[:, :3] = torch.tensor([[1.0, 1.0, 2.0**-30], [3.0, 1e-3, 0.0]]).repeat(20, 1)
    index.search(queries, 4, implementation="native")
    prepared.clear()
    agrees(index, queries, 4)
    assert prepared == [20]


def test_what_leaves_most_queries_open_is_given_up(prepared):
    index = FlatIndex(DIM)
    # Ties next to the middle between two float32 numbers.
    rows = torch.zeros(6000, DIM)
    rows[:, :3] = torch.tensor([8192.0, 2.0, 2.0**-30])
    index.add(rows)
    queries = torch.zeros(10, DIM)
    # Queries whose neighbours are beyond doubt.
    far = torch.full((10, DIM), 3e4) * torch.arange(11, 21)[:, None]
    index.add(far)
    prepared.clear()
    for misses in (3, 1, 4):
        for _ in range(misses):
            agrees(index, queries)
        if misses < 4:
            agrees(index, far)
    assert prepared[-4:] == [10] * 4
    prepared.clear()
    agrees(index, queries)
    assert not prepared
    # Batches of other sizes, and other rows, get another chance.
    agrees(index, queries[:4])
    index.remove(index.ids[-1:])
    agrees(index, queries)
    assert prepared == [4, 10]


@pytest.mark.parametrize("family", ["flat", "lists", "plain scalars", "plain products"])
def test_bad_queries_are_named_by_their_own_numbers(family):
    index = made(family)
    queries = vectors(50, 1)
    index.search(queries, 5)
    queries[[17, 33], 2] = torch.nan
    with pytest.raises(NonFiniteError, match="rows 17, 33"):
        index.search(queries, 5)
    unchecked = FlatIndex(DIM, check_finite=False)
    unchecked.add(vectors())
    unchecked.search(queries, 5, implementation="native")
    agrees(unchecked, queries)


def test_nothing_keeps_removed_vectors_alive():
    index = made("flat")
    index.search(vectors(3, 1), 5)
    before = weakref.ref(index.vectors)
    index.reset()
    gc.collect()
    assert before() is None


def test_nothing_keeps_queries_alive():
    index = made()
    base = vectors(300, 1)
    found = weakref.ref(base.untyped_storage())
    index.search(base[:2], 5)
    index.search(base[:40], 5)
    del base
    gc.collect()
    assert found() is None


# Torch's own switch warns where it has no support of Intel's GPUs.
@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning")
@pytest.mark.skipif(not device_facts("cpu").vnni, reason="the library has no second instruction set here")
def test_other_hardware_facts_are_seen(monkeypatch):
    index, queries = made("flat"), vectors(6, 1)
    index.search(queries, 5)
    with torch.backends.mkldnn.flags(enabled=False):
        agrees(index, queries)
    facts = DeviceFacts("cpu", "2 cores", "AVX2")
    for module in (
        "core.hardware",
        "kernels.search_native",
        "indexes.prepared_searches",
        "kernels.knn_native",
    ):
        monkeypatch.setattr(f"elips_torch.{module}.device_facts", lambda device: facts)
    agrees(index, queries)


def test_negated_views_are_resolved():
    index, queries = made("flat", "ip"), vectors(6, 1)
    wanted = index.search(-queries, 5)
    assert torch.equal(index.search(torch._neg_view(queries), 5).ids, wanted.ids)
    mask = torch.ones(index.ntotal, dtype=torch.bool)
    assert torch.equal(index.search(torch._neg_view(queries), 5, mask=mask).ids, wanted.ids)


def test_ties_of_half_precision_leave_nothing_to_a_second_search(prepared):
    index = FlatIndex(64, "ip", dtype=torch.bfloat16, screen="int8")
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(3000, 64, generator=generator))
    index.add(rows)
    index.search(rows[:2], 3, implementation="native")
    prepared.clear()
    agrees(index, rows[:256].bfloat16(), 10)
    assert prepared == [0]


def test_an_index_that_was_loaded_in_inference_mode_sees_what_is_written():
    with torch.inference_mode():
        index = FlatIndex(DIM, "ip")
        index.load_state_dict(made("flat", "ip").state_dict(), assign=True)
        before = index.search(vectors(4, 1), 5)
        index.vectors.mul_(-1.0)
        assert not torch.equal(agrees(index, vectors(4, 1)), before.ids)
    index.upsert(vectors(3, 2), torch.arange(3))
    agrees(index, vectors(4, 1))


def test_tensors_of_inference_mode_are_looked_at_anew():
    index, queries = FlatIndex(DIM), vectors(4, 1)
    with torch.inference_mode():
        index.add(vectors())
        index.vectors = index.vectors * 2.0
        before = agrees(index, queries)
        index.vectors.neg_()
        assert not torch.equal(agrees(index, queries), before)
        index.upsert(vectors(3, 2), torch.arange(3))
        agrees(index, queries)
    index.add(vectors(5, 3))
    agrees(index, queries)


def test_threads_search_at_once():
    index = made()
    queries = [vectors(n, 3) for n in (1, 5, 33, 700)]
    wanted = [index.search(each, 5, implementation="eager") for each in queries]
    failures = []

    def work():
        for _ in range(15):
            for each, right in zip(queries, wanted, strict=True):
                scores, ids = index.search(each, 5)
                if not (torch.equal(scores, right.scores) and torch.equal(ids, right.ids)):
                    failures.append(each.shape[0])

    for _ in range(4):
        # No search is prepared now, and all threads prepare the same.
        index.vectors.mul_(1.0)
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["add", "upsert", "remove", "search"]), st.integers(0, 5)), max_size=8
    ),
    family=st.sampled_from(["flat", "lists", "scalars", "plain scalars", "plain products"]),
)
def test_any_sequence_of_changes_and_searches(steps, family):
    index = made(family, n=600)
    for step, number in steps:
        if step == "search":
            index.search(vectors(2, number), 4)
        elif step == "remove":
            index.remove(index.ids[number :: max(4, number)])
        else:
            CHANGES[step](index)
        agrees(index, vectors(2, 50 + number), 4)
