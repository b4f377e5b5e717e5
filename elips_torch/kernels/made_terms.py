"""Terms that bound float32 products, made for one call where nobody keeps any."""

from torch import Tensor, float32

from elips_torch.core.dispatch import Request
from elips_torch.core.metric import Metric
from elips_torch.kernels.knn_native import leaves_rows_out
from elips_torch.kernels.plane import Plane, plain_plane

# Bytes of a row's terms, what share of the workspace they may take, and the least one that has room for what
# making them takes beside.
_TERM_BYTES, _SHARE, _LEAST_WORKSPACE = 16, 1 / 8, 2**24
# Fewer queries are compared by distances under "l2", which need no terms.
_REPAY_TERMS = 16


def few_queries_reasons(request: Request) -> list[str]:
    """Return why terms are not worth making for a call; empty where they are, or none are made.

    Torch takes longer to make those of "cosine" than to search for few queries (measured).
    """
    if request.metric.name != "cosine" or request.screen != "none" or request.n_queries >= _REPAY_TERMS:
        return []
    return [f"for {request.n_queries} queries, bounds of products cost more than a search in torch"]


def with_terms(
    n_queries: int,
    database: Tensor,  # (N, D)
    k: int | None,
    metric: Metric,
    plane: Plane | None,
    workspace_bytes: int,
) -> tuple[Plane | None, int]:
    """Return a plane that screens a call on the CPU, and what is left of the workspace beside it.

    Args:
        n_queries: Q.
        database: ``(N, D)``.
        k: number of neighbours; None for all within a radius.
        metric: the distance kind.
        plane: one that is there; None makes one of float32 vectors, unless distances are quicker.
        workspace_bytes: limit on temporary memory, in bytes.
    """
    n_rows = database.shape[0]
    n_bytes = _TERM_BYTES * n_rows
    if plane is not None or metric.form != "product" or database.dtype != float32:
        return plane, workspace_bytes
    if n_bytes > workspace_bytes * _SHARE or workspace_bytes < _LEAST_WORKSPACE:
        return None, workspace_bytes
    if metric.name == "l2" and n_queries < _REPAY_TERMS:
        return None, workspace_bytes
    if k is not None and not leaves_rows_out(n_rows, k):
        return None, workspace_bytes
    return plain_plane(metric, database), workspace_bytes - n_bytes
