"""Brute-force search by faiss on plain tensors, without a copy."""

import dataclasses

import torch
from torch import Tensor

from elips_torch.core.errors import ArgumentError, DeviceError, DtypeError, ImplementationError, MetricError
from elips_torch.core.validation import check_count, check_vectors
from elips_torch.engines.faiss.builds import FaissBuild
from elips_torch.engines.faiss.forked import use_one_thread_if_forked
from elips_torch.engines.faiss.gpu_resources import MOST_NEIGHBOURS, check_gpu
from elips_torch.engines.faiss.products import GPU_DTYPES, limits_within, multiply_on_gpu

# Products run through BLAS from this many queries on: always, and never.
_ALWAYS, _NEVER = 1, 2**31 - 1


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
    use_one_thread_if_forked(build)
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
    *,
    device: int | None = None,
    workspace_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:  # (Q, K) float32, (Q, K) int64
    """Find the k nearest rows as `faiss.knn_gpu` does, on the current CUDA stream of the device.

    What lies on the GPU is read where it is and results are written into tensors there. What lies on the CPU
    goes through the GPU by parts: a database may be larger than its memory.

    Args:
        build: a faiss with GPU code.
        queries: ``(Q, D)`` float32, float16 or bfloat16, contiguous.
        database: ``(N, D)``, likewise, on the same device.
        k: number of neighbours, at most N and at most 2,048.
        metric: "l2" (squared) or "ip".
        device: number of the GPU, for tensors on the CPU only.
        workspace_bytes: for tensors on the CPU, how much of them and of the results may be on the GPU at
            once: half for rows, half for queries. Default: all.

    Returns:
        Scores and row numbers, where the queries are.

    Raises:
        ElipsError: an argument of another dtype, tensors on the CPU without ``device``, no such GPU, or a
            build without GPU code.
    """
    if not build.has_gpu:
        raise ImplementationError(f"{build} has no GPU code")
    _check(queries, database, k, *GPU_DTYPES)
    if k > MOST_NEIGHBOURS:
        raise ArgumentError(f"k is {k}, faiss serves at most {MOST_NEIGHBOURS} on a GPU")
    limits = None
    if queries.device.type == "cpu":
        if device is None:
            raise DeviceError("queries are on the CPU, knn_faiss_gpu serves GPUs; device= says which one")
        if workspace_bytes is not None:
            check_count("workspace_bytes", workspace_bytes)
            limits = limits_within(queries, database, k, workspace_bytes)
        use_one_thread_if_forked(build)
    elif device is not None or workspace_bytes is not None:
        raise ArgumentError(
            f"device and workspace_bytes are for tensors on the CPU, queries are on {queries.device}"
        )
    number = (queries.device.index or 0) if device is None else device
    check_gpu(build, number)
    scores = torch.empty((len(queries), k), dtype=torch.float32, device=queries.device)
    ids = torch.empty((len(queries), k), dtype=torch.int64, device=queries.device)
    code = _metric(build, metric)
    multiply_on_gpu(build, number, queries.detach(), database.detach(), code, scores, ids, limits)
    return scores, ids


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
