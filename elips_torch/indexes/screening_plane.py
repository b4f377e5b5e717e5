"""The plane of an index: kept right while its vectors change."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from elips_torch.core.locks import ForkSafeLock
from elips_torch.core.metric import Metric
from elips_torch.indexes.row_tensors import RowTensors
from elips_torch.indexes.storage import Snapshot, durable, extend_rows
from elips_torch.kernels.difference_plane import METRICS, choose_codes, encode_differences
from elips_torch.kernels.plane import (
    CODE_DTYPES,
    NORM,
    RESIDUAL,
    Plane,
    encode,
    integer_offset,
    make_plane,
    mean_of,
    plain_plane,
)
from elips_torch.kernels.screen_choice import choose_screen

# The mean moves when that shortens the squared norms by this share.
_WORTH_MOVING = 0.05
# Rows, spread evenly, whose mean is looked at.
_ROWS_FOR_MEAN = 2**16
# Features that wait to be encoded: few rows take almost as long as these.
_MOST_WAITING = 2**19


class ScreeningPlane(RowTensors):
    """A low-precision copy of an index's vectors; see `elips_torch.kernels.plane`.

    It is derived from the vectors: no checkpoint and no file holds it, and its tensors are no buffers, which
    averages of models and processes that train together expect to have the same sizes everywhere. The mean
    is that of the first vectors, and is looked at again when their number has doubled or half of them have
    been replaced. Rows that come in small batches wait for each other, at most until the next search, and
    are encoded together.

    Args:
        metric: the distance kind.
        dim: D.
        screen: "auto", "int8", "bf16" or "none".
        device: where the index lies.
    """

    row_tensors: ClassVar[tuple[str, ...]] = ("codes", "terms")
    _holder: ClassVar[str] = "_tensors"

    def __init__(self, metric: Metric, dim: int, screen: str, device: torch.device | str | None) -> None:
        super().__init__()
        self.metric = metric
        self.dim = dim
        self.screen = screen
        self.kind = "none"
        self.is_integer = False
        self.step: float | None = None
        # The kind that was to be made, also where the vectors allow none.
        self._wanted = "none"
        self._rows_at_mean = 0
        # What the plane has for so many of the last vectors means nothing yet.
        self._n_waiting = 0
        self._seen: Snapshot | None = None
        with durable():
            codes, terms, mean = self._empty(device)
        self._tensors = {"codes": codes, "terms": terms, "mean": mean}
        self._attach()

    def __getstate__(self) -> dict[str, Any]:
        # A copy has vectors of its own, and looks at them anew.
        state = super().__getstate__() | {"_seen": None}
        state.pop("_encoding", None)
        return state

    def _attach(self) -> None:
        super()._attach()
        self._encoding = ForkSafeLock()

    @property
    def codes(self) -> Tensor:
        """``(N, D)``, see `Plane`; without columns where those of a plane are the vectors."""
        return self._tensors["codes"]

    @property
    def terms(self) -> Tensor:
        """``(N, 4)``, see `Plane`."""
        return self._tensors["terms"]

    @property
    def mean(self) -> Tensor:
        """``(D,)``, see `Plane`."""
        return self._tensors["mean"]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        with durable():
            self._tensors = {name: fn(tensor) for name, tensor in self._tensors.items()}
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return self.kind

    def current(self, vectors: Tensor) -> Plane | None:
        """Return the plane of the vectors as they are now, or None where none is kept."""
        wanted = self.kind_for(vectors)
        if wanted == self.kind == "none":
            return None
        if not self._is_plane_of(vectors, wanted) or self._n_waiting:
            with self._encoding:
                # Another thread may have done it meanwhile.
                self._bring_up_to_date(vectors, wanted)
        if self.kind == "none":
            return None
        codes = vectors.detach() if self.kind == "fp32" else self.codes
        return Plane(codes, self.terms, self.mean, self.is_integer, self.step)

    def _bring_up_to_date(self, vectors: Tensor, wanted: str) -> None:
        if self._is_plane_of(vectors, wanted):
            self._encode_waiting(vectors)
        if not self._is_plane_of(vectors, wanted):
            # Optimisers, averaging of models and DDP write into vectors behind the index's back.
            self._make(vectors)

    def knows(self, vectors: Tensor) -> bool:
        """Whether this is the plane of the vectors as they are now.

        Nobody can tell that of a parameter: fused optimisers leave no trace of what they write.
        """
        return self._is_plane_of(vectors, self.kind_for(vectors))

    def _is_plane_of(self, vectors: Tensor, wanted: str) -> bool:
        if self._seen is None or isinstance(vectors, nn.Parameter):
            return False
        if self.kind != "none" and (
            self.terms.shape[0] != self._n_places(vectors) or self.terms.device != vectors.device
        ):
            # Another thread has looked between two steps of a change, or memory was short in between.
            return False
        return self._wanted == wanted and self._seen.matches(vectors)

    def _n_places(self, vectors: Tensor) -> int:
        """Return how many codes there are for these vectors."""
        return vectors.shape[0]

    def accept(self, vectors: Tensor) -> None:
        """Take the vectors, whose values have not changed, for known."""
        self._seen = Snapshot(vectors)

    def forget(self) -> None:
        """Make the plane anew at the next search."""
        self._seen = None

    def rebuild(self, vectors: Tensor) -> None:
        """Make the plane anew from all vectors ``(N, D)``."""
        self._make(vectors)

    def _make(self, vectors: Tensor) -> None:
        kind = self.kind_for(vectors)
        plane = None
        if kind != "none" and vectors.shape[0] and not vectors.is_meta:
            with durable():
                data = vectors.detach()
                plane = self._plain(data) if kind == "fp32" else self._coded(data, kind)
        self._take(plane, vectors)

    # Changes of vectors that the plane knows.

    def append(self, new: Tensor, vectors: Tensor) -> None:
        """Follow ``new (M, D)`` rows that now end the vectors ``(N, D)``."""
        n_before = vectors.shape[0] - new.shape[0]
        if n_before and self.kind == "none":
            self._accept_changed(vectors)
            return
        if not n_before:
            self.rebuild(vectors)
            return
        self._make_room(new.shape[0])
        self._n_waiting += new.shape[0]
        self._seen = Snapshot(vectors)
        if self._n_waiting * self.dim >= _MOST_WAITING:
            self._encode_waiting(vectors)

    def _make_room(self, n: int) -> None:
        """Append so many rows that are to be encoded later."""
        with durable():
            for name in self.row_tensors:
                held = getattr(self, name)
                self._tensors[name], self._reserves[name] = extend_rows(held, self._reserves.get(name), n)

    def _put_last(self, rows: dict[str, Tensor]) -> None:
        """Write the last rows."""
        with durable():
            for name, new in rows.items():
                held = getattr(self, name)
                held[held.shape[0] - new.shape[0] :] = new

    def _encode_waiting(self, vectors: Tensor) -> None:
        """Encode those of the vectors ``(N, D)`` that wait."""
        if not self._n_waiting:
            return
        # Unknown meanwhile: another thread waits for the end.
        n, self._seen = vectors.shape[0], None
        rows = self._encoded(vectors.detach()[n - self._n_waiting :])
        if rows is None:
            self.rebuild(vectors)
            return
        self._put_last({"codes": rows.codes, "terms": rows.terms})
        self._n_waiting = 0
        self._accept_changed(vectors)

    def _accept_changed(self, vectors: Tensor) -> None:
        """Take changes that have been followed for known, unless most rows are new and want another plane."""
        are_new = len(vectors) >= 2 * self._rows_at_mean
        if self.kind == "none":
            # What other rows did not allow, these may.
            self._seen = None if are_new and self._wanted != "none" else Snapshot(vectors)
        elif not are_new or self.kind == "fp32" or self.is_integer or not self._move_mean(vectors):
            self._seen = Snapshot(vectors)

    def overwrite(self, where: Tensor, new: Tensor, vectors: Tensor) -> None:
        """Follow ``new (M, D)`` rows that were written to rows ``where (M,)`` of the vectors."""
        if self.kind != "none" and where.numel():
            self._encode_waiting(vectors)
            if self._seen is None:
                # The rows that waited do not fit it: the next search makes it anew.
                return
        if self.kind != "none" and where.numel():
            rows = self._encoded(new.to(vectors.dtype))
            if rows is None:
                self.rebuild(vectors)
                return
            self._overwrite_rows(where, {"codes": rows.codes, "terms": rows.terms})
        self._rows_at_mean = max(0, self._rows_at_mean - where.numel())
        self._accept_changed(vectors)

    def keep(self, keep: Tensor, vectors: Tensor) -> None:
        """Follow the removal of the rows where ``keep (N,)`` is False."""
        if self.kind != "none" and vectors.shape[0]:
            self._n_waiting = int(keep[len(keep) - self._n_waiting :].sum())
            self._keep_rows(keep)
            self._seen = Snapshot(vectors)
        else:
            self._take(None, vectors)

    def follow(self, vectors: Tensor, dtype: torch.dtype) -> None:
        """Follow a move of vectors that had a dtype to another device or to shared memory."""
        casts = self.codes.dtype not in CODE_DTYPES.values() or self.terms.dtype != torch.float32
        kept = self.kind_for(vectors) == self._wanted and vectors.dtype == dtype
        if kept and not casts and not vectors.is_meta and self.terms.device == vectors.device:
            self._seen = Snapshot(vectors)
        else:
            self.rebuild(vectors)

    def kind_for(self, vectors: Tensor) -> str:
        """Return the kind of plane to keep of vectors, or "none"."""
        # An index may have become float64 since its screen was checked.
        if vectors.dtype == torch.float64:
            return "none"
        return choose_screen(self.screen, self.metric, vectors.dtype, self.dim, vectors.device)

    def _encoded(self, new: Tensor) -> Plane | None:
        """Return rows ``(M, D)`` as this plane encodes them, None where it cannot."""
        with durable():
            if self.kind == "fp32":
                return self._plain(new)
            if self.is_integer:
                low, high = (float(each - self.mean[0]) for each in torch.aminmax(new))
                if integer_offset(self.metric, new) is None or low < -128 or high > 127:
                    return None
            if self.step is not None:
                return encode_differences(new.detach(), self.mean, self.kind, self.step)
            return encode(self.metric, new.detach(), self.mean, self.kind, is_integer=self.is_integer)

    def _coded(self, vectors: Tensor, kind: str) -> Plane | None:
        """Return a plane of codes of all vectors ``(N, D)``."""
        if self.metric.name in METRICS:
            codes = choose_codes(self.metric, vectors, kind, self._order(vectors))
            return None if codes is None else codes.encode(vectors)
        return make_plane(self.metric, vectors, kind)

    def _plain(self, vectors: Tensor) -> Plane | None:
        """Return the plane of the vectors as they are, without a copy of them."""
        plane = plain_plane(self.metric, vectors.detach())
        return None if plane is None else dataclasses.replace(plane, codes=vectors.detach()[:, :0].clone())

    def _move_mean(self, vectors: Tensor) -> bool:
        """Make the plane anew about another mean where that repays; return whether it did."""
        self._rows_at_mean = vectors.shape[0]
        with durable():
            some = vectors.detach()[:: max(1, vectors.shape[0] // _ROWS_FOR_MEAN)]
            repays = self._shortens(some) if self.step is None else self._leaves_less(vectors.detach(), some)
        if repays:
            self.rebuild(vectors)
        return repays

    def _shortens(self, some: Tensor) -> bool:
        """Whether the squared norms would be shorter about the mean of some rows."""
        moved = (mean_of(self.metric, some) - self.mean).square().sum()
        return bool(moved > _WORTH_MOVING * self._row_terms()[:, NORM].square().mean())

    def _leaves_less(self, vectors: Tensor, some: Tensor) -> bool:
        """Whether codes made now would leave less of some rows, are of another kind or not worth making."""
        codes = choose_codes(self.metric, vectors, self._wanted, self._order(vectors))
        other = None if codes is None else codes.encode(some)
        if other is None or other.kind != self.kind:
            return True
        now, then = (terms[:, RESIDUAL].log().mean() for terms in (self._row_terms(), other.terms))
        return bool(then < now + math.log(1 - _WORTH_MOVING))

    def _order(self, vectors: Tensor) -> Tensor | None:
        """Return the rows ``(N,)``, those together that are near each other; None where that is not known."""
        return None

    def _row_terms(self) -> Tensor:
        """Return the terms of each row, ``(N, 4)``."""
        return self.terms

    def _empty(self, device: torch.device | str | None) -> tuple[Tensor, Tensor, Tensor]:
        return (
            torch.empty(0, self.dim, dtype=CODE_DTYPES["int8"], device=device),
            torch.empty(0, 4, dtype=torch.float32, device=device),
            torch.empty(0, dtype=torch.float32, device=device),
        )

    def _take(self, plane: Plane | None, vectors: Tensor) -> None:
        self._rows_at_mean = vectors.shape[0]
        self._n_waiting = 0
        self._wanted = self.kind_for(vectors)
        if plane is None:
            if self.kind == "none" and self.codes.device == vectors.device:
                self._seen = Snapshot(vectors)
                return
            with durable():
                codes, terms, mean = self._empty(vectors.device)
            plane, self.kind = Plane(codes, terms, mean), "none"
        else:
            self.kind = plane.kind
        self.is_integer, self.step = plane.is_integer, plane.step
        self._tensors["mean"] = plane.mean
        self._assign_rows({"codes": plane.codes, "terms": plane.terms})
        self._reserves.clear()
        self._seen = Snapshot(vectors)
