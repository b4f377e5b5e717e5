"""Which rows of a tile a query may see."""

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Selection:
    """The rows that masks and exclusions leave to each query.

    Attributes:
        mask: bool ``(N,)`` or ``(all queries, N)``, True keeps; None keeps all.
        exclude: int64 ``(Q, M)`` row numbers to leave out, -1 ignored; None excludes none.
        queries: which rows of a ``(all queries, N)`` mask the queries are, None for all. The mask
            is read tile by tile, never copied whole.
    """

    mask: Tensor | None = None
    exclude: Tensor | None = None
    queries: slice | Tensor | None = None

    @property
    def sees_all(self) -> bool:
        """Whether every query may see every row."""
        return self.mask is None and self.exclude is None

    @property
    def query_bytes(self) -> int:
        """Bytes per query that `dropped` takes beside its result."""
        # The columns and three temporaries, int64, and bool.
        return 0 if self.exclude is None else 36 * self.exclude.shape[1]

    @property
    def n_excluded(self) -> int:
        """Number of rows left out for each query, at most."""
        return 0 if self.exclude is None else self.exclude.shape[1]

    def for_queries(self, chosen: slice | Tensor) -> "Selection":
        """Return the selection of some of the queries, numbered among these."""
        exclude = None if self.exclude is None else self.exclude[chosen]
        if self.queries is None:
            return Selection(self.mask, exclude, chosen)
        if isinstance(self.queries, Tensor):
            return Selection(self.mask, exclude, self.queries[chosen])
        first = self.queries.start or 0
        if isinstance(chosen, slice):
            return Selection(self.mask, exclude, slice(first + (chosen.start or 0), first + chosen.stop))
        return Selection(self.mask, exclude, chosen + first)

    def dropped(self, n_queries: int, start: int, stop: int) -> Tensor | None:
        """Return bool ``(Q, stop - start)`` or ``(1, stop - start)``: True where a row is out.

        None when every query sees all of these rows.
        """
        dropped = None
        if self.mask is not None:
            mask = self.mask[None] if self.mask.ndim == 1 else self.mask
            rows = slice(None) if self.mask.ndim == 1 or self.queries is None else self.queries
            dropped = ~mask[rows, start:stop]
        if self.exclude is not None:
            width = stop - start
            column = self.exclude - start
            # Ids that lie in other tiles are sent to a spare last column.
            column = torch.where((column >= 0) & (column < width), column, width)
            hit = torch.zeros(n_queries, width + 1, dtype=torch.bool, device=self.exclude.device)
            hit = hit.scatter_(1, column, True)[:, :width]
            dropped = hit if dropped is None else dropped | hit
        return dropped

    def narrowed(self, start: int, stop: int) -> "Selection":
        """Return the selection of the queries from ``start`` to ``stop`` among these."""
        return self.for_queries(slice(start, stop))

    def for_rows(self, start: int, stop: int) -> "Selection":
        """Return the selection of the rows from ``start`` to ``stop``, numbered from 0."""
        mask = None if self.mask is None else self.mask[..., start:stop]
        # Numbers outside the rows, -1 among them, match none.
        exclude = None if self.exclude is None else self.exclude - start
        return Selection(mask, exclude, self.queries)

    @property
    def own_mask(self) -> Tensor | None:
        """The mask where each query has its own, else None."""
        return None if self.mask is None or self.mask.ndim == 1 else self.mask

    def hidden(self, start: int, stop: int) -> Tensor | None:
        """Return bool ``(Q, stop - start)``, True where a query's own mask hides a row."""
        if self.own_mask is None:
            return None
        return ~self.own_mask[slice(None) if self.queries is None else self.queries, start:stop]

    def visible(self) -> Tensor | None:
        """Return the mask ``(N,)`` or ``(Q, N)`` of these queries, None where there is none."""
        if self.own_mask is None or self.queries is None:
            return self.mask
        return self.own_mask[self.queries]

    def hidden_rows(self, owners: Tensor, rows: Tensor) -> Tensor | None:
        """Return bool ``(Q, R)`` or ``(1, R)``, True where the mask hides rows ``(R,)`` from owners ``(Q,)``.

        None where there is no mask.
        """
        if self.mask is None:
            return None
        if self.own_mask is None:
            return ~self.mask[rows][None]
        return ~self.own_mask[self._numbers(owners)[:, None], rows]

    def drops(self, owners: Tensor, rows: Tensor) -> Tensor:
        """Return bool ``(P,)``, True where query ``owners (P,)`` may not see row ``rows (P,)``."""
        if self.own_mask is None:
            dropped = torch.zeros_like(rows, dtype=torch.bool) if self.mask is None else ~self.mask[rows]
        else:
            dropped = ~self.own_mask[self._numbers(owners), rows]
        if self.exclude is not None:
            for column in self.exclude.unbind(1):
                dropped |= column[owners] == rows
        return dropped

    def numbers(self, n_queries: int) -> Tensor:
        """Return int64 ``(Q,)``, the row of a ``(all queries, N)`` mask that is each query's."""
        device = None if self.mask is None else self.mask.device
        return self._numbers(torch.arange(n_queries, device=device))

    def _numbers(self, owners: Tensor) -> Tensor:
        """Return which queries of all these are."""
        if self.queries is None:
            return owners
        if isinstance(self.queries, slice):
            return owners + (self.queries.start or 0)
        return self.queries[owners]


# Every row, to every query.
EVERYTHING = Selection()
