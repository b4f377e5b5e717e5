"""Counts of what went through the engine."""

import dataclasses
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from elips_torch.core.locks import ForkSafeLock


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """What the engine had done at one moment.

    Attributes:
        searches: calls, by number of neighbours or by radius; one that asks faiss several times is one.
        queries: queries in all of them.
        bytes: bytes of queries that came in and of results that went out.
        fallbacks: calls that went by a slower way than the one asked for, such as through the CPU.
        cuvs: whether the last search ran with cuVS.
        cuvs_searches: calls that did.
    """

    searches: int = 0
    queries: int = 0
    bytes: int = 0
    fallbacks: int = 0
    cuvs: bool = False
    cuvs_searches: int = 0


class SearchCounter:
    """Counts searches of several threads.

    >>> counter = SearchCounter()
    >>> counter.count(queries=32, nbytes=4096)
    >>> counter.counts().queries
    32
    """

    def __init__(self) -> None:
        self._lock = ForkSafeLock()
        self._thread = threading.local()
        self.reset()

    def count(self, *, queries: int, nbytes: int, fallback: bool = False, cuvs: bool = False) -> None:
        """Count one search.

        Args:
            queries: how many it answered.
            nbytes: bytes that went in and out.
            fallback: whether it went by a slower way than the one asked for.
            cuvs: whether cuVS ran it.
        """
        rounds = getattr(self._thread, "rounds", None)
        if rounds is not None:
            rounds.append((nbytes, fallback, cuvs))
            return
        # Each search comes by here: an object of counts is made only for who asks.
        with self._lock:
            self._searches += 1
            self._queries += queries
            self._bytes += nbytes
            self._fallbacks += fallback
            self._cuvs = cuvs
            self._cuvs_searches += cuvs

    @contextmanager
    def as_one(self, queries: int) -> Iterator[None]:
        """Count what this thread searches inside the block as one search, and nothing where it fails.

        Args:
            queries: how many it answers, whichever of them faiss is asked about again.
        """
        outer = getattr(self._thread, "rounds", None)
        rounds: list[tuple[int, bool, bool]] = []
        self._thread.rounds = rounds
        try:
            yield
        finally:
            self._thread.rounds = outer
        if rounds:
            nbytes, fallbacks, cuvs = zip(*rounds, strict=True)
            self.count(queries=queries, nbytes=sum(nbytes), fallback=any(fallbacks), cuvs=any(cuvs))

    def counts(self) -> EngineStats:
        """Return the counts so far, of one moment."""
        with self._lock:
            return EngineStats(
                self._searches, self._queries, self._bytes, self._fallbacks, self._cuvs, self._cuvs_searches
            )

    def reset(self) -> None:
        """Start from zero."""
        with self._lock:
            self._searches = self._queries = self._bytes = self._fallbacks = self._cuvs_searches = 0
            self._cuvs = False


# Of this process.
SEARCHES = SearchCounter()


def faiss_stats() -> EngineStats:
    """Return what faiss has searched for this process: its own indexes, copies of others, and plain vectors.

    >>> import torch
    >>> from elips_torch import FaissIndex
    >>> index = FaissIndex.from_factory(2, "Flat")
    >>> ids = index.add(torch.ones(1, 2))
    >>> before = faiss_stats().queries
    >>> found = index.search(torch.zeros(3, 2), k=1)
    >>> faiss_stats().queries - before
    3
    """
    return SEARCHES.counts()
