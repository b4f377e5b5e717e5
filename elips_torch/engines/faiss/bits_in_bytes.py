"""What faiss says of an index of bits only in the bytes of a file: its graph, and the labels in its hash."""

import dataclasses
import struct
from typing import Any

import numpy as np

from elips_torch.core.errors import DamagedIndexError

_HEADER = struct.Struct("<4siiqBi")  # mark, D, size of a code, ntotal, is_trained, metric
_COUNT = struct.Struct("<q")
_NUMBERS = struct.Struct("<iiiii")  # entry point, highest level, two widths of searches, one of no use
_MARK_OF_A_GRAPH, _MARK_OF_CODES, _MARK_OF_A_HASH = b"IBHf", b"IBxF", b"IBHh"
_HASH = struct.Struct("<iiqi")  # hashed bits, bits to flip, number of lists, bits of their sizes
# Bytes between the header of an index and the one inside it: of id maps, and of inverted files.
_BEFORE_INNER = {b"IBMp": 0, b"IBM2": 0, b"IBwF": 16}


@dataclasses.dataclass
class _Bytes:
    """Bytes that are read from the front."""

    content: memoryview
    place: int = 0

    def take(self, form: struct.Struct) -> tuple[Any, ...]:
        """Return the next numbers."""
        found = form.unpack_from(self.content, self.place)
        self.place += form.size
        return found

    def take_array(self, dtype: Any) -> Any:
        """Return the next array, which stays where it is."""
        (count,) = self.take(_COUNT)
        size = np.dtype(dtype).itemsize
        if not 0 <= count <= (len(self.content) - self.place) // size:
            raise struct.error("an array is longer than what follows")
        array = np.frombuffer(self.content, dtype, count, self.place)
        self.place += count * size
        return array


def check_graph_of_bits(content: memoryview) -> None:
    """Check the graph in the bytes of an index of bits; what has none passes.

    Faiss ends the process where it reads (1.14) or searches (others) one that is damaged.

    Args:
        content: as faiss writes it to files.

    Raises:
        DamagedIndexError: they end too early, or two parts of the graph contradict each other.
    """
    source = _Bytes(content)
    fault = None
    try:
        while (mark := bytes(content[source.place : source.place + 4])) in _BEFORE_INNER:
            n_labels = source.take(_HEADER)[3]
            source.place += _BEFORE_INNER[mark]
            if mark != b"IBwF":
                # Faiss believes an id map.
                n_rows = _HEADER.unpack_from(content, source.place)[3]
                if n_rows != n_labels:
                    raise DamagedIndexError(f"an id map is damaged: it has {n_labels} ids for {n_rows} rows")
        fault = _fault_of(source) if mark == _MARK_OF_A_GRAPH else None
    except struct.error:
        fault = "ends too early"
    if fault is not None:
        raise DamagedIndexError(f"the graph of bits is damaged: it {fault}")


def _fault_of(source: _Bytes) -> str | None:
    """Return what is wrong with a graph, None where nothing is."""
    _, dim, code_size, n_nodes, _, metric = source.take(_HEADER)
    if dim < 8 or dim % 8 or 8 * code_size != dim or n_nodes < 0 or metric not in (0, 1):
        return f"has dim {dim}, codes of {code_size} bytes, {n_nodes} nodes and metric {metric}"
    source.take_array(np.float64)
    room, levels, starts, neighbours = (source.take_array(dtype) for dtype in ("<i4", "<i4", "<u8", "<i4"))
    entry, top, *_ = source.take(_NUMBERS)
    if len(levels) != n_nodes or len(starts) != n_nodes + 1:
        return f"has {len(levels)} levels and {len(starts) - 1} lists for {n_nodes} nodes"
    if n_nodes and not 1 <= levels.min() <= levels.max() == top + 1 < len(room):
        return f"has levels from {levels.min()} to {levels.max()}, its highest is {top}"
    if not -1 <= entry < max(n_nodes, 0) or (n_nodes and (entry < 0 or levels[entry] != top + 1)):
        return f"is entered at node {entry} of {n_nodes}"
    if len(room) and (room[0] != 0 or (np.diff(room.astype(np.int64)) < 0).any()):
        return "has levels with room for less than nothing"
    ends = np.concatenate(([0], room[levels].astype(np.int64).cumsum()))
    if starts[0] != 0 or len(neighbours) != ends[-1] or not np.array_equal(starts.astype(np.int64), ends):
        return "has lists of another size than its levels say"
    if len(neighbours) and not -1 <= neighbours.min() <= neighbours.max() < n_nodes:
        return f"has neighbours from {neighbours.min()} to {neighbours.max()}, there are {n_nodes} nodes"
    mark, *inner = source.take(_HEADER)
    if mark != _MARK_OF_CODES or tuple(inner[:3]) != (dim, code_size, n_nodes):
        return "is not followed by the codes of its nodes"
    if len(source.take_array(np.uint8)) != n_nodes * code_size:
        return "has codes for another number of nodes"
    return None


def label_lists_in_hash(content: memoryview) -> list[Any]:
    """Return the labels in each list of an ``IndexBinaryHash``, which faiss shows nowhere else.

    Args:
        content: as faiss writes it; the arrays lie in it, and are written to where it is.

    Raises:
        DamagedIndexError: this is something else.
    """
    source, lists = _Bytes(content), []
    try:
        mark, *_ = source.take(_HEADER)
        _, _, n_lists, _ = source.take(_HASH)
        source.take_array(np.uint8)
        for _ in range(n_lists):
            lists.append(source.take_array("<i8"))
            source.take_array(np.uint8)
    except struct.error as error:
        raise DamagedIndexError(f"the hash of bits is damaged: {error}") from error
    if mark != _MARK_OF_A_HASH or source.place != len(content):
        raise DamagedIndexError("the hash of bits is damaged, or not as faiss 1.12 to 1.15 write it")
    return lists
