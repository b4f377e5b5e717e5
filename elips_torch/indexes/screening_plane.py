"""The plane of an index: kept right while its vectors change."""

from typing import ClassVar

import torch
from torch import Tensor

from elips_torch.core.metric import Metric
from elips_torch.indexes.row_tensors import RowTensors
from elips_torch.indexes.storage import durable
from elips_torch.kernels.plane import CODE_DTYPES, NORM, Plane, encode, integer_offset, make_plane, mean_of
from elips_torch.kernels.screen_choice import choose_screen

# The mean moves when that shortens the squared norms by this share.
_WORTH_MOVING = 0.05


class ScreeningPlane(RowTensors):
    """A low-precision copy of an index's vectors; see `elips_torch.kernels.plane`.

    It is derived from the vectors: no checkpoint and no file holds it. The mean is that of the first
    vectors, and is looked at again each time their number has doubled.

    Args:
        metric: the distance kind.
        dim: D.
        screen: "auto", "int8", "bf16" or "none".
        device: where the index lies.
    """

    row_tensors: ClassVar[tuple[str, ...]] = ("codes", "terms")

    codes: Tensor
    terms: Tensor
    mean: Tensor

    def __init__(self, metric: Metric, dim: int, screen: str, device: torch.device | str | None) -> None:
        super().__init__()
        self.metric = metric
        self.dim = dim
        self.screen = screen
        self.kind = "none"
        self.is_integer = False
        self._rows_at_mean = 0
        self._seen: tuple[object, ...] = ()
        with durable():
            tensors = self._empty(device)
        for name, tensor in zip(("codes", "terms", "mean"), tensors, strict=True):
            self.register_buffer(name, tensor, persistent=False)

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return self.kind

    def current(self, vectors: Tensor) -> Plane | None:
        """Return the plane of the vectors as they are now, or None where none is kept."""
        if self._seen != _state(vectors):
            # Optimisers, averaging of models and DDP write into vectors behind the index's back.
            self.rebuild(vectors)
        if self.kind == "none":
            return None
        return Plane(self.codes, self.terms, self.mean, self.is_integer)

    def rebuild(self, vectors: Tensor) -> None:
        """Make the plane anew from all vectors ``(N, D)``."""
        vectors = vectors.detach()
        kind = choose_screen(self.screen, self.metric, vectors.dtype, self.dim, vectors.device)
        plane = None
        # An index may have become float64 since its screen was checked.
        known = vectors.shape[0] and not vectors.is_meta and vectors.dtype != torch.float64
        if kind != "none" and known:
            with durable():
                plane = make_plane(self.metric, vectors, kind)
        self._take(plane, vectors)

    def append(self, new: Tensor, vectors: Tensor) -> None:
        """Follow ``new (M, D)`` rows that now end the vectors ``(N, D)``."""
        vectors, n_before = vectors.detach(), vectors.shape[0] - new.shape[0]
        if self.kind == "none" and n_before:
            self._seen = _state(vectors)
            return
        rows = self._encoded(new.to(vectors.dtype)) if n_before else None
        if rows is None or self.codes.shape[0] != n_before:
            self.rebuild(vectors)
            return
        self._append_rows({"codes": rows.codes, "terms": rows.terms})
        if vectors.shape[0] >= 2 * self._rows_at_mean and not self.is_integer:
            self._move_mean(vectors)
        self._seen = _state(vectors)

    def overwrite(self, where: Tensor, new: Tensor, vectors: Tensor) -> None:
        """Follow ``new (M, D)`` rows that were written to rows ``where (M,)`` of the vectors."""
        if self.kind != "none" and where.numel():
            rows = self._encoded(new.to(vectors.dtype))
            if rows is None:
                self.rebuild(vectors)
            else:
                self._overwrite_rows(where, {"codes": rows.codes, "terms": rows.terms})
        self._seen = _state(vectors)

    def keep(self, keep: Tensor, vectors: Tensor) -> None:
        """Follow the removal of the rows where ``keep (N,)`` is False."""
        if self.kind != "none" and vectors.shape[0]:
            self._keep_rows(keep)
            self._seen = _state(vectors)
        else:
            self._take(None, vectors)

    def follow(self, vectors: Tensor) -> None:
        """Follow a move of the index to another device or dtype."""
        kind = choose_screen(self.screen, self.metric, vectors.dtype, self.dim, vectors.device)
        fits = self.terms.dtype == torch.float32 and self.terms.device == vectors.device
        same = self._seen[-2:] == (vectors.dtype, vectors.shape) and not vectors.is_meta
        if fits and kind == self.kind and (same or kind == "none"):
            self._seen = _state(vectors)
        else:
            self.rebuild(vectors)

    def _encoded(self, new: Tensor) -> Plane | None:
        """Return rows ``(M, D)`` as this plane encodes them, None where it cannot."""
        with durable():
            if self.is_integer:
                low, high = (float(each - self.mean[0]) for each in torch.aminmax(new))
                if integer_offset(self.metric, new) is None or low < -128 or high > 127:
                    return None
            return encode(self.metric, new.detach(), self.mean, self.kind, is_integer=self.is_integer)

    def _move_mean(self, vectors: Tensor) -> None:
        with durable():
            moved = (mean_of(self.metric, vectors) - self.mean).square().sum()
            spread = self.terms[:, NORM].square().mean()
        self._rows_at_mean = vectors.shape[0]
        if bool(moved > _WORTH_MOVING * spread):
            self.rebuild(vectors)

    def _empty(self, device: torch.device | str | None) -> tuple[Tensor, Tensor, Tensor]:
        return (
            torch.empty(0, self.dim, dtype=CODE_DTYPES["int8"], device=device),
            torch.empty(0, 4, dtype=torch.float32, device=device),
            torch.empty(0, dtype=torch.float32, device=device),
        )

    def _take(self, plane: Plane | None, vectors: Tensor) -> None:
        self.kind = "none" if plane is None else plane.kind
        if plane is None:
            with durable():
                codes, terms, mean = self._empty(vectors.device)
            plane = Plane(codes, terms, mean)
        self.is_integer = plane.is_integer
        self._buffers["mean"] = plane.mean
        self._assign_rows({"codes": plane.codes, "terms": plane.terms})
        self._reserves.clear()
        self._rows_at_mean = vectors.shape[0]
        self._seen = _state(vectors)


def _state(vectors: Tensor) -> tuple[object, ...]:
    """Return what changes when somebody writes into the vectors or replaces them."""
    return vectors._version, vectors.data_ptr(), vectors.dtype, vectors.shape
