"""Searches of an index that are ready for queries like those of earlier calls."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from elips_torch.core.hardware import device_facts
from elips_torch.core.metric import Metric
from elips_torch.core.native import native_threads
from elips_torch.core.validation import check_values
from elips_torch.indexes.base import Index
from elips_torch.indexes.storage import Snapshot
from elips_torch.kernels.prepared_native import PreparedSearch
from elips_torch.kernels.search_native import library_is_ready
from elips_torch.kernels.selection import Selection

# So many are kept, for batches of different sizes.
_MOST_SEARCHES = 8
# So often in a row may one leave most queries open.
_MOST_MISSES = 4


class PreparedSearches:
    """The prepared searches of an index, kept until a tensor that they rest on changes."""

    def __init__(self) -> None:
        self._state: tuple[tuple[Snapshot, ...], dict[Hashable, PreparedSearch | None]] = ((), {})

    def clear(self) -> None:
        """Forget all searches, and the tensors that these hold."""
        self._state = ((), {})

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
        prepared = None
        if (
            queries.device.type == "cpu"
            and implementation in ("auto", "native")
            and selection.mask is None
            and selection.exclude is None
            and queries.shape[0]
        ):
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
            prepared = self._find(key, rests_on, prepare)
        if prepared is None:
            return search(queries)
        scores, rows, left = prepared.run(queries)
        n_left = 0 if left is None else left.numel()
        # What leaves most of the work to others is in their way.
        prepared.misses = prepared.misses + 1 if 2 * n_left > queries.shape[0] else 0
        if prepared.misses >= _MOST_MISSES:
            self._give_up(prepared)
        if left is not None and n_left:
            # Some of the queries alone would be named by other numbers.
            if checked_by is not None:
                check_values("queries", queries, checked_by)
            scores[left], rows[left] = search(queries[left])
        return scores, rows

    def _give_up(self, prepared: PreparedSearch) -> None:
        """Run a search no more while the tensors stay as they are."""
        searches = self._state[1]
        for key in [key for key, each in searches.copy().items() if each is prepared]:
            searches[key] = None

    def _find(
        self, key: Hashable, rests_on: Sequence[Tensor], prepare: Callable[[], PreparedSearch | None]
    ) -> PreparedSearch | None:
        snapshots, searches = self._state
        if len(snapshots) != len(rests_on) or not all(map(Snapshot.matches, snapshots, rests_on)):
            if any(isinstance(tensor, nn.Parameter) for tensor in rests_on):
                # Fused optimisers leave no trace of what they write.
                return None
            # What another thread has made of the tensors before goes with them.
            snapshots, searches = self._state = tuple(map(Snapshot, rests_on)), {}
        if key not in searches:
            found = prepare()
            if len(searches) >= _MOST_SEARCHES:
                searches.clear()
            searches[key] = found
            return found
        return searches.get(key)


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
