"""Counts of what went through the engine."""

import dataclasses
import threading


@dataclasses.dataclass(frozen=True)
class EngineCounts:
    """What the engine had done at one moment.

    Attributes:
        searches: calls.
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


class EngineStats:
    """Counts searches of several threads.

    >>> stats = EngineStats()
    >>> stats.count(queries=32, nbytes=4096)
    >>> stats.counts().queries
    32
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = EngineCounts()

    def count(self, *, queries: int, nbytes: int, fallback: bool = False, cuvs: bool = False) -> None:
        """Count one search.

        Args:
            queries: how many it answered.
            nbytes: bytes that went in and out.
            fallback: whether it went by a slower way than the one asked for.
            cuvs: whether cuVS ran it.
        """
        with self._lock:
            now = self._counts
            self._counts = EngineCounts(
                now.searches + 1,
                now.queries + queries,
                now.bytes + nbytes,
                now.fallbacks + fallback,
                cuvs,
                now.cuvs_searches + cuvs,
            )

    def counts(self) -> EngineCounts:
        """Return the counts so far, of one moment."""
        with self._lock:
            return self._counts

    def reset(self) -> None:
        """Start from zero."""
        with self._lock:
            self._counts = EngineCounts()


# Of this process.
ENGINE_STATS = EngineStats()


def faiss_stats() -> EngineCounts:
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
    return ENGINE_STATS.counts()
