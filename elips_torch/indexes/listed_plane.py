"""The plane of an index whose rows lie in inverted lists."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from elips_torch.indexes.inverted_lists import SlotChange
from elips_torch.indexes.screening_plane import ScreeningPlane
from elips_torch.indexes.storage import durable
from elips_torch.kernels.difference_plane import METRICS
from elips_torch.kernels.packed_native import has_grids
from elips_torch.kernels.plane import CODE_DTYPES, Plane
from elips_torch.kernels.search_native import VECTOR_TYPES, library_reasons

# Of fewer features, short floats are compared as fast as int8 codes (measured), and say more.
_LEAST_INT8_DIM = 64


class ListedPlane(ScreeningPlane):
    """A plane in the order of the slots, so that the codes of a list lie one after the other.

    It is made, as the lists are, when a search first needs it, and follows them from then on. What it
    has for slots without rows means nothing, but is finite. A plane without codes of its own, whose codes
    are the vectors, stays in the order of these.

    Args:
        metric: the distance kind.
        dim: D.
        screen: "auto", "int8", "bf16" or "none".
        device: where the index lies.
    """

    _places: Tensor | None = None
    _capacity = 0

    @property
    def in_slots(self) -> bool:
        """Whether codes and terms lie in the order of the slots."""
        return self.kind in CODE_DTYPES

    def __getstate__(self) -> dict[str, Any]:
        # The lists of a copy are its own.
        return super().__getstate__() | {"_places": None}

    def kind_for(self, vectors: Tensor) -> str:
        """Return the kind of plane to keep of vectors, or "none"."""
        if self.screen == "auto" and self.metric.name in METRICS and vectors.dtype in VECTOR_TYPES:
            # Vectors of a list lie anywhere, their codes one after the other.
            if library_reasons(vectors.device):
                return "none"
            return "int8" if has_grids(self.dim, vectors.device) and self.dim >= _LEAST_INT8_DIM else "bf16"
        return super().kind_for(vectors)

    def rebuild(self, vectors: Tensor) -> None:
        """Make the plane anew when the next search asks for it, which has the lists."""
        self.forget()

    def carry(self, change: SlotChange, places: Tensor) -> None:
        """Follow a change of the slots, after which the rows have ``places (N,)``."""
        before, self._places, self._capacity = self._capacity, places, change.capacity
        # Known again when all of it has been carried: memory may run out before.
        seen, self._seen = self._seen, None
        if not self.in_slots:
            self._seen = seen
        elif seen is not None and self.terms.shape[0] == before and len(change.filled) < len(places):
            with durable():
                self._assign_rows({name: change.carry(getattr(self, name)) for name in self.row_tensors})
            self._seen = seen

    # What the slots have not brought along is made from the rows, at the next search.

    def append(self, new: Tensor, vectors: Tensor) -> None:
        """Follow ``new (M, D)`` rows that now end the vectors ``(N, D)``."""
        if self._seen is not None:
            super().append(new, vectors)

    def overwrite(self, where: Tensor, new: Tensor, vectors: Tensor) -> None:
        """Follow ``new (M, D)`` rows that were written to rows ``where (M,)`` of the vectors."""
        if self._seen is not None:
            super().overwrite(where, new, vectors)

    # Row tensors: one row per slot.

    def _n_places(self, vectors: Tensor) -> int:
        if not self.in_slots:
            return super()._n_places(vectors)
        return self._capacity if self._places is not None and len(self._places) == len(vectors) else -1

    def _make_room(self, n: int) -> None:
        # In lists there are slots already.
        if not self.in_slots:
            super()._make_room(n)

    def _put_last(self, rows: dict[str, Tensor]) -> None:
        if not self.in_slots:
            super()._put_last(rows)
        elif self._places is not None:
            super()._overwrite_rows(self._places[len(self._places) - len(rows["codes"]) :], rows)

    def _overwrite_rows(self, where: Tensor, rows: dict[str, Tensor]) -> None:
        if self.in_slots and self._places is not None:
            where = self._places[where]
        super()._overwrite_rows(where, rows)

    def _keep_rows(self, keep: Tensor) -> None:
        # In lists, those that stay have been moved already.
        if not self.in_slots:
            super()._keep_rows(keep)

    def _row_terms(self) -> Tensor:
        return self.terms[self._places] if self.in_slots and self._places is not None else self.terms

    def _order(self, vectors: Tensor) -> Tensor | None:
        places, capacity = self._places, self._capacity
        if places is None or len(places) != len(vectors):
            return None
        rows = places.new_full((capacity,), -1)
        rows[places] = torch.arange(len(places), device=rows.device)
        return rows[rows >= 0]

    def _take(self, plane: Plane | None, vectors: Tensor) -> None:
        if plane is not None and plane.kind in CODE_DTYPES and self._places is not None:
            with durable():
                plane = dataclasses.replace(
                    plane, codes=self._in_slots(plane.codes), terms=self._in_slots(plane.terms)
                )
        super()._take(plane, vectors)

    def _in_slots(self, rows: Tensor) -> Tensor:
        assert self._places is not None
        return rows.new_zeros(self._capacity, rows.shape[1]).index_copy_(0, self._places, rows)
