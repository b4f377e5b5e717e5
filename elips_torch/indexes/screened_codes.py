"""Codes stored in the place of vectors, with what screens them and follows them."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from elips_torch.indexes.code_screen import CodeScreen, is_screened, screen_bytes
from elips_torch.indexes.inverted_lists import SlotChange
from elips_torch.indexes.prepared_searches import PreparesSearches
from elips_torch.indexes.row_tensors import tensors_of
from elips_torch.kernels.coded_rows import PackedRows
from elips_torch.quantizers.quantizer import Quantizer


class ScreenedCodes(PreparesSearches):
    """An index of ``codes`` that keeps beside them what screens them.

    That follows changes of rows that it knows; else the next search makes it anew. A subclass
    makes its codes and ``quantizer`` in its constructor, changes rows within `_changing_rows`, and tells
    where rows have gone by `_carry_screen`.
    """

    # "none" keeps nothing beside the codes.
    screen: str = "auto"

    quantizer: Quantizer

    @abstractmethod
    def _packed(self) -> PackedRows | None:
        """Return the rows as they are stored, None where more than tables is needed to decode them."""

    @abstractmethod
    def _n_places(self) -> int:
        """Return for how many rows there is a place for terms."""

    @property
    def is_screened(self) -> bool:
        """Whether searches make something that screens the rows, and keep it."""
        packed = self._screenable()
        return packed is not None and is_screened(self._metric, packed.table, self.dim, self.device)

    def screening_bytes(self, n_places: int) -> int:
        """Return the bytes of what screens so many rows or slots; 0 where nothing does."""
        packed = self._screenable()
        if packed is None:
            return 0
        return screen_bytes(self._metric, packed.table, self.dim, self.device, n_places)

    def _screenable(self) -> PackedRows | None:
        return self._packed() if self.screen == "auto" else None

    def _with_screen(
        self, packed: PackedRows, n_places: int, placed: Callable[[], tuple[Tensor, Tensor]]
    ) -> PackedRows:
        """Return rows with what screens them; arguments as for `CodeScreen.of`."""
        if self.screen != "auto":
            self._screening.forget()
            return packed
        return self._screening.of(
            self._metric, packed, self._decode, self._searched_tensors(), n_places, placed
        )

    def memory_bytes(self) -> int:
        """Return the bytes of the stored tensors and of what screens them; see `Index.memory_bytes`."""
        return super().memory_bytes() + self.screening_bytes(self._n_places())

    def _searched_tensors(self) -> tuple[Tensor, ...]:
        quantizer = self.quantizer
        return super()._searched_tensors() + tensors_of(quantizer, quantizer.learned_buffers)

    def _carry_screen(self, change: SlotChange, rows: Tensor) -> None:
        """Follow a change of the places, those that it has filled with ``rows (F,)``."""
        self._screening.carry(self._metric, change, self._screenable(), self._decode, rows)

    @contextmanager
    def _changing_rows(self) -> Iterator[None]:
        """Change rows, and carry along what screens them, before these are taken for known again."""
        if not self._screening.know(self._searched_tensors()):
            self._screening.forget()
        yield
        self._screening.accept(self._searched_tensors())

    def _attach(self) -> None:
        super()._attach()
        self._screening = CodeScreen()

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.pop("_screening", None)
        return state
