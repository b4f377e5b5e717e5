"""Vectors to measure with: from a file, or made up."""

import dataclasses
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from elips_torch.core.errors import ArgumentError, ShapeError
from elips_torch.core.metric import resolve_metric
from elips_torch.core.validation import check_values, check_vectors

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_STORED = {**DTYPES, "float64": torch.float64}
_NOISE = 0.7
_ROWS_PER_CENTRE = 100


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Queries and a database.

    Attributes:
        name: short, for tables.
        description: what the vectors are, in words.
        queries: ``(Q, D)``.
        database: ``(N, D)``.
    """

    name: str
    description: str
    queries: Tensor
    database: Tensor

    @property
    def dim(self) -> int:
        """D, size of a vector."""
        return self.database.shape[1]

    def to(self, device: torch.device, dtype: torch.dtype) -> "Dataset":
        """Return the same on a device, with the values rounded to a dtype."""
        return dataclasses.replace(
            self,
            queries=self.queries.to(device=device, dtype=dtype).contiguous(),
            database=self.database.to(device=device, dtype=dtype).contiguous(),
        )


def read_dataset(path: str | os.PathLike[str], queries_key: str, database_key: str) -> Dataset:
    """Read queries and database from a safetensors file.

    Args:
        path: the file.
        queries_key: name of the tensor ``(Q, D)``.
        database_key: name of the tensor ``(N, D)``.

    Raises:
        ArgumentError: there is no such file, it is damaged, or it lacks a tensor.
        ShapeError: the tensors do not fit each other.
        DtypeError: they are not floating-point.
        NonFiniteError: they hold NaN or infinity.
    """
    if not Path(path).is_file():
        raise ArgumentError(f"no file at {os.fspath(path)!r}")
    try:
        with safe_open(path, "pt") as file:
            held = list(file.keys())
            missing = [key for key in (queries_key, database_key) if key not in held]
            if missing:
                wanted = " and no ".join(map(repr, missing))
                raise ArgumentError(f"{os.fspath(path)} has no {wanted}, it has {', '.join(map(repr, held))}")
            queries, database = file.get_tensor(queries_key), file.get_tensor(database_key)
    except (OSError, SafetensorError) as error:
        raise ArgumentError(f"{os.fspath(path)} cannot be read as a safetensors file: {error}") from error
    check_vectors(repr(database_key), database)
    check_vectors(repr(queries_key), queries, dim=database.shape[1], owner=repr(database_key))
    if not len(queries) or not len(database):
        shapes = f"{tuple(queries.shape)} and {tuple(database.shape)}"
        raise ShapeError(f"{queries_key!r} and {database_key!r} have shapes {shapes}, expected a row in each")
    for key, vectors in ((database_key, database), (queries_key, queries)):
        check_values(repr(key), vectors, resolve_metric("l2"))
    stored = str(database.dtype).removeprefix("torch.")
    shape = f"{len(database):,} x {database.shape[1]}, {len(queries):,} queries"
    return Dataset(Path(path).stem, f"{shape}, stored as {stored}", queries, database)


def as_dtype(name: str) -> torch.dtype:
    """Return the dtype of a name.

    Raises:
        ArgumentError: indexes store vectors in no such dtype.

    >>> as_dtype("float16")
    torch.float16
    """
    if name not in _STORED:
        raise ArgumentError(f"{name!r} is no dtype to store vectors in, expected {', '.join(_STORED)}")
    return _STORED[name]


def clustered(n: int, dim: int, n_queries: int, seed: int = 0) -> Dataset:
    """Make unit vectors in clusters, and queries from the same clusters.

    Each vector is a random centre plus 0.7 times normal noise, normalised; there is a centre for
    about every hundred vectors. Unlike plain noise, such data has near neighbours.

    Args:
        n: N, number of database vectors.
        dim: D.
        n_queries: Q.
        seed: of the random numbers.

    Raises:
        ArgumentError: a size below 1.
    """
    if min(n, dim, n_queries) < 1:
        raise ArgumentError(
            f"sizes are {n} vectors of dim {dim} and {n_queries} queries, expected at least 1"
        )
    generator = torch.Generator().manual_seed(seed)
    n_centres = max(1, n // _ROWS_PER_CENTRE)
    centres = torch.randn(n_centres, dim, generator=generator)
    vectors = centres[torch.randint(n_centres, (n + n_queries,), generator=generator)]
    vectors.add_(torch.randn(n + n_queries, dim, generator=generator), alpha=_NOISE)
    vectors = torch.nn.functional.normalize(vectors, dim=1)
    description = (
        f"{n:,} x {dim} clustered unit vectors, {n_queries:,} queries "
        f"({n_centres:,} centres + {_NOISE} normal noise, normalised, seed {seed})"
    )
    return Dataset(f"clustered {n}x{dim}", description, vectors[n:].clone(), vectors[:n].clone())
