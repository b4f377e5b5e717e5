"""The forms in which a query's relevant ids are given, brought to two: padded rows, or pairs."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from elips_torch.core.errors import ArgumentError, DeviceError, DtypeError, NonFiniteError, ShapeError
from elips_torch.core.results import SearchResult

RelevantIds = Tensor | Sequence[Tensor]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_SHAPES = ("(Q,)", "(Q, R)")


@dataclasses.dataclass(frozen=True)
class Padded:
    """The relevant ids of each query in a row.

    Attributes:
        ids: ``(Q, R)`` int64; negative where there is none.
        gains: ``(Q, R)`` float64 how relevant each is, or None if all are equally so.
    """

    ids: Tensor
    gains: Tensor | None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def width(self) -> int:
        """The length of the longest row."""
        return self.ids.shape[1]

    def pairs(self) -> "Pairs":
        """Return the same as pairs."""
        rows, columns = (self.ids >= 0).nonzero(as_tuple=True)
        gains = None if self.gains is None else self.gains[rows, columns]
        return Pairs(len(self), self.width, rows, self.ids[rows, columns], gains)


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The relevant ids of all queries, one after the other: memory follows their number alone.

    Attributes:
        n_queries: Q.
        width: the most that a query has.
        owners: ``(M,)`` int64, the query of each, ascending.
        ids: ``(M,)`` int64.
        gains: ``(M,)`` float64, or None if all are equally relevant.
    """

    n_queries: int
    width: int
    owners: Tensor
    ids: Tensor
    gains: Tensor | None

    def __len__(self) -> int:
        return self.n_queries

    def pairs(self) -> "Pairs":
        """Return these."""
        return self

    def padded(self) -> Padded:
        """Return the same in rows of the longest's length."""
        counts = torch.bincount(self.owners, minlength=len(self))
        places = (
            torch.arange(len(self.ids), device=self.ids.device) - (counts.cumsum(0) - counts)[self.owners]
        )
        ids = self.ids.new_full((len(self), self.width), -1)
        ids[self.owners, places] = self.ids
        if self.gains is None:
            return Padded(ids, None)
        gains = self.gains.new_zeros(ids.shape)
        gains[self.owners, places] = self.gains
        return Padded(ids, gains)


def read_relevant(ids: RelevantIds, lims: Tensor | None, relevance: RelevantIds | None) -> Padded | Pairs:
    """Check what a user gives as relevant; what has no relevance above 0 is left out.

    Args:
        ids: ``(Q, R)`` padded by -1, or ``(Q,)``, one each; with lims ``(M,)``; or Q tensors ``(R_i,)``.
        lims: ``(Q + 1,)``: those of query i are ``ids[lims[i]:lims[i + 1]]``.
        relevance: how relevant each is, in the form of ids; None where all are equally so.

    Raises:
        ElipsError: an argument of wrong type, dtype, shape, device or value.
    """
    if lims is not None:
        check_integers("relevant_ids", ids, 1, "(M,) beside lims")
        return _ragged(ids.long(), _check_lims(lims, ids), _gains(relevance, ids))  # type: ignore[union-attr]
    if isinstance(ids, Sequence):
        for i, each in enumerate(ids):
            check_integers(f"relevant_ids[{i}]", each, 1, "(R,)")
        flat = torch.cat([each.long() for each in ids]) if ids else torch.empty(0, dtype=torch.int64)
        bounds = torch.tensor([0, *map(len, ids)], device=flat.device).cumsum(0)
        if relevance is not None:
            if isinstance(relevance, Tensor) or [*map(len, relevance)] != [*map(len, ids)]:
                raise ShapeError("relevance has another form than relevant_ids, expected a tensor for each")
            relevance = torch.cat(list(relevance)) if relevance else flat
        return _ragged(flat, bounds, _gains(relevance, flat))
    if isinstance(ids, Tensor) and ids.ndim == 1:
        ids = ids[:, None]
        relevance = relevance[:, None] if isinstance(relevance, Tensor) and relevance.ndim == 1 else relevance
    check_integers("relevant_ids", ids, 2)
    gains = _gains(relevance, ids)
    ids = ids.long()
    return Padded(ids if gains is None else ids.masked_fill(gains <= 0, -1), gains)


def check_integers(name: str, tensor: Tensor | Sequence[Tensor], ndim: int, expected: str = "") -> None:
    """Check type, dtype and number of dimensions of ids or labels."""
    if not isinstance(tensor, Tensor):
        hint = "; pass its ids" if isinstance(tensor, SearchResult) else ""
        raise DtypeError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor{hint}")
    if tensor.dtype not in _INTEGERS:
        raise DtypeError(f"{name} has dtype {tensor.dtype}, expected int64")
    if tensor.ndim != ndim:
        raise ShapeError(f"{name} has shape {tuple(tensor.shape)}, expected {expected or _SHAPES[ndim - 1]}")


def check_retrieved(name: str, tensor: Tensor, n: int, device: torch.device, k: int) -> Tensor:
    """Check what was retrieved for n queries and return it as int64."""
    check_integers(name, tensor, 2, f"({n}, K)")
    if tensor.shape[0] != n or tensor.shape[1] < k:
        raise ShapeError(f"{name} has shape {tuple(tensor.shape)}, expected ({n}, K) with K at least {k}")
    if tensor.device != device:
        raise DeviceError(f"{name} is on {tensor.device}, what it is compared with is on {device}")
    return tensor.long()


def _ragged(ids: Tensor, lims: Tensor, gains: Tensor | None) -> Pairs:
    counts = lims.diff()
    owners = torch.repeat_interleave(torch.arange(len(counts), device=ids.device), counts)
    kept = ids >= 0 if gains is None else (ids >= 0) & (gains > 0)
    width = int(counts.max()) if len(counts) else 0
    return Pairs(len(counts), width, owners[kept], ids[kept], None if gains is None else gains[kept])


def _check_lims(lims: Tensor, ids: RelevantIds) -> Tensor:
    check_integers("lims", lims, 1, "(Q + 1,)")
    if lims.device != ids.device:  # type: ignore[union-attr]
        raise DeviceError(f"lims is on {lims.device}, relevant_ids is on {ids.device}")  # type: ignore[union-attr]
    rises = len(lims) > 0 and bool((lims.diff() >= 0).all())
    if not rises or int(lims[0]) != 0 or int(lims[-1]) != len(ids):
        raise ArgumentError(f"lims is {lims}, expected (Q + 1,) numbers that rise from 0 to {len(ids)}")
    return lims.long()


def _gains(relevance: RelevantIds | None, ids: RelevantIds) -> Tensor | None:
    if relevance is None:
        return None
    if not isinstance(relevance, Tensor) or relevance.is_complex():
        raise DtypeError(
            f"relevance is a {type(relevance).__name__}, expected a real torch.Tensor, as relevant_ids"
        )
    if relevance.shape != ids.shape:  # type: ignore[union-attr]
        shapes = tuple(relevance.shape), tuple(ids.shape)  # type: ignore[union-attr]
        raise ShapeError(f"relevance has shape {shapes[0]}, expected {shapes[1]}, as relevant_ids")
    if relevance.device != ids.device:  # type: ignore[union-attr]
        raise DeviceError(f"relevance is on {relevance.device}, relevant_ids is on {ids.device}")  # type: ignore[union-attr]
    gains = relevance.double()
    if not bool(gains.isfinite().all()):
        raise NonFiniteError("relevance has NaN or infinity, expected finite numbers")
    return gains
