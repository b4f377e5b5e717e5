"""The plane in the order of the lists stays right, and small, through whatever happens to these."""

import copy
import sys
import threading

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from elips_torch import FlatIndex, IVFFlatIndex
from elips_torch.indexes import inverted_lists, listed_plane
from elips_torch.indexes.inverted_lists import InvertedLists, SlotChange
from elips_torch.indexes.memory_estimate import estimate_memory_bytes
from elips_torch.kernels.packed_native import has_grids
from elips_torch.kernels.search_native import library_reasons
from elips_torch.testing.contract import assert_same

DIM, NLIST = 16, 8
CENTROIDS = 10 * torch.randn(NLIST, DIM, generator=torch.Generator().manual_seed(0))


def near(lists, seed=0):
    """Return one vector in each of the lists ``(N,)``."""
    noise = torch.randn(len(lists), DIM, generator=torch.Generator().manual_seed(seed))
    return CENTROIDS[lists] + noise


def made(n=160, searched=True, metric="l2", screen="int8", dtype=torch.float32):
    coarse = FlatIndex(DIM)
    coarse.add(CENTROIDS)
    index = IVFFlatIndex(DIM, NLIST, metric, coarse=coarse, nprobe=NLIST, screen=screen, dtype=dtype)
    index.add(near(torch.arange(n) % NLIST))
    if searched:
        index.search(CENTROIDS, 3)
    return index


def assert_exact(index):
    flat = FlatIndex(DIM, index.metric, screen="none", dtype=index.dtype)
    flat.add(index.vectors.clone(), index.ids)
    assert_same(index(CENTROIDS, 7), flat(CENTROIDS, 7))


CHANGES = {
    "add": lambda index: index.add(near(torch.full((100,), 7), seed=1)),
    "upsert": lambda index: index.upsert(near(torch.full((100,), 7), seed=2), index.ids[:100]),
    "remove": lambda index: index.remove(index.ids[:40]),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "owner", [SlotChange, InvertedLists, inverted_lists], ids=["carry", "relocate", "ranges"]
)
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_change_that_memory_is_short_for_happens_all_the_same(monkeypatch, change, owner, call):
    index, calls = made(), []
    name = {SlotChange: "carry", InvertedLists: "_relocate", inverted_lists: "concatenated_ranges"}[owner]
    unhurt = getattr(owner, name)

    def short(*args):
        found = unhurt(*args)
        calls.append(name)
        if len(calls) == call:
            raise RuntimeError("not enough memory")
        return found

    with monkeypatch.context() as patches:
        patches.setattr(owner, name, short)
        CHANGES[change](index)
    assert_exact(index)
    largest = int(index.ids.max())
    assert index.add(near(torch.arange(5))).tolist() == list(range(largest + 1, largest + 6))
    assert_exact(index)


def test_all_rows_move_to_one_list():
    index = made()
    for number in range(NLIST):
        index.upsert(near(torch.full((160,), number), seed=number), index.ids)
        assert_exact(index)


def test_lists_that_have_lost_their_rows_let_memory_go():
    index = made(4000)
    before = index.memory_bytes()
    index.remove(index.ids[400:])
    assert_exact(index)
    assert index.memory_bytes() < before / 4
    for number in range(NLIST):
        index.upsert(near(torch.full((400,), number), seed=number), index.ids)
        assert_exact(index)
    assert index.lists.capacity <= 4 * 416
    assert index.plane.codes.shape[0] == index.lists.capacity


def test_threads_that_search_first_find_the_same():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(60):
            index, found, barrier = made(2000, searched=False), [], threading.Barrier(4)

            def search(index=index, found=found, barrier=barrier):
                barrier.wait()
                found.append(index(CENTROIDS, 7))

            threads = [threading.Thread(target=search) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(found) == 4
            for each in found:
                assert_same(each, found[0])
            assert_exact(index)
    finally:
        sys.setswitchinterval(interval)


# Sums of differences have codes of their own.


@pytest.fixture
def in_steps(monkeypatch):
    if not has_grids(DIM, torch.device("cpu")):
        pytest.skip("int8 codes are compared where int8 products are fast")
    monkeypatch.setattr(listed_plane, "_LEAST_INT8_DIM", DIM)


differences = pytest.mark.skipif(
    bool(library_reasons(torch.device("cpu"))), reason="; ".join(library_reasons(torch.device("cpu")))
)


@differences
@pytest.mark.parametrize("kind", ["int8", "bf16"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_codes_of_differences_follow_changes(change, dtype, kind, request):
    if kind == "int8":
        request.getfixturevalue("in_steps")
    index = made(metric="l1", screen="auto", dtype=dtype)
    assert index.plane.kind == kind
    assert index.plane.in_slots
    assert index.plane.step is not None
    for _ in range(3):
        CHANGES[change](index)
        assert_exact(index)
        assert index.plane.knows(index.vectors)
    again = copy.deepcopy(index)
    assert_same(again(CENTROIDS, 7), index(CENTROIDS, 7))


@differences
def test_mean_differences_have_codes_too():
    index = IVFFlatIndex(DIM, NLIST, "gower", nprobe=NLIST)
    vectors = near(torch.arange(400) % NLIST).sigmoid()
    index.fit(vectors).add(vectors)
    flat = FlatIndex(DIM, "gower", screen="none")
    flat.add(vectors)
    queries = near(torch.arange(20) % NLIST, seed=1).sigmoid()
    assert_same(index(queries, 7), flat(queries, 7))
    assert index.plane.step is not None


@pytest.mark.usefixtures("in_steps")
def test_a_step_grows_with_the_rows():
    index = made(metric="l1", screen="auto")
    before = index.plane.step
    for number in range(6):
        index.add(30 * near(torch.arange(100) % NLIST, seed=number))
        assert_exact(index)
    assert index.plane.step > 5 * before
    codes = index.plane.codes[index.lists.places].float()
    assert float(codes.abs().amax()) > 100


@differences
def test_rows_that_codes_cannot_bound_are_compared_as_they_are():
    index = made(metric="l1", screen="auto")
    long = index.add(torch.full((1, DIM), 1e30))
    assert_exact(index)
    assert index.plane.kind == "none"
    index.remove(long)
    assert_exact(index)
    index.plane.forget()
    assert_exact(index)
    assert index.plane.kind == "bf16"


@differences
def test_no_codes_where_none_are_wanted():
    assert made(metric="l1", screen="none").plane.kind == "none"
    assert made(metric="linf", screen="auto").plane.kind == "none"
    assert made(metric="l1", screen="auto", dtype=torch.float64).plane.kind == "none"
    index = made(metric="l1", screen="auto")
    index.double()
    assert_exact(index)
    assert index.plane.kind == "none"
    index.float()
    assert_exact(index)
    assert index.plane.kind == "bf16"


@differences
def test_memory_of_codes_is_known_beforehand():
    index = made(4000, metric="l1", screen="auto")
    assert index.memory_bytes() == pytest.approx(estimate_memory_bytes(index, 4000), rel=0.02)
    without = made(4000, metric="l1", screen="none")
    assert index.memory_bytes() > without.memory_bytes() + 4000 * (2 * DIM + 16)


@pytest.mark.parametrize("metric", ["l2", "l1"])
@pytest.mark.parametrize("searched", [(), ("model",), ("average",), ("model", "average")])
def test_averaged_models_follow(metric, searched):
    model = nn.ModuleDict(
        {"layer": nn.Linear(2, 2), "index": made(searched=False, metric=metric, screen="auto")}
    )
    average = AveragedModel(model)
    owners = {"model": model, "average": average.module}
    for _ in range(3):
        for owner in searched:
            assert_exact(owners[owner]["index"])
        model["index"].upsert(near(torch.full((100,), 7), seed=2), model["index"].ids[:100])
        average.update_parameters(model)
    assert torch.equal(average.module["index"].vectors, model["index"].vectors)
    assert_exact(average.module["index"])


def test_a_plane_moves_and_is_copied_though_it_has_no_buffers():
    index = made()
    assert not list(index.plane.buffers())
    kept = sum(tensor.nbytes for tensor in index.plane.stored_tensors())
    assert kept == index.lists.capacity * (DIM + 16) + 4 * DIM
    assert index.memory_bytes() > kept
    index.share_memory()
    assert all(tensor.is_shared() for tensor in index.plane.stored_tensors())
    assert index.plane.knows(index.vectors)
    copied = copy.deepcopy(index)
    assert copied.plane.codes.data_ptr() != index.plane.codes.data_ptr()
    for each in (index, copied):
        assert_exact(each)
    assert index.to("meta").plane.codes.is_meta


@pytest.mark.parametrize("metric", ["l2", "l1"])
def test_a_row_that_no_code_bounds_takes_the_place_of_one(metric):
    index = made(metric=metric, screen="auto")
    before = index.reconstruct(index.ids[5:6])
    index.upsert(torch.full((1, DIM), 1e19), index.ids[5:6])
    flat = FlatIndex(DIM, metric, screen="none")
    flat.add(index.vectors.clone(), index.ids)
    assert_same(index(before, 1), flat(before, 1))
    assert_exact(index)


@pytest.mark.usefixtures("in_steps")
@pytest.mark.parametrize("size", [0.01, 30.0])
def test_a_step_follows_rows_that_are_replaced_in_batches(size):
    index = made(640, metric="l1", screen="auto")
    before = index.plane.step
    for part in index.ids.clone().repeat(2).split(50):
        index.upsert(size * near(part % NLIST, seed=int(part[0])), part)
        index.search(CENTROIDS, 1)
    assert index.plane.step == pytest.approx(size * before, rel=0.5)
    assert_exact(index)


@pytest.mark.usefixtures("in_steps")
def test_a_plane_stays_where_another_would_leave_as_much(monkeypatch):
    index = made(640, metric="l1", screen="auto")
    codes = index.plane.codes.data_ptr()
    monkeypatch.setattr(type(index.plane), "_make", lambda *args: pytest.fail("made anew"))
    for part in index.ids.clone().split(50):
        index.upsert(near(part % NLIST, seed=int(part[0])), part)
        index.search(CENTROIDS, 1)
    assert index.plane.codes.data_ptr() == codes


@pytest.mark.usefixtures("in_steps")
def test_codes_become_those_that_the_rows_allow():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(16_000, DIM, generator=generator)
    usual = rows[:1200].clone()
    rows[:1200] += 1e6 * rows[:4].repeat(300, 1)
    coarse = FlatIndex(DIM)
    coarse.add(CENTROIDS / 10)
    index = IVFFlatIndex(DIM, NLIST, "l1", coarse=coarse, nprobe=NLIST)
    first = index.add(rows[:1200])
    index.search(CENTROIDS, 1)
    assert index.plane.kind == "none"
    # Few enough of these stay.
    index.upsert(usual[30:], first[30:])
    index.upsert(1e4 * usual[:30], first[:30])
    assert_exact(index)
    assert index.plane.kind == "bf16"
    for part in rows[1200:].split(1000):
        index.add(part)
        assert_exact(index)
    assert index.plane.kind == "int8"
    index.upsert(1e4 * rows[1200:9200], torch.arange(1200, 9200))
    assert_exact(index)
    assert index.plane.kind == "bf16"


def clusters(spread, dim=96, n=8000):
    """Return rows in 8 clusters, which are the lists, and an index with these."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(NLIST, dim, generator=generator)
    coarse = FlatIndex(dim)
    coarse.add(centres)
    rows = centres[torch.arange(n) % NLIST] + spread * torch.randn(n, dim, generator=generator)
    return rows, IVFFlatIndex(dim, NLIST, "l1", coarse=coarse, nprobe=3)


@differences
def test_codes_tell_the_rows_of_a_list_apart_or_are_not_kept():
    tight, index = clusters(1e-4)
    usual, _ = clusters(0.5)
    ids = index.add(tight)
    index.search(tight[:3], 5)
    assert index.plane.kind == "none"
    for part, new in zip(ids.split(1000), usual.split(1000), strict=True):
        index.upsert(new, part)
        index.search(new[:3], 5)
    assert index.plane.kind in ("int8", "bf16")
    for part, new in zip(ids.split(1000), tight.split(1000), strict=True):
        index.upsert(new, part)
        index.search(new[:3], 5)
    assert index.plane.kind == "none"


@differences
def test_memory_is_that_of_the_codes_that_the_rows_have():
    rows, index = clusters(0.5)
    rows[:, 5] *= 1000
    index.add(rows)
    index.search(rows[:3], 5)
    assert index.plane.kind == "bf16"
    assert index.memory_bytes() == pytest.approx(estimate_memory_bytes(index, len(rows)), rel=0.02)


@differences
def test_codes_are_chosen_under_any_default_device():
    rows, index = clusters(0.5)
    index.add(rows)
    with torch.device("meta"):
        found = index.search(rows[:3], 5)
    assert index.plane.kind in ("int8", "bf16")
    assert_same(found, index.search(rows[:3], 5))
