"""What screens rows of codes: a grid, and the terms of the rows on it."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from elips_torch.core.metric import Metric
from elips_torch.indexes.inverted_lists import SlotChange
from elips_torch.indexes.storage import Snapshot, append_rows, durable
from elips_torch.kernels.code_grid import has_grid, make_grid
from elips_torch.kernels.coded_rows import CodeGrid, PackedRows, PackedTable
from elips_torch.kernels.packed_native import fill_terms, grid_serves, has_grids
from elips_torch.kernels.search_native import library_is_ready

# Two float32 numbers.
TERM_BYTES = 8


def screened_on_grid(metric: Metric, table: PackedTable, dim: int, device: torch.device) -> bool:
    """Whether searches of packed rows of a table on a device use terms; fitted or not yet."""
    return has_grid(metric, table) and has_grids(dim, device)


@dataclasses.dataclass(frozen=True)
class _Made:
    """Terms as they were made, in one object: another thread sees all of it or nothing.

    Attributes:
        grid: what the terms are of; None where there can be none.
        terms: ``(S, 2)`` float32; None with the grid.
        reserve: memory that the terms grow into.
        rest_on: the tensors that all this rests on.
    """

    grid: CodeGrid | None
    terms: Tensor | None
    reserve: Tensor | None = None
    rest_on: tuple[Snapshot, ...] = ()

    def is_of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these tensors are what the terms rest on, as they were."""
        same = len(tensors) == len(self.rest_on)
        return same and all(map(Snapshot.matches, self.rest_on, tensors))


class GridTerms:
    """The terms of rows on a grid, kept right while rows come, go and move.

    They are derived from codes, centroids and what the quantizer has learned: made when a search first
    needs them, they follow the rows from then on. Those of a row lie in its place, which is its slot in
    inverted lists, and else its number. What they hold for places without rows means nothing.
    """

    def __init__(self) -> None:
        self._made: _Made | None = None

    @property
    def are_made(self) -> bool:
        """Whether there are terms that could follow a change."""
        return self._made is not None and self._made.terms is not None

    def forget(self) -> None:
        """Make the terms anew at the next search."""
        self._made = None

    def know(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the terms of rows that rest on tensors as they are now."""
        return self._made is not None and self._made.is_of(tensors)

    def accept(self, tensors: Sequence[Tensor]) -> None:
        """Take tensors, whose changes the terms have followed, for known."""
        if self._made is not None:
            self._made = dataclasses.replace(self._made, rest_on=tuple(map(Snapshot, tensors)))

    def carry(
        self,
        metric: Metric,
        change: SlotChange,
        packed: PackedRows | None,
        rows: Tensor,  # (F,) int64
    ) -> None:
        """Follow a change of the places, those that it has filled with ``rows (F,)``, packed as given."""
        # Known again when all of it has been carried: memory may run out before.
        made, self._made = self._made, None
        if packed is None or made is None or made.terms is None or len(rows) == len(packed.codes):
            return
        with durable():
            terms, reserve = made.terms, made.reserve
            if change.capacity > len(terms):
                room = terms.new_empty(change.capacity - len(terms), 2)
                terms, reserve = append_rows(terms, reserve, room)
            elif change.capacity < len(terms):
                reserve = None
            terms = change.carry(terms)
            packed = dataclasses.replace(packed, grid=made.grid, terms=terms)
            if fill_terms(metric, packed, rows, change.filled, terms):
                # They rest on what they did until somebody accepts the tensors of now.
                self._made = _Made(made.grid, terms, reserve, made.rest_on)

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
        is_ready = screened_on_grid(metric, packed.table, dim, device) and library_is_ready(device)
        if not is_ready or not grid_serves(dim):
            self.forget()
            return packed
        made = self._made
        if (
            made is None
            or not made.is_of(tensors)
            or (made.terms is not None and len(made.terms) != n_places)
        ):
            made = _make(metric, packed, n_places, *placed())
            self._made = made = dataclasses.replace(made, rest_on=tuple(map(Snapshot, tensors)))
        return dataclasses.replace(packed, grid=made.grid, terms=made.terms)


def _make(metric: Metric, packed: PackedRows, n_places: int, rows: Tensor, places: Tensor) -> _Made:
    """Make the terms of all rows, in their places."""
    with durable():
        grid = make_grid(metric, packed.table, packed.centroids)
        if grid is None:
            return _Made(None, None)
        terms = torch.zeros(n_places, 2, dtype=torch.float32, device="cpu")
        packed = dataclasses.replace(packed, grid=grid, terms=terms)
        made = fill_terms(metric, packed, rows, places, terms)
    return _Made(grid, terms) if made else _Made(None, None)
