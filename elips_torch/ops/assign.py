"""The nearest centroid of each vector."""

from typing import Any

import torch
from torch import Tensor

from elips_torch.core.execution import plain_arithmetic, runs_directly
from elips_torch.core.hardware import float32_product_is_exact
from elips_torch.core.metric import Metric, metric_of, resolve_metric
from elips_torch.core.tiling import DEFAULT_WORKSPACE_BYTES
from elips_torch.kernels.assign_native import VectorCodes, assigns_natively, code_bytes, native_nearest_rows
from elips_torch.kernels.nearest_row import nearest_rows
from elips_torch.ops.knn import run_knn


def assign(
    vectors: Tensor,  # (N, D)
    centroids: Tensor,  # (K, D)
    metric: str = "l2",
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    codes: VectorCodes | None = None,
) -> Tensor:  # (N,) int64
    """Return the nearest centroid of each vector, of equally near ones the first.

    Nearest is by the definition of "l2", "ip" or "cosine" on the vectors in float32, so the result
    does not depend on the device, the number of threads or the settings of the caller. No ``(N, K)``
    matrix is made. The arguments are not checked.

    Args:
        vectors: ``(N, D)`` of any float dtype.
        centroids: ``(K, D)`` of any float dtype.
        metric: "l2", "ip" or "cosine".
        workspace_bytes: limit on temporary memory, in bytes.
        codes: from `vector_codes` of the same vectors, for one metric; saves time from the second call on.
    """
    vectors, centroids, name = vectors.detach(), centroids.detach(), resolve_metric(metric).name
    if runs_directly(vectors, centroids):
        return _nearest_centroids(vectors, centroids, name, workspace_bytes, codes)
    labels: Tensor = assign_op(vectors, centroids, name, workspace_bytes)
    return labels


def vector_codes(
    vectors: Tensor,  # (N, D) float32
    centroids: Tensor,  # (K, D)
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> VectorCodes | None:
    """Return memory for what several calls of `assign` can share; None where they share nothing.

    Args:
        vectors: those that will be assigned; they must not change in between.
        centroids: to begin with.
        workspace_bytes: limit on that memory, in bytes.
    """
    if code_bytes(vectors) > workspace_bytes or not assigns_natively(vectors, centroids, workspace_bytes):
        return None
    return VectorCodes(vectors, centroids.detach().float().mean(0))


def _assign(vectors: Tensor, centroids: Tensor, metric: str, workspace_bytes: int) -> Tensor:
    return _nearest_centroids(vectors, centroids, metric, workspace_bytes, None)


def _nearest_centroids(
    vectors: Tensor, centroids: Tensor, metric: str, workspace_bytes: int, codes: VectorCodes | None
) -> Tensor:
    kind = metric_of(metric, 0.0)
    with plain_arithmetic(vectors.device):
        if vectors.dtype == torch.float64:
            vectors = vectors.float()
        if centroids.dtype == torch.float64:
            centroids = centroids.float()
        if not assigns_natively(vectors, centroids, workspace_bytes):
            return _by_products(vectors, centroids, kind, workspace_bytes)
        labels = native_nearest_rows(vectors, centroids, kind, codes)
        left = (labels < 0).nonzero()[:, 0]
        if left.numel():
            labels[left] = _by_products(vectors[left], centroids, kind, workspace_bytes)
        return labels


def _by_products(vectors: Tensor, centroids: Tensor, kind: Metric, workspace_bytes: int) -> Tensor:
    if float32_product_is_exact(vectors.device):
        return nearest_rows(vectors, centroids, kind, workspace_bytes)
    _, rows = run_knn(vectors, centroids, 1, kind, workspace_bytes=workspace_bytes, check_finite=False)
    return rows[:, 0]


assign_op = torch.library.custom_op(
    "elips_torch::assign", _assign, mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)


@assign_op.register_fake
def _fake(vectors: Tensor, *rest: Any) -> Tensor:
    return vectors.new_empty(vectors.shape[0], dtype=torch.int64)
