"""What faiss says of an index only in the bytes of a file: its graph, and the rows and labels in hashes."""

import dataclasses
import struct
from typing import Any

import numpy as np

from elips_torch.core.errors import DamagedIndexError

_HEADER_OF_BITS = struct.Struct("<4siiqBi")  # mark, D, size of a code, ntotal, is_trained, metric
_HEADER_OF_FLOATS = struct.Struct("<4siqqqBi")  # mark, D, ntotal, two of no use, is_trained, metric
_COUNT = struct.Struct("<q")
_ARGUMENT = struct.Struct("<f")  # of a metric with a number above 1
_NUMBERS = struct.Struct("<iiiii")  # entry point, highest level, two widths of searches, one of no use
_OF_CAGRA = struct.Struct("<BBi")  # widest lists kept, lowest level only, number of entry points
_MARK_OF_CODES, _MARK_OF_A_HASH, _MARK_OF_HASHES, _MARK_OF_CAGRA = b"IBxF", b"IBHh", b"IBHm", b"IBHc"
_MARKS_OF_GRAPHS = (b"IBHf", _MARK_OF_CAGRA, b"IHNf", b"IHNs", b"IHNp", b"IHN2")
_HASH = struct.Struct("<iiqi")  # hashed bits, bits to flip, number of lists, bits of their sizes
_HASHES = struct.Struct("<iii")  # hashed bits, number of hashes, bits to flip
_MAP = struct.Struct("<iq")  # bits of a row, number of lists
# Bytes between the header of an index and the one inside it: of id maps, floats under bits, inverted files.
_ID_MAPS = (b"IBMp", b"IBM2", b"IxMp", b"IxM2")
_INVERTED_FILES = (b"IBwF", b"IwFl", b"IwSq", b"IwPQ")
_BEFORE_INNER = {**dict.fromkeys((*_ID_MAPS, b"IBFf"), 0), **dict.fromkeys(_INVERTED_FILES, 16)}
# Bits of a row that are read from whole bytes, at whatever bit it starts.
_MOST_BITS = 56
_ROWS_AT_ONCE = 2**20


@dataclasses.dataclass(frozen=True)
class _Header:
    """What an index says of itself first; the size of a code is 0 for one of floats."""

    mark: bytes
    dim: int
    code_size: int
    n_rows: int
    metric: int


@dataclasses.dataclass
class _Bytes:
    """Bytes that are read from the front."""

    content: memoryview
    place: int = 0

    def mark(self) -> bytes:
        """Return with what the next index begins."""
        return bytes(self.content[self.place : self.place + 4])

    def take(self, form: struct.Struct) -> tuple[Any, ...]:
        """Return the next numbers."""
        found = form.unpack_from(self.content, self.place)
        self.place += form.size
        return found

    def take_header(self) -> _Header:
        """Return the next header."""
        if self.mark().startswith(b"IB"):
            mark, dim, code_size, n_rows, _, metric = self.take(_HEADER_OF_BITS)
            return _Header(mark, dim, code_size, n_rows, metric)
        mark, dim, n_rows, _, _, _, metric = self.take(_HEADER_OF_FLOATS)
        if metric > 1:
            self.take(_ARGUMENT)
        return _Header(mark, dim, 0, n_rows, metric)

    def take_array(self, dtype: Any) -> Any:
        """Return the next array, which stays where it is."""
        (count,) = self.take(_COUNT)
        size = np.dtype(dtype).itemsize
        if not 0 <= count <= (len(self.content) - self.place) // size:
            raise struct.error("an array is longer than what follows")
        array = np.frombuffer(self.content, dtype, count, self.place)
        self.place += count * size
        return array


def check_bytes(content: memoryview) -> None:
    """Check the graph or the hashes in the bytes of an index; what has none passes.

    Where one is damaged, faiss ends the process, some releases at reading and some at searching, or finds
    rows that there are not. Graphs behind transforms and refinements, and CAGRA of floats, are left to it.

    Args:
        content: as faiss writes it to files.

    Raises:
        DamagedIndexError: they end too early, or two parts contradict each other.
    """
    source = _Bytes(content)
    what, fault = "graph", None
    try:
        while source.mark() in _BEFORE_INNER:
            outer = source.take_header()
            source.place += _BEFORE_INNER[outer.mark]
            if outer.mark in _ID_MAPS:
                _check_id_map(outer.n_rows, _Bytes(content, source.place).take_header().n_rows)
        if source.mark() in _MARKS_OF_GRAPHS:
            what = "graph of bits" if source.mark().startswith(b"IB") else "graph"
            fault = _fault_of_graph(source)
        elif source.mark() == _MARK_OF_HASHES:
            what = "hash of bits"
            fault = _fault_of_hashes(source)
    except struct.error:
        fault = "ends too early"
    if fault is not None:
        raise DamagedIndexError(f"the {what} is damaged: it {fault}")


def _check_id_map(n_labels: int, n_rows: int) -> None:
    # Faiss believes an id map.
    if n_rows != n_labels:
        raise DamagedIndexError(f"an id map is damaged: it has {n_labels} ids for {n_rows} rows")


def _fault_of_graph(source: _Bytes) -> str | None:
    """Return what is wrong with a graph, None where nothing is."""
    header = source.take_header()
    dim, n_nodes, of_bits = header.dim, header.n_rows, header.mark.startswith(b"IB")
    fault = _fault_of_sizes(header) if of_bits else None
    if fault is not None or dim < 1 or n_nodes < 0:
        return fault or f"has dim {dim} and {n_nodes} nodes"
    flat = header.mark == _MARK_OF_CAGRA and bool(source.take(_OF_CAGRA)[1])
    source.take_array(np.float64)
    room, levels, starts, neighbours = (source.take_array(dtype) for dtype in ("<i4", "<i4", "<u8", "<i4"))
    entry, top, *_ = source.take(_NUMBERS)
    if len(levels) != n_nodes or len(starts) != n_nodes + 1:
        return f"has {len(levels)} levels and {len(starts) - 1} lists for {n_nodes} nodes"
    if n_nodes and not 1 <= levels.min() <= max(levels.max(), top + 1) < len(room):
        return f"has levels from {levels.min()} to {levels.max()}, its highest is {top}"
    # One of the lowest level only is entered anywhere.
    least = -1 if flat or not n_nodes else 0
    if not least <= entry < max(n_nodes, 0) or (entry >= 0 and levels[entry] <= top):
        return f"is entered at node {entry} of {n_nodes}, its highest level is {top}"
    if len(room) and (room[0] != 0 or (np.diff(room.astype(np.int64)) < 0).any()):
        return "has levels with room for less than nothing"
    ends = np.concatenate(([0], room[levels].astype(np.int64).cumsum()))
    if starts[0] != 0 or len(neighbours) != ends[-1] or not np.array_equal(starts.astype(np.int64), ends):
        return "has lists of another size than its levels say"
    if len(neighbours) and not -1 <= neighbours.min() <= neighbours.max() < n_nodes:
        return f"has neighbours from {neighbours.min()} to {neighbours.max()}, there are {n_nodes} nodes"
    tall = np.flatnonzero(levels > 1)
    for level in range(1, int(levels.max(initial=1))):
        tall = tall[levels[tall] > level]
        slots = np.arange(room[level], room[level + 1])
        met = neighbours[(ends[tall][:, None] + slots).ravel()]
        if (levels[met[met >= 0]] <= level).any():
            return f"leads at level {level} to nodes that are not there"
    return _fault_of_codes(source, header)


def _fault_of_sizes(header: _Header) -> str | None:
    if (
        header.dim < 8
        or 8 * header.code_size != header.dim
        or header.n_rows < 0
        or header.metric not in (0, 1)
    ):
        return (
            f"has dim {header.dim}, codes of {header.code_size} bytes, {header.n_rows} nodes "
            f"and metric {header.metric}"
        )
    return None


def _fault_of_codes(source: _Bytes, outer: _Header) -> str | None:
    """Return what is wrong with the index of the rows that a graph or hashes lead to."""
    inner = source.take_header()
    fits = (inner.dim, inner.code_size, inner.n_rows) == (outer.dim, outer.code_size, outer.n_rows)
    if not fits or (outer.code_size and inner.mark != _MARK_OF_CODES):
        return "is not followed by the codes of its nodes"
    if outer.code_size and len(source.take_array(np.uint8)) != outer.n_rows * outer.code_size:
        return "has codes for another number of nodes"
    return None


def _fault_of_hashes(source: _Bytes) -> str | None:
    """Return what is wrong with several hashes of the same rows, None where nothing is."""
    header = source.take_header()
    fault = _fault_of_sizes(header) or _fault_of_codes(source, header)
    if fault is not None:
        return fault
    n_hashed, n_maps, _ = source.take(_HASHES)
    if not 1 <= n_hashed <= header.dim:
        return f"hashes {n_hashed} of {header.dim} bits"
    for _ in range(n_maps):
        width, n_lists = source.take(_MAP)
        packed = source.take_array(np.uint8)
        if not 0 <= width <= _MOST_BITS or n_lists < 0:
            return f"has {n_lists} lists of rows in {width} bits"
        largest = _largest_row(packed, n_hashed, width, n_lists)
        if largest >= header.n_rows:
            return f"leads to row {largest}, there are {header.n_rows}"
    return None


def _largest_row(packed: Any, n_hashed: int, width: int, n_lists: int) -> int:
    """Return the largest row in the lists of a hash, -1 where they hold none.

    A list is its hash, its length and its rows, each in so many bits, one right after the other.
    """
    if n_lists * (n_hashed + width) > 8 * len(packed):
        raise struct.error("there are fewer lists")
    content, place, mask = packed.tobytes() + bytes(8), 0, (1 << width) - 1
    starts, sizes = np.empty(n_lists, np.int64), np.empty(n_lists, np.int64)
    for number in range(n_lists):
        place += n_hashed
        window = content[place // 8 : place // 8 + 8]
        size = (int.from_bytes(window, "little") >> place % 8) & mask
        place += width
        starts[number], sizes[number] = place, size
        place += size * width
    if place > 8 * len(packed):
        raise struct.error("lists are longer than what follows")
    held, largest = np.frombuffer(content, np.uint8), -1
    ends = sizes.cumsum()
    for first in range(0, int(ends[-1]) if n_lists else 0, _ROWS_AT_ONCE):
        rows = np.arange(first, min(first + _ROWS_AT_ONCE, int(ends[-1])))
        lists = np.searchsorted(ends, rows, side="right")
        places = starts[lists] + (rows - ends[lists] + sizes[lists]) * width
        values = np.zeros(len(rows), np.uint64)
        for byte in range(8):
            values |= held[places // 8 + byte].astype(np.uint64) << np.uint64(8 * byte)
        values = (values >> (places % 8).astype(np.uint64)) & np.uint64(mask)
        largest = max(largest, int(values.max()))
    return largest


def label_lists_in_hash(content: memoryview) -> list[Any]:
    """Return the labels in each list of an ``IndexBinaryHash``, which faiss shows nowhere else.

    Args:
        content: as faiss writes it; the arrays lie in it, and are written to where it is.

    Raises:
        DamagedIndexError: this is something else.
    """
    source, lists = _Bytes(content), []
    try:
        mark = source.take_header().mark
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
