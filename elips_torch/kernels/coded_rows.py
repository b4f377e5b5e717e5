"""What searches need to know of vectors that are stored as codes."""

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from elips_torch.kernels.plane import Plane


class Decoder(Protocol):
    """Gives the vectors that codes stand for.

    Attributes:
        dim: D, size of a vector.
    """

    dim: int

    def packed_table(self) -> "PackedTable | None":
        """Return what codes stand for as plain tensors, None where it takes more to decode them."""

    def decode(self, codes: Tensor) -> Tensor:
        """Return float32 vectors ``(N, D)`` of uint8 codes ``(N, code_size)``.

        The vector of a code does not depend on the codes beside it.
        """


@runtime_checkable
class PartDecoder(Decoder, Protocol):
    """Gives vectors whose parts are centroids, a number of which the code holds for each.

    Attributes:
        m: number of parts.
        codebooks: ``(m, ksub, D / m)`` float32, the centroids of each part.
    """

    m: int
    codebooks: Tensor

    def entries(self, codes: Tensor) -> Tensor:
        """Return int32 numbers ``(N, m)`` among all ``m * ksub`` centroids, of a code's parts."""

    def lookup_tables(self, queries: Tensor, metric: str) -> Tensor:
        """Return float32 ``(Q, m, ksub)``, what each centroid adds to a score; metric "l2" or "ip"."""


@dataclasses.dataclass(frozen=True)
class PackedTable:
    """What the bits of a code stand for, as plain tensors.

    Attributes:
        table: ``(D,)`` float32 steps of a feature's code; or ``(m, ksub, D / m)`` float32 centroids; or,
            where codes are the features themselves, ``(0, D)`` of their dtype, float16 or bfloat16.
        low: ``(D,)`` float32, what code 0 of a feature stands for; None where the table is not of steps.
        bits: of the code of a feature or part: 8, 6 or 4 with steps, 8 or 4 with centroids, else 16.
    """

    table: Tensor
    low: Tensor | None = None
    bits: int = 8

    @property
    def kind(self) -> str:
        """What codes are of: "scalars", "parts", "fp16" or "bf16"."""
        if self.low is not None:
            return "scalars"
        return {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(self.table.dtype, "parts")

    @property
    def dim(self) -> int:
        """D, size of a vector."""
        if self.low is not None:
            return self.low.shape[0]
        return self.table.shape[0] * self.table.shape[2] if self.kind == "parts" else self.table.shape[1]

    def contiguous(self) -> "PackedTable":
        """Return the table with every tensor contiguous; a copy only of those that are not."""
        low = None if self.low is None else self.low.contiguous()
        return dataclasses.replace(self, table=self.table.contiguous(), low=low)


@dataclasses.dataclass(frozen=True)
class CodeGrid:
    """What turns stored codes into int8 codes, and these into vectors; see `elips_torch.kernels.code_grid`.

    Attributes:
        steps: ``(D,)`` float32, s, above zero.
        zero: ``(D,)`` float64, z less the mean.
        mean: ``(D,)`` float32, what queries are centred about; zeros but for "l2".
        table: ``(m, ksub, D / m)`` int8 codes of the centroids of parts; None for scalars.
        scalars: ``(2, D)`` uint8, which bits of a scalar's code count, and what is taken off these; None for
            parts.
        residual: at least ``|y - u|`` of every row.
        rounded: the part of it that decoding loses by rounding.
        features: ``(m, D / m, ksub)`` float32, the centroids of parts less z; None for scalars.
    """

    steps: Tensor
    zero: Tensor
    mean: Tensor
    table: Tensor | None
    scalars: Tensor | None
    residual: float
    rounded: float
    features: Tensor | None


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """Rows as they are stored, for code that decodes them itself.

    Attributes:
        codes: ``(N, code_size)`` uint8.
        table: what they stand for.
        centroids: ``(L, D)`` float32, added to the rows of each list; None where nothing is.
        assignments: ``(N,)`` int32, the list of each row; None without centroids.
        places: ``(N,)`` int32, where in ``codes`` that of each row lies; None where that is its number.
        slot_places: ``(S,)`` int32, the same of the row in each slot of lists; None without lists.
        grid: makes int8 codes of the codes, where that is possible.
        terms: ``(S, 2)`` float32, of the row in each slot: at least ``|y|``, and close to the bias; None
            without a grid.
        plane: int8 codes of what the rows decode to, in their places, where these screen; else None.
    """

    codes: Tensor
    table: PackedTable
    centroids: Tensor | None = None
    assignments: Tensor | None = None
    places: Tensor | None = None
    slot_places: Tensor | None = None
    grid: CodeGrid | None = None
    terms: Tensor | None = None
    plane: Plane | None = None

    def contiguous(self) -> "PackedRows":
        """Return the rows with every tensor contiguous; a copy only of those that are not."""
        centroids = None if self.centroids is None else self.centroids.contiguous()
        assignments = None if self.assignments is None else self.assignments.contiguous()
        return dataclasses.replace(
            self,
            codes=self.codes.contiguous(),
            table=self.table.contiguous(),
            centroids=centroids,
            assignments=assignments,
        )


@dataclasses.dataclass(frozen=True)
class PartRows:
    """The decoder of rows in inverted lists whose parts are centroids, on top of the centroid of the list.

    Attributes:
        decode: returns float32 vectors ``(M, D)`` of rows ``(M,)``.
        entries: returns int32 ``(M, m)``, for the parts of each row's code the numbers of their centroids
            among all ``m * ksub``.
        codebooks: ``(m, ksub, D / m)`` float32, the centroids of each part.
        centroids: returns ``(L, D)``, what is added to the rows of lists ``(L,)``; None where nothing is.
        packed: the rows as they are stored, where C++ may decode them.
    """

    decode: Callable[[Tensor], Tensor]
    entries: Callable[[Tensor], Tensor]
    codebooks: Tensor
    centroids: Callable[[Tensor], Tensor] | None
    packed: PackedRows | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the vectors."""
        return torch.float32

    @property
    def dim(self) -> int:
        """Size of a vector."""
        return self.codebooks.shape[0] * self.codebooks.shape[2]

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the vectors ``(M, D)`` of rows ``(M,)``."""
        return self.decode(rows)
