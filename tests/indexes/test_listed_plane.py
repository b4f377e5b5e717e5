"""The plane in the order of the lists stays right, and small, through whatever happens to these."""

import sys
import threading

import pytest
import torch

from elips_torch import FlatIndex, IVFFlatIndex
from elips_torch.indexes import inverted_lists
from elips_torch.indexes.inverted_lists import InvertedLists, SlotChange
from elips_torch.testing.contract import assert_same

DIM, NLIST = 16, 8
CENTROIDS = 10 * torch.randn(NLIST, DIM, generator=torch.Generator().manual_seed(0))


def near(lists, seed=0):
    """Return one vector in each of the lists ``(N,)``."""
    noise = torch.randn(len(lists), DIM, generator=torch.Generator().manual_seed(seed))
    return CENTROIDS[lists] + noise


def made(n=160, searched=True):
    coarse = FlatIndex(DIM)
    coarse.add(CENTROIDS)
    index = IVFFlatIndex(DIM, NLIST, coarse=coarse, nprobe=NLIST, screen="int8")
    index.add(near(torch.arange(n) % NLIST))
    if searched:
        index.search(CENTROIDS, 3)
    return index


def assert_exact(index):
    flat = FlatIndex(DIM, screen="none")
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
