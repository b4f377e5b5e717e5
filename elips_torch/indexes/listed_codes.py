"""Codes of rows in inverted lists, those of a list close to each other in memory."""

import dataclasses
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from elips_torch.core.huge_pages import ask_for_huge_pages
from elips_torch.core.locks import ForkSafeLock
from elips_torch.indexes.inverted_lists import InvertedLists, SlotChange
from elips_torch.indexes.listed_rows import ListedRows
from elips_torch.indexes.row_tensors import RowTensors
from elips_torch.indexes.screened_codes import ScreenedCodes
from elips_torch.indexes.storage import Snapshot, durable

# Codes are brought together when more than one in so many lies apart from the others of its list.
_MOST_APART = 3
# Fewer bytes of codes than this stay in a cache, wherever they lie.
_FEW_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class PlacedCodes:
    """Codes and where they lie, in one object: another thread sees all of it as it belongs together.

    Attributes:
        codes: ``(N, code_size)`` uint8.
        of_rows: ``(N,)`` int32, the place of the code of each row.
        of_slots: ``(S,)`` int32, that of the row in each slot; None before a search has needed it.
        seen: what the places were when those of the slots were taken from them.
        slots: ``(S,)`` int64, the rows in the slots that these are of.
    """

    codes: Tensor
    of_rows: Tensor
    of_slots: Tensor | None = None
    seen: Snapshot | None = None
    slots: Tensor | None = None

    @property
    def slots_are_known(self) -> bool:
        """Whether the places of the slots are those of the rows in them."""
        return self.seen is not None and self.seen.matches(self.of_rows)


class ListedCodes(ScreenedCodes, ListedRows):
    """Codes of rows in lists, which a search on a CPU reads one list after the other.

    Rows keep the order of insertion, their codes do not: that of row i is ``listed_codes[code_places[i]]``.
    Codes that come are appended; when many lie apart from those of their list, the next search moves
    them all, for which it takes as much memory again. Results rest on no order. A subclass calls
    `_register_codes` in its constructor.
    """

    listed_codes: Tensor
    code_places: Tensor

    _n_apart = 0
    _carried: Tensor | None = None

    def _register_codes(self, code_size: int, device: torch.device | str | None) -> None:
        with durable():
            codes = torch.empty(0, code_size, dtype=torch.uint8, device=device)
            places = torch.empty(0, dtype=torch.int32, device=device)
        # Checkpoints hold them as `codes`.
        self.register_buffer("listed_codes", codes, persistent=False)
        self.register_buffer("code_places", places, persistent=False)
        self._placed = PlacedCodes(codes, places)

    @property
    def codes(self) -> Tensor:
        """``(ntotal, code_size)`` uint8, a copy of the codes in the order of insertion."""
        placed = self._placed_codes()
        return placed.codes.index_select(0, placed.of_rows)

    @property
    def held_tensors(self) -> tuple[str, ...]:
        """Names of the buffers that have a row for each vector."""
        return ("listed_codes", "code_places", *(name for name in self.row_tensors if name != "codes"))

    def screening_bytes(self, n_places: int) -> int:
        """Return the bytes of what is kept to read and to screen the codes of so many slots."""
        return super().screening_bytes(n_places) + self.code_places.itemsize * n_places

    def _codes_of(self, rows: Tensor) -> Tensor:
        """Return the codes of rows ``(M,)``."""
        placed = self._placed_codes()
        return placed.codes.index_select(0, placed.of_rows.index_select(0, rows))

    def _placed_codes(self) -> PlacedCodes:
        """Return the codes as they lie now."""
        placed, held = self._placed, self._buffers
        if placed.codes is not held["listed_codes"] or placed.of_rows is not held["code_places"]:
            # Somebody has replaced them; not one after the other while they are read.
            with self._moving:
                self._placed = placed = PlacedCodes(self.listed_codes, self.code_places)
        return placed

    def _placed_in(self, lists: InvertedLists) -> PlacedCodes:
        """Return the codes as they lie now, with the places of what is in the slots."""
        placed = self._placed_codes()
        slots = lists.slots
        if placed.slots is not slots or not placed.slots_are_known:
            with durable():
                of_slots = placed.of_rows[slots.clamp_min(0)] if len(placed.of_rows) else None
            if of_slots is not None:
                # C++ reads where they say.
                low, high = (int(extreme) for extreme in torch.aminmax(placed.of_rows))
                if low < 0 or high >= len(placed.codes):
                    raise IndexError(
                        f"code_places is {low} to {high}, expected 0 <= place < {len(placed.codes)}"
                    )
            seen = Snapshot(placed.of_rows)
            placed = dataclasses.replace(placed, of_slots=of_slots, seen=seen, slots=slots)
            # Whoever comes after another thread has moved them makes them again.
            self._placed = placed
        return placed

    def _bring_together(self) -> None:
        """Move the codes of each list to each other, where many are not."""
        if not self._is_scattered() or not self._moving.acquire(blocking=False):
            return
        try:
            # Another thread may have moved them just now.
            if self._is_scattered():
                self._move_codes()
                self._n_apart = 0
        except (MemoryError, RuntimeError):
            # Searches find them wherever they are; when more have come, there may be memory.
            self._n_apart = 0
        finally:
            self._moving.release()

    def _is_scattered(self) -> bool:
        if not self._n_apart:
            return False
        codes = self._placed_codes().codes
        many = self._n_apart * _MOST_APART > len(codes)
        # Other processes may read shared codes, which must stay shared.
        may_move = codes.device.type == "cpu" and not codes.is_shared()
        return many and may_move and codes.nbytes > _FEW_BYTES

    def _move_codes(self) -> None:
        slots = self.lists.slots
        rows = slots[slots >= 0]
        placed = self._placed_codes()
        with durable():
            moved = torch.empty_like(placed.codes)
            ask_for_huge_pages(moved)
            torch.index_select(placed.codes, 0, placed.of_rows.index_select(0, rows), out=moved)
            places = torch.empty_like(placed.of_rows)
            places[rows] = torch.arange(len(rows), dtype=torch.int32, device=places.device)
        with self._changing_rows():
            held = {"listed_codes": moved, "code_places": places}
            for name in held:
                # Spare memory behind what there was would keep it.
                self._reserves.pop(name, None)
            self._assign_rows(held)

    def _rows_changed(self) -> None:
        super()._rows_changed()
        self._placed = PlacedCodes(self.listed_codes, self.code_places)

    def _slots_changed(self, change: SlotChange) -> None:
        super()._slots_changed(change)
        placed = PlacedCodes(self.listed_codes, self.code_places)
        if self._carried is not None:
            with durable():
                self._carried = of_slots = change.carry(self._carried)
                of_slots[change.filled] = placed.of_rows[self._lists.slots[change.filled]]
            seen = Snapshot(placed.of_rows)
            placed = dataclasses.replace(placed, of_slots=of_slots, seen=seen, slots=self._lists.slots)
        self._placed = placed

    @contextmanager
    def _changing_places(self) -> Iterator[None]:
        """Change rows that keep their places, and carry along those of the slots."""
        placed = self._placed_codes()
        self._carried = placed.of_slots if placed.slots_are_known else None
        try:
            with self._changing_rows():
                yield
        finally:
            self._carried = None

    # Changes of rows.

    def _append_rows(self, rows: dict[str, Tensor]) -> None:
        n, codes = self.ntotal, rows["codes"]
        places = torch.arange(n, n + len(codes), dtype=torch.int32, device=codes.device)
        with self._changing_places():
            super()._append_rows({"listed_codes": codes, "code_places": places, **_without_codes(rows)})
        self._n_apart += len(codes)

    def _overwrite_rows(self, where: Tensor, rows: dict[str, Tensor]) -> None:
        with self._changing_places():
            places = self.code_places.index_select(0, where).long()
            RowTensors._overwrite_rows(self, places, {"listed_codes": rows["codes"]})
            super()._overwrite_rows(where, _without_codes(rows))
        self._n_apart += len(where)

    def _keep_rows(self, keep: Tensor) -> None:
        with self._changing_rows():
            super()._keep_rows(keep)
        self._n_apart = min(self._n_apart, self.ntotal)

    def _kept(self, keep: Tensor) -> dict[str, Tensor]:
        places = self.code_places.long()
        stays = torch.empty_like(keep)
        stays[places] = keep
        moved = (stays.cumsum(0) - 1).to(torch.int32)
        rest = {name: self._buffers[name][keep] for name in self.held_tensors[2:]}  # type: ignore[index]
        return {"listed_codes": self.listed_codes[stays], "code_places": moved[places[keep]], **rest}

    # Checkpoints and copies.

    def _like(self, name: str) -> Tensor:
        return self.listed_codes if name == "codes" else super()._like(name)

    def _drop_reserves(self) -> None:
        # Before they are shared: after that they stay where they are.
        if self.is_trained:
            self._bring_together()
        super()._drop_reserves()

    def _load_rows(self, rows: dict[str, Tensor], *, assign: bool) -> None:
        codes = rows["codes"]
        places = torch.arange(len(codes), dtype=torch.int32, device=codes.device)
        held = {"listed_codes": codes, "code_places": places, **_without_codes(rows)}
        super()._load_rows(held, assign=assign)
        self._n_apart = len(codes)

    def _attach(self) -> None:
        super()._attach()
        self._moving = ForkSafeLock(threading.RLock)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        for name in ("_moving", "_placed"):
            state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._placed = PlacedCodes(self.listed_codes, self.code_places)


def _without_codes(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in rows.items() if name != "codes"}
