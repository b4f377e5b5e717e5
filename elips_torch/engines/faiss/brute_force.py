"""Brute-force search by faiss on plain tensors, without a copy."""

import dataclasses
import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from elips_torch.core.errors import ArgumentError, DeviceError, DtypeError, ImplementationError, MetricError
from elips_torch.core.validation import check_vectors
from elips_torch.engines.faiss.builds import FaissBuild, standing_as_faiss

# Products run through BLAS from this many queries on: always, and never.
_ALWAYS, _NEVER = 1, 2**31 - 1
_MOST_ON_GPU = 2048


@dataclasses.dataclass(frozen=True)
class FaissSettings:
    """What faiss lets callers tune in brute-force search; None leaves a value as it is.

    Attributes:
        blas_threshold: number of queries from which on products run through BLAS.
        database_block: database rows per BLAS call.
        min_k_reservoir: k from which on a reservoir selects the best, and below it a heap.
    """

    blas_threshold: int | None = None
    database_block: int | None = None
    min_k_reservoir: int | None = None

    def __str__(self) -> str:
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return ", ".join(f"{name}={value}" for name, value in given.items()) or "defaults"


# Worth trying: which is fastest depends on the build, the number of queries and k.
SETTINGS: tuple[FaissSettings, ...] = (
    FaissSettings(),
    FaissSettings(blas_threshold=_ALWAYS),
    FaissSettings(blas_threshold=_NEVER),
    FaissSettings(blas_threshold=_ALWAYS, min_k_reservoir=1),
    FaissSettings(blas_threshold=_ALWAYS, database_block=8192),
)
_VARIABLES = {
    "blas_threshold": "distance_compute_blas_threshold",
    "database_block": "distance_compute_blas_database_bs",
    "min_k_reservoir": "distance_compute_min_k_reservoir",
}


def current_settings(build: FaissBuild) -> FaissSettings:
    """Return the values that a build works with now."""
    return FaissSettings(**{ours: getattr(build.module.cvar, name) for ours, name in _VARIABLES.items()})


def apply_settings(build: FaissBuild, settings: FaissSettings) -> None:
    """Make a build work with these values, in the whole process."""
    for ours, name in _VARIABLES.items():
        value = getattr(settings, ours)
        if value is not None:
            setattr(build.module.cvar, name, value)


def knn_faiss(
    build: FaissBuild,
    queries: Tensor,  # (Q, D)
    database: Tensor,  # (N, D)
    k: int,
    metric: str = "l2",
) -> tuple[Tensor, Tensor]:  # (Q, K) float32, (Q, K) int64
    """Find the k nearest rows by `faiss.knn` on the CPU; candidates as faiss gives them.

    Args:
        build: the faiss to use.
        queries: ``(Q, D)`` float32, contiguous, on the CPU; `torch.from_numpy` takes an array as it is.
        database: ``(N, D)``, likewise.
        k: number of neighbours, at most N.
        metric: "l2" (squared) or "ip"; for cosine pass normalised vectors and "ip".

    Returns:
        Scores and row numbers, which share the memory of what faiss filled.

    Raises:
        ElipsError: an argument that would need a copy, or that faiss does not serve.
    """
    _check(queries, database, k, torch.float32)
    if queries.device.type != "cpu":
        raise DeviceError(f"queries are on {queries.device}, knn_faiss serves the CPU")
    scores, ids = build.module.knn(
        queries.detach().numpy(), database.detach().numpy(), k, metric=_metric(build, metric)
    )
    return torch.from_numpy(scores), torch.from_numpy(ids)


def knn_faiss_gpu(
    build: FaissBuild,
    queries: Tensor,  # (Q, D)
    database: Tensor,  # (N, D)
    k: int,
    metric: str = "l2",
) -> tuple[Tensor, Tensor]:  # (Q, K) float32, (Q, K) int64
    """Find the k nearest rows by `faiss.knn_gpu`, on the current CUDA stream.

    Args:
        build: a faiss with GPU code.
        queries: ``(Q, D)`` float32, float16 or bfloat16, contiguous, on a GPU.
        database: ``(N, D)``, likewise.
        k: number of neighbours, at most N and at most 2,048.
        metric: "l2" (squared) or "ip".

    Returns:
        Scores and row numbers on the GPU.

    Raises:
        ElipsError: an argument on the CPU or of another dtype, or a build without GPU code.
    """
    if not build.has_gpu:
        raise ImplementationError(f"{build} has no GPU code")
    _check(queries, database, k, torch.float32, torch.float16, torch.bfloat16)
    if queries.device.type == "cpu":
        raise DeviceError("queries are on the CPU, knn_faiss_gpu serves GPUs")
    if k > _MOST_ON_GPU:
        raise ArgumentError(f"k is {k}, faiss serves at most {_MOST_ON_GPU} on a GPU")
    with standing_as_faiss(build):
        # Makes `knn_gpu` take tensors and the current stream.
        importlib.import_module("faiss.contrib.torch_utils")
    index = queries.device.index
    device = torch.cuda.current_device() if index is None and queries.is_cuda else index or 0
    scores, ids = build.module.knn_gpu(
        _resources(build, device), queries, database, k, metric=_metric(build, metric), device=device
    )
    return scores, ids


@functools.lru_cache(maxsize=16)
def _resources(build: FaissBuild, device: int) -> Any:
    # Making them takes about a tenth of a second and a gigabyte.
    return build.module.StandardGpuResources()


def check_build(build: FaissBuild) -> None:
    """Check that a build finds what is there; two in one process could have disturbed each other.

    Raises:
        ImplementationError: it does not.
    """
    generator = torch.Generator().manual_seed(0)
    database, queries = torch.randn(500, 32, generator=generator), torch.randn(40, 32, generator=generator)
    for metric, wanted in (("ip", -queries @ database.T), ("l2", torch.cdist(queries, database))):
        for count in (1, len(queries)):
            _, found = knn_faiss(build, queries[:count], database, 5, metric)
            if not torch.equal(found, wanted[:count].topk(5, largest=False).indices):
                raise ImplementationError(f"{build} in {build.folder} returns wrong neighbours ({metric})")


def _metric(build: FaissBuild, metric: str) -> int:
    names = {"l2": "METRIC_L2", "ip": "METRIC_INNER_PRODUCT"}
    if metric not in names:
        raise MetricError(f"metric is {metric!r}, faiss serves 'l2' and 'ip' here")
    return int(getattr(build.module, names[metric]))


def _check(queries: Tensor, database: Tensor, k: int, *dtypes: torch.dtype) -> None:
    check_vectors("database", database)
    check_vectors("queries", queries, dim=database.shape[1], owner="the database", device=database.device)
    for name, tensor in (("queries", queries), ("database", database)):
        if tensor.dtype not in dtypes:
            raise DtypeError(f"{name} has dtype {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
        if not tensor.is_contiguous():
            raise ArgumentError(f"{name} is not contiguous, expected rows that lie one after another")
    if not 1 <= k <= len(database):
        raise ArgumentError(f"k is {k}, expected 1 to {len(database)}, the number of rows")
