"""What screens rows of codes: terms of the codes on a grid, or int8 codes of what they decode to."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from elips_torch.core.errors import ArgumentError
from elips_torch.core.metric import Metric
from elips_torch.core.tiling import spans
from elips_torch.indexes.inverted_lists import SlotChange
from elips_torch.indexes.storage import Snapshot, durable, extend_rows
from elips_torch.kernels.code_grid import grid_bytes, has_grid, make_grid
from elips_torch.kernels.coded_rows import CodeGrid, PackedRows, PackedTable
from elips_torch.kernels.packed_native import fill_terms, grid_serves, has_grids
from elips_torch.kernels.plane import Plane, encode, mean_of
from elips_torch.kernels.search_native import library_is_ready

# Bytes of a row's terms: two float32 numbers on a grid, four in a plane.
_GRID_TERMS, _PLANE_TERMS = 8, 16
# Rows, spread evenly, whose mean stands for that of all.
_ROWS_FOR_MEAN = 2**16
# Features decoded at a time.
_FEATURES_AT_ONCE = 2**20

# Returns the vectors (M, D) of rows (M,).
Decode = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class _Made:
    """What screens the rows as it was made, in one object: another thread sees all of it or nothing.

    Attributes:
        fixed: what all rows share; None where nothing can screen them.
        tensors: by name, those with a row for each place; none with ``fixed`` None.
        reserves: memory that these grow into.
        n_rows: how many rows there were.
        rest_on: the tensors that all this rests on.
    """

    fixed: CodeGrid | Tensor | None = None
    tensors: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    reserves: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    n_rows: int = 0
    rest_on: tuple[Snapshot, ...] = ()

    @property
    def n_places(self) -> int | None:
        """Number of places; None where nothing screens."""
        return next((len(tensor) for tensor in self.tensors.values()), None)

    def is_of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these tensors are what all this rests on, as they were."""
        same = len(tensors) == len(self.rest_on)
        return same and all(map(Snapshot.matches, self.rest_on, tensors))


class _Recipe(Protocol):
    """One way to screen rows."""

    # Whether it fits less well when there are twice as many rows.
    ages: bool

    def serves(self, metric: Metric, table: PackedTable, dim: int, device: torch.device) -> bool:
        """Whether it screens rows of a table on a device, fitted or not yet."""

    def nbytes(self, table: PackedTable, dim: int, n_places: int) -> int:
        """Return the bytes of what it keeps for so many places."""

    def begin(
        self, metric: Metric, packed: PackedRows, decode: Decode, n_places: int
    ) -> tuple[CodeGrid | Tensor, dict[str, Tensor]] | None:
        """Return what all rows share, and tensors to fill; None where these rows allow no bounds."""

    def fill(
        self,
        metric: Metric,
        packed: PackedRows,
        decode: Decode,
        rows: Tensor,  # (F,) int64
        places: Tensor,  # (F,) int64
    ) -> bool:
        """Fill the places of rows, packed with the tensors; False where that could not be done."""

    def packed(self, packed: PackedRows, fixed: CodeGrid | Tensor, tensors: dict[str, Tensor]) -> PackedRows:
        """Return rows together with what screens them."""


class _OnGrid:
    """Search the codes as they are, as whole steps of a grid; see `elips_torch.kernels.code_grid`."""

    ages = False

    def serves(self, metric: Metric, table: PackedTable, dim: int, device: torch.device) -> bool:
        return has_grid(metric, table) and has_grids(dim, device)

    def nbytes(self, table: PackedTable, dim: int, n_places: int) -> int:
        return grid_bytes(table, dim) + _GRID_TERMS * n_places

    def begin(
        self, metric: Metric, packed: PackedRows, decode: Decode, n_places: int
    ) -> tuple[CodeGrid, dict[str, Tensor]] | None:
        grid = make_grid(metric, packed.table, packed.centroids)
        if grid is None:
            return None
        return grid, {"terms": torch.zeros(n_places, 2, dtype=torch.float32, device="cpu")}

    def fill(self, metric: Metric, packed: PackedRows, decode: Decode, rows: Tensor, places: Tensor) -> bool:
        assert packed.terms is not None
        return fill_terms(metric, packed, rows, places, packed.terms)

    def packed(self, packed: PackedRows, fixed: CodeGrid | Tensor, tensors: dict[str, Tensor]) -> PackedRows:
        assert isinstance(fixed, CodeGrid)
        return dataclasses.replace(packed, grid=fixed, terms=tensors["terms"])


class _ByPlane:
    """Search int8 codes of what short floats decode to; see `elips_torch.kernels.plane`."""

    ages = True

    def serves(self, metric: Metric, table: PackedTable, dim: int, device: torch.device) -> bool:
        return metric.form == "product" and table.kind in ("fp16", "bf16") and has_grids(dim, device)

    def nbytes(self, table: PackedTable, dim: int, n_places: int) -> int:
        return 4 * dim + (dim + _PLANE_TERMS) * n_places

    def begin(
        self, metric: Metric, packed: PackedRows, decode: Decode, n_places: int
    ) -> tuple[Tensor, dict[str, Tensor]] | None:
        n, dim = len(packed.codes), packed.table.dim
        some = torch.arange(0, n, max(1, n // _ROWS_FOR_MEAN), device="cpu")
        mean = torch.zeros(dim, dtype=torch.float64, device="cpu")
        for start, stop in spans(len(some), max(1, _FEATURES_AT_ONCE // dim)):
            mean += mean_of(metric, decode(some[start:stop])).double() * (stop - start)
        codes = torch.zeros(n_places, dim, dtype=torch.int8, device="cpu")
        terms = torch.zeros(n_places, 4, dtype=torch.float32, device="cpu")
        return (mean / len(some)).float(), {"codes": codes, "terms": terms}

    def fill(self, metric: Metric, packed: PackedRows, decode: Decode, rows: Tensor, places: Tensor) -> bool:
        plane = packed.plane
        assert plane is not None
        for start, stop in spans(len(rows), max(1, _FEATURES_AT_ONCE // packed.table.dim)):
            coded = encode(metric, decode(rows[start:stop]), plane.mean, "int8")
            if coded is None:
                return False
            plane.codes[places[start:stop]] = coded.codes
            plane.terms[places[start:stop]] = coded.terms
        return True

    def packed(self, packed: PackedRows, fixed: CodeGrid | Tensor, tensors: dict[str, Tensor]) -> PackedRows:
        assert isinstance(fixed, Tensor)
        return dataclasses.replace(packed, plane=Plane(tensors["codes"], tensors["terms"], fixed))


_RECIPES: tuple[_Recipe, ...] = (_OnGrid(), _ByPlane())


def check_code_screen(screen: str) -> str:
    """Return whether something may be kept to screen codes, "auto" or "none", or raise `ArgumentError`."""
    if screen not in ("auto", "none"):
        raise ArgumentError(f"screen is {screen!r}, expected 'auto' or 'none'")
    return screen


def _recipe_for(metric: Metric, table: PackedTable, dim: int, device: torch.device) -> _Recipe | None:
    return next((each for each in _RECIPES if each.serves(metric, table, dim, device)), None)


def is_screened(metric: Metric, table: PackedTable, dim: int, device: torch.device) -> bool:
    """Whether something is kept to screen packed rows of a table on a device; fitted or not yet."""
    return _recipe_for(metric, table, dim, device) is not None


def screen_bytes(metric: Metric, table: PackedTable, dim: int, device: torch.device, n_places: int) -> int:
    """Return the bytes of what screens so many rows or slots; 0 where nothing does."""
    recipe = _recipe_for(metric, table, dim, device)
    return 0 if recipe is None else recipe.nbytes(table, dim, n_places)


class CodeScreen:
    """What screens the rows of an index of codes, kept right while these come, go and move.

    It is derived from codes, centroids and what the quantizer has learned: made when a search first
    needs it, it follows the rows from then on. What belongs to a row lies in its place, which is its slot in
    inverted lists, and else its number. What there is for places without rows means nothing.
    """

    def __init__(self) -> None:
        self._made: _Made | None = None

    @property
    def is_made(self) -> bool:
        """Whether there is something that could follow a change."""
        return self._made is not None and self._made.fixed is not None

    def forget(self) -> None:
        """Make everything anew at the next search."""
        self._made = None

    def know(self, tensors: Sequence[Tensor]) -> bool:
        """Whether this screens rows that rest on tensors as they are now."""
        return self._made is not None and self._made.is_of(tensors)

    def accept(self, tensors: Sequence[Tensor]) -> None:
        """Take tensors, whose changes have been followed, for known."""
        if self._made is not None:
            self._made = dataclasses.replace(self._made, rest_on=tuple(map(Snapshot, tensors)))

    def carry(
        self,
        metric: Metric,
        change: SlotChange,
        packed: PackedRows | None,
        decode: Decode,
        rows: Tensor,  # (F,) int64
    ) -> None:
        """Follow a change of the places, those that it has filled with ``rows (F,)``, packed as given."""
        # Known again when all of it has been carried: memory may run out before.
        made, self._made = self._made, None
        if packed is None or made is None or made.fixed is None or len(rows) == len(packed.codes):
            return
        recipe = _recipe_for(metric, packed.table, packed.table.dim, packed.codes.device)
        if recipe is None:
            return
        with durable():
            tensors: dict[str, Tensor] = {}
            reserves: dict[str, Tensor] = {}
            for name, tensor in made.tensors.items():
                if change.capacity > len(tensor):
                    n = change.capacity - len(tensor)
                    tensor, reserves[name] = extend_rows(tensor, made.reserves.get(name), n)
                elif change.capacity == len(tensor) and name in made.reserves:
                    reserves[name] = made.reserves[name]
                tensors[name] = change.carry(tensor)
            with_screen = recipe.packed(packed, made.fixed, tensors)
            if recipe.fill(metric, with_screen, decode, rows, change.filled):
                # It rests on what it did until somebody accepts the tensors of now.
                self._made = dataclasses.replace(made, tensors=tensors, reserves=reserves)

    def of(
        self,
        metric: Metric,
        packed: PackedRows,
        decode: Decode,
        tensors: Sequence[Tensor],
        n_places: int,
        placed: Callable[[], tuple[Tensor, Tensor]],
    ) -> PackedRows:
        """Return rows with what screens them, where something does.

        Args:
            metric: the distance kind.
            packed: the rows as they are stored.
            decode: returns the vectors ``(M, D)`` of rows ``(M,)``.
            tensors: what they rest on.
            n_places: number of places.
            placed: returns ``(N,)`` int64 all rows, those of a list one after the other, and ``(N,)`` int64
                the place of each.
        """
        device, dim, n = packed.codes.device, packed.table.dim, len(packed.codes)
        recipe = _recipe_for(metric, packed.table, dim, device)
        # Small searches are not worth compiling the code for: it may not be there yet.
        if recipe is None or not library_is_ready(device) or not grid_serves(dim):
            self.forget()
            return packed
        made = self._made
        if (
            made is None
            or not made.is_of(tensors)
            or made.n_places not in (None, n_places)
            or (recipe.ages and n >= 2 * made.n_rows)
        ):
            # What another thread writes while this is made is seen by the next search.
            rest_on = tuple(map(Snapshot, tensors))
            made = _make(recipe, metric, packed, decode, n_places, *placed())
            self._made = made = dataclasses.replace(made, n_rows=n, rest_on=rest_on)
        return packed if made.fixed is None else recipe.packed(packed, made.fixed, made.tensors)


def _make(
    recipe: _Recipe,
    metric: Metric,
    packed: PackedRows,
    decode: Decode,
    n_places: int,
    rows: Tensor,
    places: Tensor,
) -> _Made:
    """Make what screens all rows, in their places."""
    with durable():
        begun = recipe.begin(metric, packed, decode, n_places)
        if begun is None:
            return _Made()
        with_screen = recipe.packed(packed, *begun)
        made = recipe.fill(metric, with_screen, decode, rows, places)
    return _Made(*begun) if made else _Made()
