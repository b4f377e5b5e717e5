"""Which rows each inverted list holds, kept right while rows come, go and move."""

import dataclasses

import torch
from torch import Tensor

from elips_torch.indexes.storage import Snapshot, append_rows, durable
from elips_torch.kernels.list_layout import ListLayout, concatenated_ranges

# Lists begin at multiples of this many slots, so that kernels read whole blocks.
SLOT_ALIGNMENT = 16
# A full list moves to as many slots as it has, times this.
_LIST_GROWTH = 1.5
# The arena is compacted when abandoned slots are this share of those that lists own.
_HOLES_ALLOWED = 0.5
# Lists that have lost rows are made anew where there are so many slots for each that they need.
_SLOTS_PER_NEEDED = 4


@dataclasses.dataclass(frozen=True)
class SlotChange:
    """What one step has done to the slots, for payload that is laid out by them.

    Attributes:
        capacity: number of slots after it.
        sources: ``(M,)`` int64 slots whose content has moved. All are read before any is written.
        targets: ``(M,)`` int64, where it lies after.
        filled: ``(F,)`` int64 slots whose content is to be made from the rows that they hold now. Only the
            last of several steps fills any.
    """

    capacity: int
    sources: Tensor
    targets: Tensor
    filled: Tensor

    def carry(self, payload: Tensor) -> Tensor:
        """Return payload ``(capacity before, ...)`` as ``(capacity, ...)``, what has moved in its new place.

        It is the same tensor where the capacity is the same. The slots that were filled, and those
        that no list owns, hold zeros or what other slots held.
        """
        moved = payload[self.sources]
        if payload.shape[0] != self.capacity:
            with durable():
                grown = payload.new_zeros((self.capacity, *payload.shape[1:]))
            kept = min(payload.shape[0], self.capacity)
            grown[:kept] = payload[:kept]
            payload = grown
        payload[self.targets] = moved
        return payload


class InvertedLists:
    """The rows of each list, derived from the list that each row is assigned to.

    All lists share one arena of slots; a slot holds the number of a row. Each list owns some slots in
    a row, the first of which hold rows::

        list 0 (4 rows, 6 slots)   abandoned       list 1 (3 rows)    never used
        starts[0]                                  starts[1]          used      capacity
        v                                          v                  v         v
        +----+----+----+----+----+----+----+----+----+----+----+----+----+----+
        |  0 |  3 |  9 |  4 | -1 | -1 | -1 | -1 |  1 |  8 |  2 | -1 | -1 | -1 |  slots
        +----+----+----+----+----+----+----+----+----+----+----+----+----+----+
        <---- sizes[0] ---->                    <- sizes[1] -->
        <------- capacities[0] ------>          <-- capacities[1] -->

        places[4] == 3: row 4 lies in slot 3

    The order of the rows within a list means nothing. A list without a free slot moves to larger space
    at the end of the arena; the space that it leaves is won back by compaction when too much of the
    arena is abandoned. Adding therefore costs time in proportion to the new rows, on average. A row
    that goes is replaced by one from the end of its list. Where most slots come to stand empty, all lists
    are made anew.

    The lists are no state: they are made from the assignments when first asked for and when somebody
    else has written into these. Verbs return what they did to the slots, so that payload can be kept in the
    order of the lists; see `SlotChange`.

    """

    slots: Tensor
    starts: Tensor
    sizes: Tensor
    capacities: Tensor
    places: Tensor

    def __init__(self) -> None:
        self.used = 0
        self._seen: Snapshot | None = None
        self._places_reserve: Tensor | None = None

    @property
    def layout(self) -> ListLayout:
        """The lists as searches read them."""
        return ListLayout(self.slots, self.starts, self.sizes, self.places)

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return self.slots.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        if self._seen is None:
            return 0
        tensors = (self.slots, self.starts, self.sizes, self.capacities, self.places)
        return sum(tensor.nbytes for tensor in tensors)

    def knows(self, assignments: Tensor) -> bool:
        """Whether the lists are those of the assignments ``(N,)`` as they are now."""
        return self._seen is not None and self._seen.matches(assignments)

    def accept(self, assignments: Tensor) -> None:
        """Take the assignments ``(N,)``, whose values the lists follow already, for known."""
        self._seen = Snapshot(assignments)

    def forget(self) -> None:
        """Make the lists anew when they are next asked for."""
        self._seen = None

    def rebuild(self, assignments: Tensor, nlist: int) -> SlotChange:
        """Make so many lists anew from the assignments ``(N,)`` of all rows."""
        with durable():
            device = assignments.device
            lists, rows = assignments.long().sort(stable=True)
            sizes = torch.bincount(lists, minlength=nlist)
            capacities = _aligned(sizes)
            ends = capacities.cumsum(0)
            starts, used = ends - capacities, int(ends[-1])
            slots = torch.full((used,), -1, dtype=torch.int64, device=device)
            filled = concatenated_ranges(starts, sizes)
            slots[filled] = rows
            places = torch.empty_like(rows)
            places[rows] = filled
        # Only now: another thread may be searching the same lists, which it has made before.
        self.slots, self.places, self.used = slots, places, used
        self.starts, self.sizes, self.capacities = starts, sizes, capacities
        self._places_reserve = None
        self.accept(assignments)
        return SlotChange(self.capacity, filled[:0], filled[:0], filled)

    # Changes of the assignments that the lists know.

    def append(self, new: Tensor, assignments: Tensor) -> SlotChange:
        """Follow ``new (M,)`` assignments that now end the assignments ``(N,)``."""
        with durable():
            device = new.device
            lists, order = new.long().sort(stable=True)
            first = assignments.shape[0] - new.shape[0]
            change, slots = self._insert(lists, order + first)
            fresh = torch.empty(new.shape[0], dtype=torch.int64, device=device)
            fresh[order] = slots
            self.places, self._places_reserve = append_rows(self.places, self._places_reserve, fresh)
        self.accept(assignments)
        return change

    def move(self, rows: Tensor, assignments: Tensor) -> list[SlotChange]:
        """Follow new values of the assignments of distinct ``rows (M,)``, whose payload is new too.

        The changes happened one after the other.
        """
        with durable():
            lists = assignments[rows].long()
            slots = self.places[rows]
            moves = self._lists_of(slots) != lists
            changes = []
            if bool(moves.any()):
                changes.append(self._free(slots[moves]))
                lists, order = lists[moves].sort(stable=True)
                moved = rows[moves][order]
                change, filled = self._insert(lists, moved)
                self.places[moved] = filled
                changes.append(dataclasses.replace(change, filled=filled[:0]))
            nothing = slots[:0]
            changes.append(SlotChange(self.capacity, nothing, nothing, self.places[rows]))
            if self._is_sparse():
                changes = [self.rebuild(assignments, self.sizes.shape[0])]
        self.accept(assignments)
        return changes

    def keep(self, keep: Tensor, assignments: Tensor) -> SlotChange:
        """Follow the removal of the rows where ``keep (N,)`` is False; the assignments are of those left."""
        with durable():
            change = self._free(self.places[~keep])
            rows = keep.cumsum(0) - 1
            self.places = self.places[keep]
            self._places_reserve = None
            self.slots[self.places] = rows[self.slots[self.places]]
            if self._is_sparse():
                change = self.rebuild(assignments, self.sizes.shape[0])
        self.accept(assignments)
        return change

    def _is_sparse(self) -> bool:
        return self.capacity > _SLOTS_PER_NEEDED * int(_aligned(self.sizes).sum())

    def _lists_of(self, slots: Tensor) -> Tensor:
        """Return the list that owns each slot."""
        starts, lists = self.starts.sort(stable=True)
        # Lists without slots start where another one does, and own nothing: they must not come last.
        starts, lists = starts[self.capacities[lists] > 0], lists[self.capacities[lists] > 0]
        owners: Tensor = lists[torch.searchsorted(starts, slots, right=True) - 1]
        return owners

    def _free(self, slots: Tensor) -> SlotChange:
        """Empty distinct ``slots (M,)``, and close the holes with the last rows of the lists."""
        lists, counts = self._lists_of(slots).unique(return_counts=True)
        ends = self.starts[lists] + self.sizes[lists]
        # The last slots of each list, as many as it loses rows: those that keep a row move it into the
        # holes before them. There are as many of the ones as of the others in every list.
        tail = concatenated_ranges(ends - counts, counts)
        sources = tail[torch.isin(tail, slots, invert=True)].sort().values
        targets = slots[torch.isin(slots, tail, invert=True)].sort().values
        moved = self.slots[sources]
        self.slots[tail] = -1
        self.slots[targets] = moved
        self.places[moved] = targets
        self.sizes[lists] -= counts
        return SlotChange(self.capacity, sources, targets, slots[:0])

    def _insert(self, lists: Tensor, rows: Tensor) -> tuple[SlotChange, Tensor]:
        """Put ``rows (M,)`` at the ends of ascending ``lists (M,)``; return the change and their slots."""
        touched, counts = lists.unique_consecutive(return_counts=True)
        needed = self.sizes[touched] + counts
        full = needed > self.capacities[touched]
        sources = targets = lists[:0]
        if bool(full.any()):
            sources, targets = self._relocate(touched[full], needed[full])
        slots = concatenated_ranges(self.starts[touched] + self.sizes[touched], counts)
        self.slots[slots] = rows
        self.sizes[touched] = needed
        return SlotChange(self.capacity, sources, targets, slots), slots

    def _relocate(self, lists: Tensor, needed: Tensor) -> tuple[Tensor, Tensor]:
        """Give ``lists (L,)`` space for as many rows as needed; return which slots moved where."""
        grown = (self.capacities[lists].double() * _LIST_GROWTH).long()
        space = _aligned(torch.maximum(needed, grown))
        capacities = self.capacities.clone()
        capacities[lists] = space
        owned, wanted = int(capacities.sum()), int(space.sum())
        before = self.starts.clone()
        holes = self.used + wanted - owned
        if holes > _HOLES_ALLOWED * owned:
            ends = capacities.cumsum(0)
            self.starts, self.used = ends - capacities, owned
            chosen = torch.arange(self.starts.shape[0], device=lists.device)
        else:
            ends = space.cumsum(0)
            self.starts[lists] = ends - space + self.used
            self.used += wanted
            chosen = lists
        self.capacities = capacities
        sizes = self.sizes[chosen]
        sources = concatenated_ranges(before[chosen], sizes)
        targets = concatenated_ranges(self.starts[chosen], sizes)
        moved = self.slots[sources]
        self.slots[sources] = -1
        if self.used > self.capacity:
            arena = torch.full(
                (max(self.used, int(_LIST_GROWTH * self.capacity)),),
                -1,
                dtype=torch.int64,
                device=lists.device,
            )
            arena[: self.capacity] = self.slots
            self.slots = arena
        self.slots[targets] = moved
        self.places[moved] = targets
        return sources, targets


def _aligned(sizes: Tensor) -> Tensor:
    return (sizes + SLOT_ALIGNMENT - 1) // SLOT_ALIGNMENT * SLOT_ALIGNMENT
