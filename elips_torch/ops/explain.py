"""Saying which implementation serves a call, and why."""

from torch import Tensor

from elips_torch.core.dispatch import Explanation, Implementation, Request, explain_choice
from elips_torch.core.errors import ArgumentError
from elips_torch.core.metric import resolve_metric
from elips_torch.core.validation import check_vectors
from elips_torch.kernels.screen_choice import check_screen
from elips_torch.ops import knn, pairwise_distance, range_search

OPERATIONS: dict[str, tuple[Implementation, ...]] = {
    "knn": knn.IMPLEMENTATIONS,
    "range_search": range_search.IMPLEMENTATIONS,
    "pairwise_distance": pairwise_distance.IMPLEMENTATIONS,
}


def explain(
    queries: Tensor,  # (Q, D) or (D,)
    database: Tensor,  # (N, D)
    k: int | None = None,
    *,
    operation: str = "knn",
    metric: str = "l2",
    p: float | None = None,
    screen: str = "auto",
    implementation: str = "auto",
) -> Explanation:
    """Return which implementation would serve a call and why the others would not.

    The result shows as text at a prompt and in a notebook; a script prints it. Asking compiles nothing:
    where C++ or a compiled function is chosen, the call itself compiles it, once.

    Args:
        queries: ``(Q, D)`` or ``(D,)``; only shape, dtype and device are looked at.
        database: ``(N, D)``.
        k: number of neighbours, for "knn".
        operation: "knn", "range_search" or "pairwise_distance".
        metric: name of the distance kind.
        p: exponent of metric "lp".
        screen: the plane that "knn" would have: "int8", "bf16", "none", or "auto" for what it would
            choose for plain tensors.
        implementation: what the call would ask for.

    Returns:
        Explanation: the name that was ``chosen``, and the ``reasons`` against each of the others.

    Raises:
        ArgumentError: unknown operation, or arguments that the operation refuses.

    >>> import torch
    >>> explanation = explain(torch.rand(2, 8), torch.rand(100, 8).half(), k=10, metric="ip")
    >>> explanation  # doctest: +ELLIPSIS
    knn of 2 x 100 x 8 float16, ip, k=10 on cpu (...)
      triton       Triton kernels run on CUDA and ROCm, the tensors are on cpu...
      native       ...there is no screening plane in int8 or float32 to run C++ code on
      compiled     there is no screening plane to run compiled code on
      faiss        it selects by float32 products and proves nothing...
      eager        chosen
    >>> explanation.chosen
    'eager'
    """
    if operation not in OPERATIONS:
        raise ArgumentError(f"operation is {operation!r}, expected one of {', '.join(map(repr, OPERATIONS))}")
    kind = resolve_metric(metric, p)
    check_vectors("database", database)
    check_vectors("queries", queries, dim=database.shape[1], owner="the database", allow_single=True)
    rows = queries[None] if queries.ndim == 1 else queries
    check_screen(screen, kind, database.dtype, database.shape[1])
    kept = knn.screen_for_call(screen, rows, database, kind) if operation == "knn" else "none"
    request = Request.of(rows, database, kind, k, kept)
    return explain_request(operation, request, implementation)


def explain_request(operation: str, request: Request, implementation: str) -> Explanation:
    """Return what would serve a request; `explain` for those who describe the call themselves."""
    return explain_choice(operation, OPERATIONS[operation], request, implementation)
