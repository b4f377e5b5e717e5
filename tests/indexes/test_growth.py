"""Growth is amortised, and leaves what was handed out before alone."""

import os
import statistics
import time

import pytest
import torch

from elips_torch import FlatIndex, IVFFlatIndex
from elips_torch.indexes.storage import append_rows


@pytest.fixture
def _one_thread():
    # Handing small pieces to several threads is what a busy machine delays most.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
def test_a_million_rows_in_batches_cost_at_most_twice_adding_at_once():
    vectors = torch.rand(1_000_000, 64)

    # Of the processor, outside the system: getting memory back that a virtual machine has returned to its
    # host takes as long as the rest of a run, in about every second run.
    def seconds():
        return os.times().user

    def at_once():
        index = FlatIndex(64)
        start = seconds()
        index.add(vectors)
        return seconds() - start

    def in_batches():
        index = FlatIndex(64)
        start = seconds()
        for part in vectors.split(1000):
            index.add(part)
        return seconds() - start

    at_once(), in_batches()
    # Neighbouring runs share the noise of the machine.
    ratios = [in_batches() / at_once() for _ in range(9)]
    assert statistics.median(ratios) <= 2.0, ratios


def test_few_copies_are_made(monkeypatch):
    copied = []

    def count(rows, like):
        copied.append(len(like))
        return torch.empty((rows, *like.shape[1:]), dtype=like.dtype)

    monkeypatch.setattr("elips_torch.indexes.storage._allocate", count)
    tensor, reserve = torch.empty(0, 2**16), None
    for _ in range(200):
        tensor, reserve = append_rows(tensor, reserve, torch.zeros(1, 2**16))
    assert sum(copied) <= 2 * 200


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("order", ["descending", "random"])
def test_own_ids_in_any_order_stay_affordable(order):
    ids = torch.arange(40_000).flip(0) if order == "descending" else torch.randperm(40_000)
    vectors = torch.rand(100, 4)

    def seconds(n):
        index = FlatIndex(4)
        start = time.perf_counter()
        for part in ids[:n].split(100):
            index.add(vectors, ids=part)
        return time.perf_counter() - start

    seconds(2000)
    # Four times the rows: 4 when linear, 16 when quadratic.
    assert statistics.median(seconds(40_000) / seconds(10_000) for _ in range(3)) < 8


def test_tensors_handed_out_before_do_not_change():
    index = FlatIndex(4)
    index.add(torch.rand(10, 4))
    index.add(torch.rand(10, 4))
    ids, first = index.ids, index.ids.clone()
    index.add(torch.rand(10, 4))
    index.remove([0, 5, 9])
    index.add(torch.rand(10, 4))
    assert torch.equal(ids, first)


def test_a_copy_does_not_write_into_the_reserve_of_its_origin():
    import copy

    index = FlatIndex(4)
    for _ in range(2):
        index.add(torch.rand(10, 4))
    twin = copy.copy(index)
    index.add(torch.zeros(5, 4))
    twin.add(torch.ones(5, 4))
    assert index.vectors[-5:].sum() == 0
    assert twin.vectors[-5:].sum() == 20


@pytest.mark.usefixtures("_one_thread")
def test_lists_grow_at_an_affordable_cost():
    coarse = FlatIndex(8)
    coarse.add(torch.rand(50, 8))
    vectors = torch.rand(40_000, 8)

    def seconds(n):
        index = IVFFlatIndex(8, 50, coarse=coarse)
        start = time.perf_counter()
        for part in vectors[:n].split(100):
            index.add(part)
        return time.perf_counter() - start

    seconds(2000)
    # Four times the rows: 4 when linear, 16 when quadratic.
    assert statistics.median(seconds(40_000) / seconds(10_000) for _ in range(3)) < 8
