"""Splitting a (Q, N) problem into tiles that fit a workspace."""

import dataclasses
import itertools
from collections.abc import Iterator

DEFAULT_WORKSPACE_BYTES = 256 * 2**20
MINIMUM_WORKSPACE_BYTES = 2**20

# Measured on two AVX-512 cores: tiles of 8,192 rows keep the product's output in cache, and more
# than 512 queries at a time gain nothing.
_PREFERRED_ROWS = 8192
_PREFERRED_QUERIES = 512


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of the tiles of a (Q, N) problem."""

    queries: int
    rows: int


def plan_tiles(
    n_queries: int, n_rows: int, *, workspace_bytes: int, cell_bytes: int, row_bytes: int, query_bytes: int
) -> Tiles:
    """Return the tile sizes whose memory stays within the workspace.

    Args:
        n_queries: Q.
        n_rows: N.
        workspace_bytes: bytes that a tile may take.
        cell_bytes: bytes per (query, row) cell of a tile, all temporaries counted.
        row_bytes: bytes per database row of a tile, for converted copies.
        query_bytes: bytes per query of a tile, for converted copies and running results.
    """
    rows = max(1, min(n_rows, _PREFERRED_ROWS))
    queries = max(1, min(n_queries, _PREFERRED_QUERIES))

    def size() -> int:
        return queries * rows * cell_bytes + rows * row_bytes + queries * query_bytes

    while size() > workspace_bytes and (rows > 1 or queries > 1):
        # Halve the side that costs more by itself; without such a side, the longer one.
        if rows > 1 and (queries == 1 or rows * row_bytes >= queries * query_bytes):
            rows = (rows + 1) // 2
        else:
            queries = (queries + 1) // 2
    return Tiles(queries, rows)


def spans(total: int, step: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) pairs that cover ``range(total)`` in steps.

    >>> list(spans(5, 2))
    [(0, 2), (2, 4), (4, 5)]
    """
    for start in range(0, total, step):
        yield start, min(start + step, total)


def even_cuts(total: int, most: int) -> list[tuple[int, int]]:
    """Cut ``range(total)`` into parts of at most ``most`` that differ in length by one at most.

    >>> even_cuts(7, 3)
    [(0, 2), (2, 4), (4, 7)]
    """
    parts = -(-total // most)
    cuts = [total * part // parts for part in range(parts + 1)] if parts else []
    return list(itertools.pairwise(cuts))
