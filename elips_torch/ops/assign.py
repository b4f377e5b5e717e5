"""The nearest centroid of each vector."""

from typing import Any

import torch
from torch import Tensor

from elips_torch.core.execution import plain_arithmetic, runs_directly
from elips_torch.core.hardware import float32_product_is_exact
from elips_torch.core.metric import metric_of, resolve_metric
from elips_torch.core.tiling import DEFAULT_WORKSPACE_BYTES
from elips_torch.kernels.nearest_row import nearest_rows
from elips_torch.ops.knn import run_knn


def assign(
    vectors: Tensor,  # (N, D)
    centroids: Tensor,  # (K, D)
    metric: str = "l2",
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> Tensor:  # (N,) int64
    """Return the nearest centroid of each vector, of equally near ones the first.

    Nearest is by the definition of "l2", "ip" or "cosine" on the vectors in float32, so the result
    does not depend on the device, the number of threads or the settings of the caller. No ``(N, K)``
    matrix is made. The arguments are not checked.
    """
    run = _assign if runs_directly(vectors.detach(), centroids.detach()) else assign_op
    labels: Tensor = run(vectors.detach(), centroids.detach(), resolve_metric(metric).name, workspace_bytes)
    return labels


def _assign(vectors: Tensor, centroids: Tensor, metric: str, workspace_bytes: int) -> Tensor:
    kind = metric_of(metric, 0.0)
    with plain_arithmetic(vectors.device):
        if vectors.dtype == torch.float64:
            vectors = vectors.float()
        if centroids.dtype == torch.float64:
            centroids = centroids.float()
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
