"""What screens rows of codes: a grid, and the terms of the rows on it."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from elips_torch.core.metric import Metric
from elips_torch.indexes.inverted_lists import SlotChange
from elips_torch.indexes.storage import Snapshot, append_rows, durable
from elips_torch.kernels.code_grid import make_grid
from elips_torch.kernels.coded_rows import CodeGrid, PackedRows
from elips_torch.kernels.packed_native import fill_terms, grid_serves, has_grids
from elips_torch.kernels.search_native import library_is_ready

# Two float32 numbers.
TERM_BYTES = 8


def screened_on_grid(metric: Metric, dim: int, device: torch.device) -> bool:
    """Whether searches of packed rows of so many features on a device use terms."""
    return metric.name in ("l2", "ip") and has_grids(dim, device)


class GridTerms:
    """The terms of rows on a grid, kept right while rows come, go and move.

    They are derived from codes, centroids and what the quantizer has learned: made when a search first
    needs them, they follow the rows from then on. Those of a row lie in its place, which is its slot in
    inverted lists, and else its number. What they hold for places without rows means nothing.
    """

    def __init__(self) -> None:
        self._rest_on: tuple[Snapshot, ...] = ()
        self.forget()

    @property
    def are_made(self) -> bool:
        """Whether there are terms that could follow a change."""
        return self._terms is not None

    def forget(self) -> None:
        """Make the terms anew at the next search."""
        self._is_made = False
        self._grid: CodeGrid | None = None
        self._terms: Tensor | None = None
        self._reserve: Tensor | None = None

    def know(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the terms of rows that rest on tensors as they are now."""
        same = len(tensors) == len(self._rest_on) and all(map(Snapshot.matches, self._rest_on, tensors))
        return self._is_made and same

    def accept(self, tensors: Sequence[Tensor]) -> None:
        """Take tensors, whose changes the terms have followed, for known."""
        self._rest_on = tuple(map(Snapshot, tensors))

    def carry(
        self,
        metric: Metric,
        change: SlotChange,
        packed: PackedRows | None,
        rows: Tensor,  # (F,) int64
    ) -> None:
        """Follow a change of the places, those that it has filled with ``rows (F,)``, packed as given."""
        grid, terms, reserve = self._grid, self._terms, self._reserve
        # Known again when all of it has been carried: memory may run out before.
        self.forget()
        if packed is None or grid is None or terms is None or len(rows) == len(packed.codes):
            return
        with durable():
            if change.capacity > len(terms):
                room = terms.new_empty(change.capacity - len(terms), 2)
                terms, reserve = append_rows(terms, reserve, room)
            elif change.capacity < len(terms):
                reserve = None
            terms = change.carry(terms)
            packed = dataclasses.replace(packed, grid=grid, terms=terms)
            if fill_terms(metric, packed, rows, change.filled, terms):
                self._is_made, self._grid, self._terms, self._reserve = True, grid, terms, reserve

    def of(
        self,
        metric: Metric,
        packed: PackedRows,
        tensors: Sequence[Tensor],
        n_places: int,
        placed: Callable[[], tuple[Tensor, Tensor]],
    ) -> PackedRows:
        """Return rows with their grid and terms, where these serve.

        Args:
            metric: the distance kind.
            packed: the rows as they are stored.
            tensors: what they rest on.
            n_places: number of places.
            placed: returns ``(N,)`` int64 all rows, those of a list one after the other, and ``(N,)`` int64
                the place of each.
        """
        device, dim = packed.codes.device, packed.table.dim
        # Small searches are not worth compiling the code for: it may not be there yet.
        is_ready = screened_on_grid(metric, dim, device) and library_is_ready(device)
        if not is_ready or not grid_serves(dim):
            self.forget()
            return packed
        grid, terms = self._grid, self._terms
        if not self.know(tensors) or (terms is not None and len(terms) != n_places):
            grid, terms = self._make(metric, packed, n_places, *placed())
            # Only now: another thread may be asking, too.
            self._grid, self._terms, self._reserve, self._is_made = grid, terms, None, True
            self.accept(tensors)
        return dataclasses.replace(packed, grid=grid, terms=terms)

    def _make(
        self, metric: Metric, packed: PackedRows, n_places: int, rows: Tensor, places: Tensor
    ) -> tuple[CodeGrid | None, Tensor | None]:
        with durable():
            grid = make_grid(metric, packed.table, packed.centroids)
            if grid is None:
                return None, None
            terms = torch.zeros(n_places, 2, dtype=torch.float32, device="cpu")
            packed = dataclasses.replace(packed, grid=grid, terms=terms)
            made = fill_terms(metric, packed, rows, places, terms)
        return (grid, terms) if made else (None, None)
