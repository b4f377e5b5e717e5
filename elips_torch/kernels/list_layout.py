"""Where the rows of inverted lists lie, and walking through the lists that queries probe.

A search visits *tiles*: some rows that lie in probed lists, and the queries that probe them.

- List-major: one tile per list, for all queries that probe it, so that its rows are read once.
- Query-major: the rows of all lists that one query probes are one tile. For few queries, which share
  few lists, this takes fewer steps.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from elips_torch.core.tiling import spans
from elips_torch.kernels.coded_rows import PackedRows
from elips_torch.kernels.plane import Plane
from elips_torch.kernels.selection import Selection


@dataclasses.dataclass(frozen=True)
class ListLayout:
    """The rows of each list, as plain tensors.

    Attributes:
        slots: ``(capacity,)`` int64, the row in each slot, -1 where it is free.
        starts: ``(nlist,)`` int64, the first slot of each list.
        sizes: ``(nlist,)`` int64, how many slots from there hold rows.
        places: ``(N,)`` int64, the slot of each row.
    """

    slots: Tensor
    starts: Tensor
    sizes: Tensor
    places: Tensor

    @property
    def n_rows(self) -> int:
        """Number of rows in all lists."""
        return self.places.shape[0]

    @property
    def nlist(self) -> int:
        """Number of lists."""
        return self.starts.shape[0]


class RowDecoder(Protocol):
    """Gives the vectors of rows, whatever they are stored as."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the vectors."""

    @property
    def dim(self) -> int:
        """Size of a vector."""

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the vectors ``(M, D)`` of rows ``(M,)``, the same whatever is asked for with them."""


@dataclasses.dataclass(frozen=True)
class StoredRows:
    """The decoder of vectors ``(N, D)`` that are stored as they are.

    Attributes:
        vectors: ``(N, D)``.
        plane: their codes to screen with, where there are some.
        in_slots: the plane lies in the order of the slots, not of the rows; what it has for slots
            without rows means nothing.
    """

    vectors: Tensor
    plane: Plane | None = None
    in_slots: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the vectors."""
        return self.vectors.dtype

    @property
    def dim(self) -> int:
        """Size of a vector."""
        return self.vectors.shape[1]

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the vectors ``(M, D)`` of rows ``(M,)``."""
        return self.vectors.index_select(0, rows)


@dataclasses.dataclass(frozen=True)
class DecodedRows:
    """The decoder of vectors that are made when asked for.

    Attributes:
        decode: returns the vectors ``(M, D)`` of rows ``(M,)``.
        dtype: of the vectors.
        dim: D.
        packed: the rows as they are stored, where C++ may decode them.
    """

    decode: Callable[[Tensor], Tensor]
    dtype: torch.dtype
    dim: int
    packed: PackedRows | None = None

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the vectors ``(M, D)`` of rows ``(M,)``."""
        return self.decode(rows)


@dataclasses.dataclass(frozen=True)
class ListTile:
    """Rows that lie in probed lists, and the queries that probe them.

    Attributes:
        rows: ``(R,)`` int64.
        owners: ``(Q,)`` int64, numbers of the queries; one where the tile is query-major.
        first_slot: the slot of the first row, the others following it; None where they do not.
    """

    rows: Tensor
    owners: Tensor
    first_slot: int | None


def concatenated_ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """Return the ranges from each start, of each length, one after the other.

    >>> concatenated_ranges(torch.tensor([5, 0]), torch.tensor([2, 3])).tolist()
    [5, 6, 0, 1, 2]
    """
    ends = lengths.cumsum(0)
    total = int(ends[-1]) if ends.numel() else 0
    shifts = torch.repeat_interleave(starts - (ends - lengths), lengths, output_size=total)
    return torch.arange(total, device=starts.device) + shifts


def list_major_tiles(layout: ListLayout, probes: Tensor, row_step: int) -> Iterator[ListTile]:
    """Yield tiles of at most so many rows, each of one list with all queries that probe it.

    Args:
        layout: where the rows lie.
        probes: ``(Q, P)`` int64, the lists that each query probes, -1 for none.
        row_step: rows of a tile at most.
    """
    lists, order = probes.flatten().sort(stable=True)
    owners = order // max(1, probes.shape[1])
    probed, counts = lists.unique_consecutive(return_counts=True)
    last = counts.cumsum(0)
    known = probed >= 0
    starts = layout.starts[probed.clamp_min(0)]
    sizes = layout.sizes[probed.clamp_min(0)] * known
    facts = torch.stack([starts, sizes, last - counts, last], 1).tolist()
    for start, size, first_owner, last_owner in facts:
        for begin, end in spans(size, row_step):
            rows = layout.slots[start + begin : start + end]
            yield ListTile(rows, owners[first_owner:last_owner], start + begin)


def query_major_tiles(layout: ListLayout, probes: Tensor, row_step: int) -> Iterator[ListTile]:
    """Yield tiles of at most so many rows, each of one query; arguments as for `list_major_tiles`."""
    numbers = torch.arange(probes.shape[0], device=probes.device)
    for query in range(probes.shape[0]):
        probed = probes[query]
        probed = probed[probed >= 0]
        slots = concatenated_ranges(layout.starts[probed], layout.sizes[probed])
        for begin, end in spans(slots.shape[0], row_step):
            yield ListTile(layout.slots[slots[begin:end]], numbers[query : query + 1], None)


def list_parts(layout: ListLayout, probes: Tensor, row_step: int) -> Iterator[tuple[Tensor, ListLayout]]:
    """Yield the rows of all probed lists in parts of at most so many rows.

    Args:
        layout: where the rows lie.
        probes: ``(Q, P)`` int64, the lists that each query probes, -1 for none.
        row_step: rows of a part at most.

    Yields:
        The lists ``(L,)`` of which a part holds rows, and where these lie, one list after the other; slots
        hold their numbers.
    """
    # The last entry stands for no list.
    probed = torch.zeros(layout.nlist + 1, dtype=torch.bool, device=probes.device)
    probed[probes.flatten()] = True
    lists = probed[:-1].nonzero()[:, 0]
    sizes = layout.sizes[lists]
    ends = sizes.cumsum(0)
    starts = ends - sizes
    for begin, end in spans(int(ends[-1]) if ends.numel() else 0, row_step):
        within = (ends > begin) & (starts < end)
        first = (begin - starts[within]).clamp_min_(0)
        lengths = (end - starts[within]).minimum(sizes[within]) - first
        places = concatenated_ranges(layout.starts[lists[within]] + first, lengths)
        rows = layout.slots[places]
        yield lists[within], ListLayout(rows, lengths.cumsum(0) - lengths, lengths, rows)


class ListSelection:
    """The rows of a tile that each query may see.

    Args:
        selection: of the queries that the owners of tiles are numbers of.
        layout: where the rows lie.
    """

    def __init__(self, selection: Selection, layout: ListLayout) -> None:
        self._selection = selection
        self._exclude = selection.exclude
        self._exclude_slots: Tensor | None = None
        if selection.exclude is not None and layout.n_rows:
            slots = layout.places[selection.exclude.clamp_min(0)]
            self._exclude_slots = slots.masked_fill_(selection.exclude < 0, -1)

    def dropped(self, tile: ListTile, owners: Tensor) -> Tensor | None:
        """Return bool ``(Q, R)`` or ``(1, R)``, True where a row is hidden from some owners ``(Q,)``.

        None when each of them sees all rows of the tile.
        """
        dropped = self._selection.hidden_rows(owners, tile.rows)
        if self._exclude is None or self._exclude_slots is None:
            return dropped
        if tile.first_slot is None:
            hit = torch.isin(tile.rows, self._exclude[owners].flatten())[None]
        else:
            width = tile.rows.shape[0]
            column = self._exclude_slots[owners] - tile.first_slot
            # Rows that lie elsewhere are sent to a spare last column.
            column = torch.where((column >= 0) & (column < width), column, width)
            hit = torch.zeros(owners.shape[0], width + 1, dtype=torch.bool, device=owners.device)
            hit = hit.scatter_(1, column, True)[:, :width]
        return hit if dropped is None else dropped | hit
