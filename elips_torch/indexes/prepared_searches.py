"""Searches of an index that are ready for queries like those of earlier calls."""

import dataclasses
import statistics
import time
import weakref
from collections.abc import Callable, Hashable, MutableMapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from elips_torch.core.hardware import device_facts
from elips_torch.core.metric import Metric
from elips_torch.core.native import native_threads
from elips_torch.core.validation import check_values
from elips_torch.indexes.base import Index
from elips_torch.indexes.storage import Snapshot
from elips_torch.kernels.plane import Plane
from elips_torch.kernels.prepared_native import PreparedSearch
from elips_torch.kernels.search_native import library_is_ready
from elips_torch.kernels.selection import Selection

# So many are kept, for batches of different sizes.
_MOST_SEARCHES = 8
# So often in a row may one have much to do, or leave most queries open.
_MOST_MISSES = 4
# So many calls are answered by two of them, to find out which is quicker.
_CALLS = 4


class _Contest:
    """Two searches with the same results, both of which answer until it is known which is quicker."""

    def __init__(self, first: PreparedSearch, second: PreparedSearch) -> None:
        self.searches = first, second
        self._ratios: list[float] = []

    def note(self, first_seconds: float, second_seconds: float) -> PreparedSearch | None:
        """Take down how long the two took for a call, all in all; return the winner, once it is known."""
        self._ratios.append(second_seconds / max(first_seconds, 1e-9))
        if len(self._ratios) < _CALLS:
            return None
        first, second = self.searches
        winner = second if statistics.median(self._ratios) < 1 else first
        winner.misses = 0
        return winner


@dataclasses.dataclass
class _Ready:
    """What is prepared for tensors as they are.

    Attributes:
        snapshots: those of the tensors.
        searches: by what they serve; None where there is none.
        shared: what several of them rest on, by name, as long as one does.
    """

    snapshots: tuple[Snapshot, ...] = ()
    searches: dict[Hashable, PreparedSearch | _Contest | None] = dataclasses.field(default_factory=dict)
    shared: MutableMapping[str, Plane] = dataclasses.field(default_factory=weakref.WeakValueDictionary)

    def rests_on(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the tensors, and as they were."""
        return len(self.snapshots) == len(tensors) and all(map(Snapshot.matches, self.snapshots, tensors))

    def find(
        self, key: Hashable, prepare: Callable[[], PreparedSearch | None]
    ) -> PreparedSearch | _Contest | None:
        """Return the search of a key, which is prepared where there was none before."""
        if key in self.searches:
            return self.searches.get(key)
        found = prepare()
        if len(self.searches) >= _MOST_SEARCHES:
            self.searches.clear()
        self.searches[key] = found
        return found

    def replace(self, before: PreparedSearch | _Contest, after: PreparedSearch | _Contest | None) -> None:
        """Run another search from now on, or none."""
        for key in [key for key, each in self.searches.copy().items() if each is before]:
            self.searches[key] = after

    def give_up(self, prepared: PreparedSearch, is_open: bool) -> None:
        """Try what may be quicker than a search, or run it no more if it leaves most queries open."""
        # What leaves most of the work to others is in their way.
        after: PreparedSearch | _Contest | None = None if is_open else prepared
        make, prepared.instead = prepared.instead, None
        if make is not None:
            try:
                instead = make(self.shared)
            except (MemoryError, RuntimeError):
                # There are results without it.
                instead = None
            if instead is not None:
                after = _Contest(prepared, instead)
        self.replace(prepared, after)


class PreparedSearches:
    """The prepared searches of an index, kept until a tensor that they rest on changes."""

    def __init__(self) -> None:
        self._ready = _Ready()

    def clear(self) -> None:
        """Forget all searches, and the tensors that these hold."""
        self._ready = _Ready()

    def run(
        self,
        queries: Tensor,  # (Q, D)
        k: int,
        selection: Selection,
        implementation: str,
        settings: Hashable,
        rests_on: Sequence[Tensor],
        prepare: Callable[[], PreparedSearch | None],
        search: Callable[[Tensor], tuple[Tensor, Tensor]],
        checked_by: Metric | None,
    ) -> tuple[Tensor, Tensor]:
        """Search by what is prepared, and otherwise where that leaves queries open.

        Args:
            queries: ``(Q, D)``, on the index's device.
            k: number of neighbours.
            selection: rows that each query may see; only searches of all rows are prepared.
            implementation: "auto" or a name.
            settings: what else decides about a search.
            rests_on: the tensors of the index that searches read.
            prepare: makes a search for queries like these; None where that cannot be.
            search: returns scores and rows ``(M, K)`` of queries ``(M, D)``: all of these, or some where
                there is no selection.
            checked_by: the metric whose domain queries must lie in; None where nobody checks.

        Returns:
            Scores and rows ``(Q, K)``.
        """
        ready = found = None
        if (
            queries.device.type == "cpu"
            and implementation in ("auto", "native")
            and selection.sees_all
            and queries.shape[0]
        ):
            ready = self._ready_for(rests_on)
        if ready is not None:
            # All that a prepared search does not know.
            key = (
                queries.shape[0],
                queries.dtype,
                k,
                implementation,
                settings,
                native_threads(),
                device_facts(queries.device),
                torch.backends.mkldnn.enabled,
                library_is_ready(queries.device),
            )
            found = ready.find(key, prepare)
        if ready is None or found is None:
            return search(queries)

        def answer(prepared: PreparedSearch) -> tuple[Tensor, Tensor, float]:
            start = time.perf_counter()
            scores, rows, left, was_hard = prepared.run(queries)
            n_left = 0 if left is None else left.numel()
            if left is not None and n_left:
                # Some of the queries alone would be named by other numbers.
                if checked_by is not None:
                    check_values("queries", queries, checked_by)
                scores[left], rows[left] = search(queries[left])
            is_open = 2 * n_left > queries.shape[0]
            is_miss = is_open or (was_hard and prepared.instead is not None)
            prepared.misses = prepared.misses + 1 if is_miss else 0
            if prepared is found and prepared.misses >= _MOST_MISSES:
                ready.give_up(prepared, is_open)
            return scores, rows, time.perf_counter() - start

        if isinstance(found, PreparedSearch):
            return answer(found)[:2]
        (_, _, first_seconds), (scores, rows, second_seconds) = map(answer, found.searches)
        winner = found.note(first_seconds, second_seconds)
        if winner is not None:
            ready.replace(found, winner)
        return scores, rows

    def _ready_for(self, tensors: Sequence[Tensor]) -> _Ready | None:
        """Return what is prepared for tensors as they are; None where nobody can tell how they are."""
        ready = self._ready
        if not ready.rests_on(tensors):
            if any(isinstance(tensor, nn.Parameter) for tensor in tensors):
                # Fused optimisers leave no trace of what they write.
                return None
            # What another thread has made of the tensors before goes with them.
            ready = self._ready = _Ready(tuple(map(Snapshot, tensors)))
        return ready


class PreparesSearches(Index):
    """An index that keeps prepared searches."""

    def _attach(self) -> None:
        super()._attach()
        self._searches = PreparedSearches()

    def _searched_tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors that a search reads, beside what is derived from them."""
        return self._row_tensors()

    def _search_prepared(
        self,
        queries: Tensor,
        k: int,
        selection: Selection,
        implementation: str,
        settings: Hashable,
        prepare: Callable[[], PreparedSearch | None],
        search: Callable[[Tensor], tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Search by what is prepared, else by ``search``; arguments as for `PreparedSearches.run`."""
        return self._searches.run(
            queries,
            k,
            selection,
            implementation,
            settings,
            self._searched_tensors(),
            prepare,
            search,
            self._metric if self.check_finite else None,
        )

    # What they hold is let go with what it was made of.

    def _assign_rows(self, tensors: dict[str, Tensor]) -> None:
        super()._assign_rows(tensors)
        self._searches.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._searches.clear()
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.pop("_searches", None)
        return state
