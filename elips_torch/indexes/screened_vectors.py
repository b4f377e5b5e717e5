"""Vectors stored as they are, with a plane that follows them."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from elips_torch.indexes.base import Index
from elips_torch.indexes.screening_plane import ScreeningPlane


class ScreenedVectors(Index):
    """An index of ``vectors`` that keeps a plane beside them.

    The plane follows changes of vectors that it knows; else the next search makes it anew. A subclass
    makes ``vectors``, ``screen`` and ``plane`` in its constructor, and comes before other bases.
    """

    vectors: Tensor
    plane: ScreeningPlane
    screen: str

    def _append_rows(self, rows: dict[str, Tensor]) -> None:
        known = self.plane.knows(self.vectors)
        super()._append_rows(rows)
        self._follow_vectors(known, self.plane.append, rows["vectors"])

    def _overwrite_rows(self, where: Tensor, rows: dict[str, Tensor]) -> None:
        known = self.plane.knows(self.vectors)
        super()._overwrite_rows(where, rows)
        self._follow_vectors(known, self.plane.overwrite, where, rows["vectors"])

    def _keep_rows(self, keep: Tensor) -> None:
        known = self.plane.knows(self.vectors)
        super()._keep_rows(keep)
        self._follow_vectors(known, self.plane.keep, keep)

    def _follow_vectors(self, known: bool, change: Callable[..., None], *what: Tensor) -> None:
        if not known:
            self.plane.forget()
            return
        try:
            change(*what, self.vectors)
        except (MemoryError, RuntimeError):
            # The vectors have changed; the plane is derived from them and can wait for memory.
            self.plane.forget()

    def _drop_reserves(self) -> None:
        known = self.plane.knows(self.vectors)
        super()._drop_reserves()
        if known:
            self.plane.accept(self.vectors)

    def _load_rows(self, rows: dict[str, Tensor], *, assign: bool) -> None:
        super()._load_rows(rows, assign=assign)
        self.plane.rebuild(self.vectors)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        known, dtype = self.plane.knows(self.vectors), self.vectors.dtype
        super()._apply(fn, recurse)
        if known:
            self.plane.follow(self.vectors, dtype)
        else:
            self.plane.rebuild(self.vectors)
        return self

    def _kept_screen(self) -> str:
        """Return the screen for a file: vectors in float64 keep no plane."""
        return "auto" if self.vectors.dtype == torch.float64 else self.screen
