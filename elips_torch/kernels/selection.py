"""Which rows of a tile a query may see."""

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Selection:
    """The rows that masks and exclusions leave to each query.

    Attributes:
        mask: bool ``(N,)`` or ``(Q, N)``, True keeps; None keeps all.
        exclude: int64 ``(Q, M)`` row numbers to leave out, -1 ignored; None excludes none.
    """

    mask: Tensor | None = None
    exclude: Tensor | None = None

    def for_queries(self, chosen: slice | Tensor) -> "Selection":
        """Return the selection of some of the queries."""
        mask = self.mask if self.mask is None or self.mask.ndim == 1 else self.mask[chosen]
        return Selection(mask, None if self.exclude is None else self.exclude[chosen])

    def dropped(self, n_queries: int, start: int, stop: int) -> Tensor | None:
        """Return bool ``(Q, stop - start)`` or ``(1, stop - start)``: True where a row is out.

        None when every query sees all of these rows.
        """
        dropped = None
        if self.mask is not None:
            dropped = ~self.mask[..., start:stop]
            dropped = dropped[None] if dropped.ndim == 1 else dropped
        if self.exclude is not None:
            width = stop - start
            column = self.exclude - start
            # Ids that lie in other tiles are sent to a spare last column.
            column = torch.where((column >= 0) & (column < width), column, width)
            hit = torch.zeros(n_queries, width + 1, dtype=torch.bool, device=self.exclude.device)
            hit = hit.scatter_(1, column, True)[:, :width]
            dropped = hit if dropped is None else dropped | hit
        return dropped
