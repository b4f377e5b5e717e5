"""Inverted lists hold exactly the right rows, whatever happens to the assignments."""

import statistics
import time

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elips_torch.indexes.inverted_lists import SLOT_ALIGNMENT, InvertedLists

NLIST = 5


class Followed:
    """Lists, the assignments that they are derived from, and payload that follows their slots."""

    def __init__(self, assignments, nlist=NLIST):
        self.lists = InvertedLists()
        self.nlist = nlist
        self.assignments = assignments
        # The payload of a row, whatever its number: removal changes numbers.
        self.values = torch.arange(len(assignments)) + 1000
        self.payload = torch.empty(0, dtype=torch.int64)
        self.follow([self.lists.rebuild(assignments, nlist)])

    def follow(self, changes):
        for change in changes:
            assert change is changes[-1] or not change.filled.numel()
            self.payload = change.carry(self.payload)
            rows = self.lists.slots[change.filled]
            self.payload[change.filled] = self.values[rows]

    def add(self, new):
        largest = int(self.values.max()) if len(self.values) else 1000
        self.assignments = torch.cat([self.assignments, new])
        self.values = torch.cat([self.values, largest + 1 + torch.arange(len(new))])
        self.follow([self.lists.append(new, self.assignments)])

    def overwrite(self, rows, new):
        self.assignments = self.assignments.index_copy(0, rows, new)
        self.values = self.values.index_copy(0, rows, self.values[rows] + 10**6)
        self.follow(self.lists.move(rows, self.assignments))

    def keep(self, keep):
        self.assignments = self.assignments[keep]
        self.values = self.values[keep]
        self.follow([self.lists.keep(keep, self.assignments)])

    def check(self):
        lists, layout = self.lists, self.lists.layout
        for number in range(self.nlist):
            start, size = int(layout.starts[number]), int(layout.sizes[number])
            rows = layout.slots[start : start + size]
            assert sorted(rows.tolist()) == (self.assignments == number).nonzero()[:, 0].tolist()
            assert torch.equal(self.payload[start : start + size], self.values[rows])
        assert torch.equal(layout.slots[layout.places], torch.arange(len(self.assignments)))
        assert int((layout.slots >= 0).sum()) == len(self.assignments)
        # No two lists own a slot, and each begins at a block.
        owned = sorted(zip(layout.starts.tolist(), lists.capacities.tolist(), strict=True))
        ends = [start + size for start, size in owned]
        assert all(end <= start for end, (start, size) in zip(ends, owned[1:], strict=False) if size)
        assert not any(start % SLOT_ALIGNMENT for start, _ in owned)
        assert (lists.sizes <= lists.capacities).all()
        assert max(ends) <= lists.used <= lists.capacity == len(self.payload)
        assert lists.knows(self.assignments)


# Some batches are large, some fall into one list.
batches = st.tuples(st.integers(0, 90), st.lists(st.integers(0, NLIST - 1), min_size=1, max_size=NLIST))
steps = st.lists(st.tuples(st.sampled_from(["add", "remove", "upsert"]), batches), max_size=12)


def drawn(batch, seed):
    size, lists = batch
    generator = torch.Generator().manual_seed(seed)
    pick = torch.randint(0, len(lists), (size,), generator=generator)
    return torch.tensor(lists)[pick].to(torch.int32)


@settings(deadline=None, max_examples=150)
@given(batches, steps, st.integers(0, 2**16))
def test_any_sequence_of_changes_leaves_exactly_the_right_rows(first, changes, seed):
    followed = Followed(drawn(first, seed))
    followed.check()
    for number, (verb, batch) in enumerate(changes):
        new = drawn(batch, seed + number)
        order = torch.randperm(len(followed.assignments), generator=torch.Generator().manual_seed(number))
        if verb == "add":
            followed.add(new)
        elif verb == "remove":
            keep = torch.ones(len(order), dtype=torch.bool)
            keep[order[: len(new)]] = False
            followed.keep(keep)
        else:
            rows = order[: len(new)]
            followed.overwrite(rows, new[: len(rows)])
        followed.check()


def test_what_is_abandoned_stays_a_fraction():
    followed = Followed(torch.empty(0, dtype=torch.int32))
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        followed.add(torch.randint(0, NLIST, (40,), generator=generator).to(torch.int32))
        lists = followed.lists
        owned = int(lists.capacities.sum())
        assert owned <= 1.5 * len(followed.assignments) + 2 * NLIST * SLOT_ALIGNMENT
        assert lists.used <= 1.5 * owned + NLIST * SLOT_ALIGNMENT
        assert lists.capacity <= 1.5**2 * owned + 2 * NLIST * SLOT_ALIGNMENT
    followed.check()


def test_adding_costs_what_is_new():
    def seconds(n):
        generator = torch.Generator().manual_seed(0)
        assignments = torch.randint(0, 200, (n,), generator=generator).to(torch.int32)
        lists = InvertedLists()
        lists.rebuild(assignments[:0], 200)
        start = time.perf_counter()
        for stop in range(100, n + 1, 100):
            lists.append(assignments[stop - 100 : stop], assignments[:stop])
        return time.perf_counter() - start

    seconds(2000)
    # Four times the rows: 4 when linear, 16 when quadratic.
    assert statistics.median(seconds(160_000) / seconds(40_000) for _ in range(3)) < 8


def test_moved_slots_are_few():
    followed = Followed(torch.arange(1000, dtype=torch.int32) % NLIST)
    keep = torch.ones(1000, dtype=torch.bool)
    keep[::100] = False
    followed.assignments = followed.assignments[keep]
    change = followed.lists.keep(keep, followed.assignments)
    assert change.sources.numel() <= 10
    assert not change.filled.numel()


def test_lists_notice_what_others_write():
    assignments = torch.zeros(10, dtype=torch.int32)
    lists = InvertedLists()
    lists.rebuild(assignments, 2)
    assert lists.knows(assignments)
    assert not lists.knows(assignments.clone())
    assignments[3] = 1
    assert not lists.knows(assignments)
