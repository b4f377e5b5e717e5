"""Codes stored in the place of vectors, with what screens them and follows them."""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from elips_torch.indexes.grid_terms import TERM_BYTES, GridTerms, screened_on_grid
from elips_torch.indexes.inverted_lists import SlotChange
from elips_torch.indexes.prepared_searches import PreparesSearches
from elips_torch.indexes.row_tensors import tensors_of
from elips_torch.kernels.code_grid import grid_bytes
from elips_torch.kernels.coded_rows import PackedRows
from elips_torch.quantizers.quantizer import Quantizer


class ScreenedCodes(PreparesSearches):
    """An index of ``codes`` that keeps the terms of its rows on a grid.

    The terms follow changes of rows that they know; else the next search makes them anew. A subclass
    makes ``codes`` and ``quantizer`` in its constructor, changes rows within `_changing_rows`, and tells
    the terms where rows have gone by `_carry_terms`.
    """

    codes: Tensor
    quantizer: Quantizer

    @abstractmethod
    def _packed(self) -> PackedRows | None:
        """Return the rows as they are stored, None where more than tables is needed to decode them."""

    @abstractmethod
    def _n_places(self) -> int:
        """Return for how many rows there is a place for terms."""

    @property
    def keeps_terms(self) -> bool:
        """Whether searches make terms of the rows and keep them."""
        packed = self._packed()
        return packed is not None and screened_on_grid(self._metric, packed.table, self.dim, self.device)

    def screening_bytes(self, n_places: int) -> int:
        """Return the bytes of the grid, and of the terms of so many rows or slots; 0 where there are none."""
        packed = self._packed()
        if packed is None or not self.keeps_terms:
            return 0
        return grid_bytes(packed.table, self.dim) + TERM_BYTES * n_places

    def memory_bytes(self) -> int:
        """Return the bytes of the stored tensors and of what screens them; see `Index.memory_bytes`."""
        return super().memory_bytes() + self.screening_bytes(self._n_places())

    def _searched_tensors(self) -> tuple[Tensor, ...]:
        quantizer = self.quantizer
        return super()._searched_tensors() + tensors_of(quantizer, quantizer.learned_buffers)

    def _carry_terms(self, change: SlotChange, rows: Tensor) -> None:
        """Follow a change of the places, those that it has filled with ``rows (F,)``."""
        self._terms.carry(self._metric, change, self._packed(), rows)

    @contextmanager
    def _changing_rows(self) -> Iterator[None]:
        """Change rows, and carry the terms along, before these are taken for known again."""
        if not self._terms.know(self._searched_tensors()):
            self._terms.forget()
        yield
        self._terms.accept(self._searched_tensors())

    def _attach(self) -> None:
        super()._attach()
        self._terms = GridTerms()

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.pop("_terms", None)
        return state
