"""What screens rows of codes in inverted lists: a grid, and the terms of the rows on it."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from elips_torch.core.metric import Metric
from elips_torch.indexes.inverted_lists import InvertedLists, SlotChange
from elips_torch.indexes.storage import Snapshot, durable
from elips_torch.kernels.code_grid import has_grid, make_grid
from elips_torch.kernels.coded_rows import CodeGrid, PackedRows
from elips_torch.kernels.packed_native import fill_terms, grid_serves
from elips_torch.kernels.search_native import library_compiles

# Two float32 numbers.
TERM_BYTES = 8


def keeps_terms(metric: Metric, packed: PackedRows) -> bool:
    """Whether an index of packed rows keeps terms: where searches would use them."""
    is_screened = packed.codes.device.type == "cpu" and has_grid(metric, packed.table)
    return is_screened and grid_serves(packed.table.dim)


class ListedTerms:
    """The terms of rows on a grid, in the order of the slots, kept right while rows come, go and move.

    They are derived from codes, centroids and what the quantizer has learned: made when a search first
    needs them, they follow the lists from then on. What they hold for slots without rows means nothing.
    """

    def __init__(self) -> None:
        self._rest_on: tuple[Snapshot, ...] = ()
        self.forget()

    def forget(self) -> None:
        """Make the terms anew at the next search."""
        self._is_made = False
        self._grid: CodeGrid | None = None
        self._terms: Tensor | None = None

    def know(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the terms of rows that rest on tensors as they are now."""
        same = len(tensors) == len(self._rest_on) and all(map(Snapshot.matches, self._rest_on, tensors))
        return self._is_made and same

    def accept(self, tensors: Sequence[Tensor]) -> None:
        """Take tensors, whose changes the terms have followed, for known."""
        self._rest_on = tuple(map(Snapshot, tensors))

    def carry(self, metric: Metric, change: SlotChange, packed: PackedRows | None, slots: Tensor) -> None:
        """Follow a change of the slots, which hold ``slots (S,)`` after it; rows are packed as given."""
        grid, terms = self._grid, self._terms
        # Known again when all of it has been carried: memory may run out before.
        self.forget()
        if packed is None or grid is None or terms is None or len(change.filled) == len(packed.codes):
            return
        with durable():
            terms = change.carry(terms)
            packed = dataclasses.replace(packed, grid=grid, terms=terms)
            if fill_terms(metric, packed, slots[change.filled], change.filled, terms):
                self._is_made, self._grid, self._terms = True, grid, terms

    def of(
        self, metric: Metric, packed: PackedRows, lists: InvertedLists, tensors: Sequence[Tensor]
    ) -> PackedRows:
        """Return rows with their grid and terms, where these serve; ``tensors`` are what they rest on."""
        if not keeps_terms(metric, packed) or not library_compiles():
            return packed
        grid, terms = self._grid, self._terms
        if not self.know(tensors) or (terms is not None and len(terms) != lists.capacity):
            grid, terms = self._make(metric, packed, lists)
            # Only now: another thread may be asking, too.
            self._grid, self._terms, self._is_made = grid, terms, True
            self.accept(tensors)
        return dataclasses.replace(packed, grid=grid, terms=terms)

    def _make(
        self, metric: Metric, packed: PackedRows, lists: InvertedLists
    ) -> tuple[CodeGrid | None, Tensor | None]:
        with durable():
            grid = make_grid(metric, packed.table, packed.centroids)
            if grid is None:
                return None, None
            terms = torch.zeros(lists.capacity, 2, dtype=torch.float32, device="cpu")
            packed = dataclasses.replace(packed, grid=grid, terms=terms)
            places = (lists.slots >= 0).nonzero()[:, 0]
            made = fill_terms(metric, packed, lists.slots[places], places, terms)
        return (grid, terms) if made else (None, None)
