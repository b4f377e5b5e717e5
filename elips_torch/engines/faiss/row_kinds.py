"""Indexes of faiss hold rows of floats or of bits, by two sets of classes and functions under other names."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from elips_torch.engines.faiss.builds import FaissBuild


@dataclasses.dataclass(frozen=True)
class RowKind:
    """How faiss takes rows of one kind, and what it calls its functions for their indexes.

    Attributes:
        rows: dtype of rows; those of bits are ``(N, D / 8)``, eight in a byte.
        scores: dtype of what a search writes.
        as_rows: function that makes faiss's pointer to rows of an address.
        as_scores: likewise, to scores.
        downcast: function that returns an index as the class that it is.
        clone: copies an index.
        factory: makes an index from a description.
        serialize: turns an index into bytes.
        deserialize: makes an index of them.
        read: reads a file.
        write: writes one.
    """

    rows: torch.dtype
    scores: torch.dtype
    as_rows: str
    as_scores: str
    downcast: str
    clone: str
    factory: str
    serialize: str
    deserialize: str
    read: str
    write: str

    def row_size(self, dim: int) -> int:
        """Return the number of entries in a row."""
        return dim // 8 if self.rows == torch.uint8 else dim

    def pointer_to(self, build: FaissBuild, rows: Tensor) -> Any:
        """Return faiss's pointer to rows of this dtype, which lie one after another."""
        return getattr(build.module, self.as_rows)(rows.data_ptr())


FLOATS = RowKind(
    rows=torch.float32,
    scores=torch.float32,
    as_rows="cast_integer_to_float_ptr",
    as_scores="cast_integer_to_float_ptr",
    downcast="downcast_index",
    clone="clone_index",
    factory="index_factory",
    serialize="serialize_index",
    deserialize="deserialize_index",
    read="read_index",
    write="write_index",
)
BITS = RowKind(
    rows=torch.uint8,
    scores=torch.int32,
    as_rows="cast_integer_to_uint8_ptr",
    as_scores="cast_integer_to_int_ptr",
    downcast="downcast_IndexBinary",
    clone="clone_binary_index",
    factory="index_binary_factory",
    serialize="serialize_index_binary",
    deserialize="deserialize_index_binary",
    read="read_index_binary",
    write="write_index_binary",
)
# Bits that a hash may have.
LARGEST_HASH = 64
# With what files of indexes of bits begin, and no others.
MARK_OF_BITS = b"IB"


def kind_of(build: FaissBuild, index: Any) -> RowKind:
    """Return the kind of rows that an index of faiss holds."""
    return BITS if isinstance(index, build.module.IndexBinary) else FLOATS


def downcast(build: FaissBuild, index: Any) -> Any:
    """Return an index as the class that it is."""
    return getattr(build.module, kind_of(build, index).downcast)(index)
