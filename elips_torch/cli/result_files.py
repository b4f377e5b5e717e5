"""What commands write beside indexes, whole or not at all: neighbours, and numbers as JSON."""

import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from elips_torch.cli.arrow_columns import check_pyarrow

NEIGHBOUR_ENDINGS = (".parquet", ".jsonl")
# Takes the number of the first query, scores ``(B, K)`` and ids ``(B, K)``.
WriteNeighbours = Callable[[int, Tensor, Tensor], None]


@contextmanager
def whole_file(path: str) -> Iterator[Path]:
    """Yield a path to write to, which takes the place of another when the block ends well."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}{target.suffix}")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(value: Any, path: str) -> None:
    """Write a value as JSON."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def check_neighbours(path: str) -> None:
    """Check that neighbours can be written to a path of either ending.

    Raises:
        ImportError: parquet, and pyarrow is not installed.
    """
    if path.lower().endswith(".parquet"):
        check_pyarrow()


@contextmanager
def neighbours_file(path: str) -> Iterator[WriteNeighbours]:
    """Yield what writes neighbours, a batch of queries at a time.

    Each query is a row: its number, its ids and their scores, best first. Where fewer than k were found,
    there are fewer.
    """
    with whole_file(path) as temporary:
        write = _parquet if path.lower().endswith(".parquet") else _jsonl
        with write(temporary) as write_batch:
            yield write_batch


@contextmanager
def _jsonl(path: Path) -> Iterator[WriteNeighbours]:
    with path.open("w", encoding="utf-8") as file:

        def write(first: int, scores: Tensor, ids: Tensor) -> None:
            found = (ids >= 0).sum(1).tolist()
            # Nine digits bring every float32 back.
            for i, (n, row, near) in enumerate(zip(found, scores.tolist(), ids.tolist(), strict=True)):
                shown = [float(f"{score:.9g}") for score in row[:n]]
                file.write(json.dumps({"query": first + i, "ids": near[:n], "scores": shown}) + "\n")

        yield write


@contextmanager
def _parquet(path: Path) -> Iterator[WriteNeighbours]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"query": pa.int64(), "ids": pa.list_(pa.int64()), "scores": pa.list_(pa.float32())}
    with pq.ParquetWriter(path, pa.schema(list(kinds.items()))) as writer:

        def write(first: int, scores: Tensor, ids: Tensor) -> None:
            found = ids >= 0
            lims = pa.array([0, *found.sum(1).cumsum(0).tolist()], pa.int32())
            columns = [
                pa.array(range(first, first + len(ids)), pa.int64()),
                pa.ListArray.from_arrays(lims, pa.array(ids[found].numpy())),
                pa.ListArray.from_arrays(lims, pa.array(scores[found].numpy())),
            ]
            writer.write_batch(pa.record_batch(columns, schema=writer.schema))

        yield write
