"""Searches of vectors take over from those by codes where these tell too little apart."""

import gc
import threading
import types
import weakref

import pytest
import torch
from preparing import AMONG_CENTROIDS, DIM, agrees, made, vectors

from elips_torch import IVFFlatIndex
from elips_torch.core.hardware import device_facts
from elips_torch.core.native import native_reasons
from elips_torch.indexes import prepared_searches
from elips_torch.kernels import ivf_native
from elips_torch.kernels.plane import plain_plane
from elips_torch.kernels.prepared_native import PreparedSearch

pytestmark = [
    pytest.mark.skipif(
        bool(native_reasons(device_facts("cpu"))), reason="; ".join(native_reasons(device_facts("cpu")))
    ),
    pytest.mark.skipif(not device_facts("cpu").vnni, reason="there are no codes"),
]


def near_ties(metric="l2"):
    """Return an index whose codes say little about which rows of a cluster are near, and queries."""
    generator = torch.Generator().manual_seed(3)
    means = 3 * torch.randn(8, DIM, generator=generator)
    rows = means[torch.arange(12_000) % 8] + 1e-3 * torch.randn(12_000, DIM, generator=generator)
    index = IVFFlatIndex(DIM, 12, metric, nprobe=3, niter=4).fit(rows)
    index.add(rows)
    return index, rows[::500] + 1e-3 * torch.randn(24, DIM, generator=generator)


@pytest.fixture
def clock(monkeypatch):
    """Let a search of the vectors, and one by codes, take as long as said; return that and who has run."""
    said = types.SimpleNamespace(codes=1.0, vectors=1.0, now=0.0, ran=[])
    run = PreparedSearch.run

    def running(self, queries):
        if self.shape[1] not in AMONG_CENTROIDS:
            kind = "codes" if self._search.plane.kind == "int8" else "vectors"
            said.ran.append(kind)
            said.now += getattr(said, kind)
        return run(self, queries)

    monkeypatch.setattr(PreparedSearch, "run", running)
    monkeypatch.setattr(prepared_searches.time, "perf_counter", lambda: said.now)
    return said


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("quicker", ["codes", "vectors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_near_ties_are_told_apart_by_what_is_quicker_here(metric, quicker, dtype, clock):
    index, queries = near_ties(metric)
    queries = queries.to(dtype)
    setattr(clock, quicker, 0.5)
    for _ in range(4):
        agrees(index, queries)
    assert clock.ran == ["codes"] * 4
    for _ in range(4):
        agrees(index, queries)
    assert clock.ran[4:] == ["codes", "vectors"] * 4
    for _ in range(9):
        agrees(index, queries)
    assert clock.ran[12:] == [quicker] * 9
    # What rests on other vectors starts over.
    index.remove(index.ids[:1])
    agrees(index, queries)
    assert clock.ran[21:] == ["codes"]


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_float64_queries_stay_with_codes(metric, clock):
    index, queries = near_ties(metric)
    for _ in range(12):
        agrees(index, queries.double())
    assert set(clock.ran) == {"codes"}


@pytest.mark.parametrize("metric", ["ip", "cosine"])
def test_short_vectors_make_no_plane_for_nothing(metric, clock, monkeypatch):
    index, queries = near_ties(metric)
    index.to(torch.bfloat16)
    monkeypatch.setattr(ivf_native, "plain_plane", lambda *arguments: pytest.fail("made"))
    for _ in range(6):
        agrees(index, queries)
    assert clock.ran == ["codes"] * 6


@pytest.mark.parametrize("quicker", ["codes", "vectors"])
def test_a_plane_is_kept_while_it_serves(quicker, clock, monkeypatch):
    index, queries = near_ties("ip")
    setattr(clock, quicker, 0.5)
    planes = []

    def make(*arguments):
        made = plain_plane(*arguments)
        planes.append(weakref.ref(made))
        return made

    monkeypatch.setattr(ivf_native, "plain_plane", make)
    for n in (24, 23):
        for _ in range(10):
            agrees(index, queries[:n])
    gc.collect()
    # Searches of batches of other sizes share it.
    assert [each() is not None for each in planes] == ([True] if quicker == "vectors" else [False, False])


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory")])
def test_without_memory_for_another_search_codes_go_on(error, clock, monkeypatch):
    index, queries = near_ties("ip")

    def fail(*arguments):
        raise error

    monkeypatch.setattr(ivf_native, "plain_plane", fail)
    for _ in range(12):
        agrees(index, queries)
    assert clock.ran == ["codes"] * 12


def test_queries_without_near_ties_stay_with_codes(clock):
    index = made()
    clock.codes = 9.0
    for _ in range(12):
        agrees(index, vectors(24, 1))
    assert clock.ran == ["codes"] * 12


def test_threads_that_find_out_what_is_quicker_agree(clock):
    index, queries = near_ties("ip")
    wanted = index.search(queries, 5, implementation="eager")
    found = []

    def search():
        found.extend(index.search(queries, 5) for _ in range(25))

    threads = [threading.Thread(target=search) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(found) == 100
    assert "vectors" in clock.ran
    assert all(
        torch.equal(each.ids, wanted.ids) and torch.equal(each.scores, wanted.scores) for each in found
    )
