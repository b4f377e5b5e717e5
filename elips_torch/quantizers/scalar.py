"""Scalar quantization: each feature by itself, in 4 to 16 bits."""

from typing import ClassVar

import torch
from torch import Tensor

from elips_torch.core.errors import ArgumentError, NonFiniteError
from elips_torch.core.tiling import spans
from elips_torch.core.validation import describe_rows
from elips_torch.kernels.coded_rows import PackedTable
from elips_torch.quantizers.packing import pack, packed_size, unpack
from elips_torch.quantizers.quantizer import Quantizer, check_dim

_BITS = {"int8": 8, "int6": 6, "int4": 4}
_FLOATS = {"fp16": torch.float16, "bf16": torch.bfloat16}
QTYPES = (*_BITS, *_FLOATS)
# Features coded at a time: the temporaries stay in cache.
_FEATURES_AT_ONCE = 2**18


class ScalarQuantizer(Quantizer):
    """Codes each feature by itself: as a step of its range, or as a short float.

    A feature is scaled from its range over the vectors of `fit` to ``0 .. 2**bits - 1`` and rounded down;
    it decodes to the middle of the step. What lies outside the range is coded as its nearer end. Codes,
    ranges and decoded values are those of faiss' QT_8bit, QT_6bit, QT_4bit, QT_fp16 and QT_bf16, up to the
    last bit of a decoded value; short floats are rounded to the nearest here, ties to even.

    Args:
        dim: D, size of a vector.
        qtype: "int8", "int6" or "int4", per feature 8, 6 or 4 bits; "fp16" or "bf16", which learn nothing.
        device: where the ranges lie.

    Attributes:
        minimum: ``(D,)`` float32, the low end of each feature's range; empty before `fit` and for "fp16"
            and "bf16".
        extent: ``(D,)`` float32, high end less low end, 0 for a constant feature.

    Raises:
        ElipsError: an argument has a wrong type or value.

    >>> import torch
    >>> quantizer = ScalarQuantizer(2, "int4").fit(torch.tensor([[0.0, 5.0], [1.5, 5.0]]))
    >>> codes = quantizer.encode(torch.tensor([[0.0, 5.0], [0.7, 5.0], [9.0, 5.0]]))
    >>> codes.tolist()
    [[0], [7], [15]]
    >>> quantizer.decode(codes)[1].tolist()
    [0.75, 5.0]
    """

    learned_buffers: ClassVar[tuple[str, ...]] = ("minimum", "extent")

    minimum: Tensor
    extent: Tensor

    def __init__(self, dim: int, qtype: str = "int8", *, device: torch.device | str | None = None) -> None:
        if qtype not in QTYPES:
            raise ArgumentError(f"qtype is {qtype!r}, expected one of {', '.join(map(repr, QTYPES))}")
        bits = _BITS.get(qtype, 16)
        super().__init__(check_dim(dim), packed_size(dim, bits), device)
        self.qtype = qtype
        self.bits = bits

    @property
    def is_trained(self) -> bool:
        """Whether vectors can be coded."""
        return self.qtype in _FLOATS or super().is_trained

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return f"dim={self.dim}, qtype={self.qtype!r}"

    def _expected_shapes(self) -> dict[str, tuple[int | None, ...]]:
        shape = (0 if self.qtype in _FLOATS else self.dim,)
        return {"minimum": shape, "extent": shape}

    def _learn(self, vectors: Tensor) -> dict[str, Tensor]:
        if self.qtype in _FLOATS:
            return {}
        if not vectors.shape[0]:
            raise ArgumentError("vectors has 0 rows, expected at least 1 to learn ranges from")
        minimum, maximum = torch.aminmax(vectors, dim=0)
        extent = maximum - minimum
        wide = (~extent.isfinite()).nonzero()[:, 0]
        if wide.numel():
            raise NonFiniteError(f"vectors has a range beyond float32 in feature {int(wide[0])}")
        return {"minimum": minimum, "extent": extent}

    def _encode(self, vectors: Tensor, check_finite: bool) -> Tensor:
        codes = torch.empty(vectors.shape[0], self.code_size, dtype=torch.uint8, device=vectors.device)
        for start, stop in spans(vectors.shape[0], self._rows_at_once()):
            if self.qtype in _FLOATS:
                codes[start:stop] = self._shorten(vectors[start:stop], start, check_finite)
            else:
                codes[start:stop] = pack(self._steps(vectors[start:stop], check_finite), self.bits)
        return codes

    def _steps(self, vectors: Tensor, check_finite: bool) -> Tensor:
        place = vectors.float().sub(self.minimum).div_(self.extent)
        place.masked_fill_(self.extent == 0, 0.0)
        if not check_finite:
            place.nan_to_num_(0.0)
        return place.clamp_(0.0, 1.0).mul_(2**self.bits - 1).to(torch.uint8)

    def _shorten(self, vectors: Tensor, first: int, check_finite: bool) -> Tensor:
        short = vectors.to(_FLOATS[self.qtype]).contiguous()
        if check_finite:
            lost = (~short.isfinite()).any(1).nonzero()[:, 0]
            if lost.numel():
                raise NonFiniteError(
                    f"vectors has values too large for qtype {self.qtype!r} in {describe_rows(lost + first)}"
                )
        return short.view(torch.uint8)

    def _decode(self, codes: Tensor) -> Tensor:
        if self.qtype in _FLOATS:
            return codes.contiguous().view(_FLOATS[self.qtype]).float()
        vectors = torch.empty(codes.shape[0], self.dim, dtype=torch.float32, device=codes.device)
        step, low = self._grid()
        for start, stop in spans(codes.shape[0], self._rows_at_once()):
            part = vectors[start:stop]
            # Two roundings, also where a device could multiply and add with one: the same values everywhere.
            part.copy_(unpack(codes[start:stop], self.bits, self.dim)).mul_(step).add_(low)
        return vectors

    def _grid(self) -> tuple[Tensor, Tensor]:
        """Return the step of each feature's code and what code 0 stands for, ``(D,)`` each."""
        step = self.extent / (2**self.bits - 1)
        return step, self.minimum + 0.5 * step

    def packed_table(self) -> PackedTable:
        """Return what codes stand for as plain tensors."""
        if self.qtype in _FLOATS:
            short = torch.empty(0, self.dim, dtype=_FLOATS[self.qtype], device="cpu")
            return PackedTable(short, bits=self.bits)
        return PackedTable(*self._grid(), bits=self.bits)

    def _rows_at_once(self) -> int:
        return max(1, _FEATURES_AT_ONCE // self.dim)
