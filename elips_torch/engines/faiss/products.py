"""Brute force on a GPU by faiss's one function for it, on the caller's stream."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from elips_torch.core.errors import ArgumentError
from elips_torch.engines.faiss.builds import FaissBuild
from elips_torch.engines.faiss.cuvs import cuvs_state
from elips_torch.engines.faiss.gpu_resources import device_resources, on_current_stream

_TYPES = {
    torch.float32: "DistanceDataType_F32",
    torch.float16: "DistanceDataType_F16",
    torch.bfloat16: "DistanceDataType_BF16",
}
GPU_DTYPES: tuple[torch.dtype, ...] = tuple(_TYPES)


@dataclasses.dataclass(frozen=True)
class MemoryLimits:
    """How much of what lies on the CPU may be on the GPU at once; 0 for all of it.

    Attributes:
        vectors: bytes of database rows, faiss's ``vectorsMemoryLimit``.
        queries: bytes of queries and results, faiss's ``queriesMemoryLimit``.
    """

    vectors: int = 0
    queries: int = 0


def limits_within(queries: Tensor, database: Tensor, k: int, workspace_bytes: int) -> MemoryLimits:
    """Return limits of which each has half a workspace.

    Raises:
        ArgumentError: it does not hold a row, or a query and its results.
    """
    row, query = (each.shape[1] * each.element_size() for each in (database, queries))
    # A query has a score and an id for each of its neighbours.
    least = 2 * max(row, query + 12 * k)
    if workspace_bytes < least:
        raise ArgumentError(f"workspace_bytes is {workspace_bytes}, expected at least {least}")
    return MemoryLimits(workspace_bytes // 2, workspace_bytes // 2)


def multiply_on_gpu(
    build: FaissBuild,
    device: int,
    queries: Tensor,  # (Q, D)
    database: Tensor,  # (N, D)
    metric: int,
    scores: Tensor,  # (Q, K) float32
    ids: Tensor,  # (Q, K) int64
    limits: MemoryLimits | None = None,
) -> None:
    """Write the K best rows for each query into scores and ids.

    Args:
        build: a faiss with GPU code.
        device: number of the GPU.
        queries: ``(Q, D)`` contiguous, of a dtype in `GPU_DTYPES`.
        database: ``(N, D)``, likewise.
        metric: faiss's number of it.
        scores: ``(Q, K)`` float32, contiguous.
        ids: ``(Q, K)`` int64, contiguous.
        limits: for tensors on the CPU, all of them: they go through the GPU by parts.
    """
    faiss = build.module
    pointer = faiss.cast_integer_to_void_ptr
    call: Any = faiss.GpuDistanceParams()
    call.metric, call.k, call.dims, call.device = metric, scores.shape[1], database.shape[1], device
    call.vectors, call.numVectors = pointer(database.data_ptr()), len(database)
    call.vectorType, call.vectorsRowMajor = getattr(faiss, _TYPES[database.dtype]), True
    call.queries, call.numQueries = pointer(queries.data_ptr()), len(queries)
    call.queryType, call.queriesRowMajor = getattr(faiss, _TYPES[queries.dtype]), True
    call.outDistances = faiss.cast_integer_to_float_ptr(scores.data_ptr())
    call.outIndices = pointer(ids.data_ptr())
    call.outIndicesType = faiss.IndicesDataType_I64
    if hasattr(call, "use_cuvs"):
        call.use_cuvs = cuvs_state("auto", build).enabled
    resources = device_resources(build, device)
    with on_current_stream(build, device, resources):
        if limits is None:
            faiss.bfKnn(resources.resources, call)
        else:
            faiss.bfKnn_tiling(resources.resources, call, limits.vectors, limits.queries)
