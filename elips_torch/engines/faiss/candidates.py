"""Candidates for exact search: the rows that faiss ranks best by brute force, in float32."""

import torch
from torch import Tensor

from elips_torch.core.dispatch import Request
from elips_torch.core.errors import ImplementationError
from elips_torch.core.metric import Metric
from elips_torch.core.tiling import DEFAULT_WORKSPACE_BYTES
from elips_torch.engines.faiss.builds import INSTALL, FaissBuild, is_installed
from elips_torch.engines.faiss.forked import use_one_thread_if_forked
from elips_torch.engines.faiss.gpu_resources import MOST_NEIGHBOURS, check_gpu
from elips_torch.engines.faiss.products import GPU_DTYPES, limits_within, multiply_on_gpu

# Where a term of faiss's other metrics is 0/0 it gives NaN, and the row is lost.
FAISS_METRICS = {
    "l2": "METRIC_L2",
    "ip": "METRIC_INNER_PRODUCT",
    "cosine": "METRIC_INNER_PRODUCT",
    "l1": "METRIC_L1",
    "linf": "METRIC_Linf",
    "lp": "METRIC_Lp",
}
# Bytes per feature of a converted row: float64, normalised, and float32.
CONVERTED_BYTES = 24
_ON_GPU = ("l2", "ip", "cosine")


def brute_force_reasons(request: Request) -> list[str]:
    """Return why faiss cannot find candidates for a call; imports nothing."""
    reasons = [] if is_installed() else [INSTALL]
    if request.device.type not in ("cpu", "cuda") or torch.version.hip:
        reasons.append(f"faiss serves the CPU and CUDA, the tensors are on {request.device}")
    if torch.float64 in (request.query_dtype, request.dtype):
        reasons.append("faiss has no float64 vectors")
    name = request.metric.name
    served = _ON_GPU if request.device.type == "cuda" else tuple(FAISS_METRICS)
    if name not in served:
        reasons.append(f"faiss serves {', '.join(map(repr, served))} here, not {name!r}")
    if request.device.type == "cuda" and min(request.k or 1, request.n_rows) > MOST_NEIGHBOURS:
        reasons.append(f"faiss serves k up to {MOST_NEIGHBOURS} on a GPU")
    return reasons


def check_gpu_serves(build: FaissBuild, metric: Metric, gpu: int) -> None:
    """Raise unless faiss searches tensors on the CPU under a metric by way of a GPU.

    Raises:
        ImplementationError: it has no code for it.
        DeviceError: there is no such GPU.
    """
    if metric.name not in _ON_GPU:
        raise ImplementationError(
            f"faiss serves {', '.join(map(repr, _ON_GPU))} on GPUs, not {metric.name!r}"
        )
    check_gpu(build, gpu)


def common_dtype(queries: Tensor, database: Tensor, *, on_gpu: bool) -> torch.dtype:
    """Return the dtype in which faiss takes both; on a GPU it multiplies no two that differ."""
    same = queries.dtype == database.dtype and database.dtype in GPU_DTYPES
    return database.dtype if same and on_gpu else torch.float32


def converts(metric: Metric, vectors: Tensor, dtype: torch.dtype) -> bool:
    """Whether `brute_force` needs a copy of vectors that it takes in a dtype."""
    if metric.name == "cosine" or vectors.dtype != dtype:
        return True
    return not vectors.is_contiguous() or vectors.is_neg()


def empty_candidates(n_queries: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return tensors ``(Q, K)`` for scores and rows, not filled."""
    scores = torch.empty((n_queries, k), dtype=torch.float32, device=device)
    return scores, torch.empty((n_queries, k), dtype=torch.int64, device=device)


def brute_force(
    build: FaissBuild,
    queries: Tensor,  # (Q, D)
    database: Tensor,  # (N, D)
    k: int,
    metric: Metric,
    gpu: int | None = None,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    out: tuple[Tensor, Tensor] | None = None,  # (Q, K) float32, (Q, K) int64
    kept: Tensor | None = None,  # (N, D)
) -> tuple[Tensor, Tensor]:  # (Q, K) float32, (Q, K) int64
    """Return scores and numbers of the k rows that faiss ranks best for each query; -1 where it finds none.

    Args:
        build: the faiss to use.
        queries: ``(Q, D)`` of any dtype but float64, on a CPU or a GPU.
        database: ``(N, D)``, on the same device.
        k: at most N.
        metric: one that `brute_force_reasons` does not refuse.
        gpu: number of one that tensors on the CPU go through by parts; None leaves them where they are.
        workspace_bytes: how much of them may be there at once.
        out: contiguous tensors for what is returned; None makes them.
        kept: ``(N, D)`` float32 on the CPU, what `prepared` makes of the database; None makes it.
    """
    on_gpu = gpu is not None or queries.device.type != "cpu"
    dtype = common_dtype(queries, database, on_gpu=on_gpu)
    queries = prepared(queries, metric, dtype)
    database = prepared(database, metric, dtype) if kept is None else kept
    if out is None:
        out = empty_candidates(len(queries), k, queries.device)
    scores, ids = out
    if gpu is not None:
        use_one_thread_if_forked(build)
        limits = limits_within(queries, database, k, workspace_bytes)
        code = getattr(build.module, FAISS_METRICS[metric.name])
        multiply_on_gpu(build, gpu, queries, database, code, scores, ids, limits)
    elif not on_gpu:
        use_one_thread_if_forked(build)
        _on_cpu(build, queries, database, k, metric, scores, ids)
    else:
        code = getattr(build.module, FAISS_METRICS[metric.name])
        # Its own limits on memory are for what lies on the CPU: the caller cuts instead.
        multiply_on_gpu(build, queries.device.index or 0, queries, database, code, scores, ids)
    return scores, ids


def prepared(vectors: Tensor, metric: Metric, dtype: torch.dtype) -> Tensor:
    """Return vectors as faiss takes them; themselves where it does."""
    if not converts(metric, vectors, dtype):
        return vectors
    vectors = vectors.resolve_neg()
    if metric.name == "cosine":
        # In float64 no norm overflows; a zero vector stays one and has cosine 0.
        wide = vectors.double()
        norms: Tensor = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
        vectors = wide / norms.masked_fill(norms == 0, 1.0)
    return vectors.to(dtype).contiguous()


def _on_cpu(
    build: FaissBuild,
    queries: Tensor,
    database: Tensor,
    k: int,
    metric: Metric,
    scores: Tensor,
    ids: Tensor,
) -> None:
    faiss = build.module
    floats = faiss.cast_integer_to_float_ptr
    (n_rows, dim), n_queries = database.shape, len(queries)
    vectors = (floats(queries.data_ptr()), floats(database.data_ptr()), dim, n_queries, n_rows)
    results = (floats(scores.data_ptr()), faiss.cast_integer_to_idx_t_ptr(ids.data_ptr()))
    if metric.name == "l2":
        faiss.knn_L2sqr(*vectors, k, *results)
    elif metric.name in ("ip", "cosine"):
        faiss.knn_inner_product(*vectors, k, *results)
    else:
        faiss.knn_extra_metrics(*vectors, getattr(faiss, FAISS_METRICS[metric.name]), metric.p, k, *results)
