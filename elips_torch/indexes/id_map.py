"""From the users' ids to rows."""

import torch
from torch import Tensor

from elips_torch.indexes.storage import Snapshot, durable


class IdMap:
    """Finds the row of an id, and the rank of each row's id among all ids.

    Ids that ascend with the rows, the usual case, are searched as they are. Others are kept as
    sorted runs, merged like a log-structured merge tree, so that adding N ids in any order and in
    any number of batches costs O(N log N). The map is derived from the ids and is no state.
    """

    def __init__(self, ids: Tensor) -> None:
        self.ascending = True
        self._runs: list[tuple[Tensor, Tensor]] | None = None
        self._ranks: Tensor | None = None
        self._are_rows: bool | None = None
        self.rebuild(ids)

    def rebuild(self, ids: Tensor) -> None:
        """Start over from the ids ``(N,)`` of all rows."""
        # Fewer ids need no look, which also spares the meta device a question about values.
        self.ascending = ids.numel() < 2 or bool((ids[1:] > ids[:-1]).all())
        self._runs = self._ranks = self._are_rows = None
        self.accept(ids)

    def accept(self, ids: Tensor) -> None:
        """Take the ids ``(N,)`` as they are now for known."""
        self._seen = Snapshot(ids)

    def is_stale(self, ids: Tensor) -> bool:
        """Whether somebody else has written into the ids or replaced them since `accept`."""
        return not self._seen.matches(ids)

    def move(self, ids: Tensor) -> None:
        """Forget what lies on the device that the ids have left."""
        self._runs = self._ranks = None
        self.accept(ids)

    def append(self, ids: Tensor, first_row: int, largest: int | None) -> None:
        """Take note of new rows.

        Args:
            ids: ``(N,)`` their ids.
            first_row: number of rows before them.
            largest: no id before is larger; None if the new ids are known to ascend after all others.
        """
        self._ranks = self._are_rows = None
        if not ids.numel():
            return
        if self.ascending and largest is not None:
            self.ascending = int(ids[0]) > largest and bool((ids[1:] > ids[:-1]).all())
            # Until now the ids were searched without runs; the next look-up sorts them all.
            self._runs = None if first_row else []
        if not self.ascending and self._runs is not None:
            with durable():
                self._add_run(ids, torch.arange(first_row, first_row + ids.numel(), device=ids.device))

    def rows(self, wanted: Tensor, ids: Tensor) -> Tensor:
        """Return the row of each wanted id, any shape; -1 where it is unknown.

        Args:
            wanted: int64 ids to look up.
            ids: ``(N,)`` the id of each row.
        """
        found = torch.full_like(wanted, -1)
        if not ids.numel():
            return found
        if self.ascending:
            return self._lookup(found, wanted, ids, None)
        for run_ids, run_rows in self._sorted_runs(ids):
            found = self._lookup(found, wanted, run_ids, run_rows)
        return found

    def ids_of(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Return the ids of rows, any shape; -1 stays -1. It is the same tensor where ids are rows.

        Args:
            rows: int64, below N.
            ids: ``(N,)`` the id of each row.
        """
        if self._are_rows or not ids.numel() or self._are_row_numbers(ids):
            return rows
        return ids[rows.clamp_min(0)].masked_fill_(rows < 0, -1)

    def ranks(self, ids: Tensor) -> Tensor | None:
        """Return ``(N,)`` int64, the place of each row's id in ascending order; None if it is the row."""
        if self.ascending:
            return None
        if self._ranks is None:
            with durable():
                order = ids.argsort()
                ranks = torch.empty_like(order)
                ranks[order] = torch.arange(ids.numel(), device=ids.device)
            self._ranks = ranks
        return self._ranks

    def _are_row_numbers(self, ids: Tensor) -> bool:
        """Whether the ids are 0, 1, 2, ..., as far as knowing that costs no synchronisation."""
        if not self.ascending or ids.device.type != "cpu":
            return False
        if self._are_rows is None:
            # They are distinct and ascend.
            self._are_rows = int(ids[0]) == 0 and int(ids[-1]) == ids.numel() - 1
        return self._are_rows

    def _lookup(self, found: Tensor, wanted: Tensor, keys: Tensor, rows: Tensor | None) -> Tensor:
        place = torch.searchsorted(keys, wanted.contiguous()).clamp_max_(keys.numel() - 1)
        row = place if rows is None else rows[place]
        return torch.where(keys[place] == wanted, row, found)

    def _sorted_runs(self, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        if self._runs is None:
            with durable():
                keys, rows = ids.sort()
            self._runs = [(keys, rows)]
        return self._runs

    def _add_run(self, ids: Tensor, rows: Tensor) -> None:
        runs = list(self._runs or ())
        keys, order = ids.sort()
        rows = rows[order]
        # Merging runs of like size keeps their number logarithmic.
        while runs and runs[-1][0].numel() <= 2 * keys.numel():
            older_keys, older_rows = runs.pop()
            keys, order = torch.cat([older_keys, keys]).sort()
            rows = torch.cat([older_rows, rows])[order]
        self._runs = [*runs, (keys, rows)]
