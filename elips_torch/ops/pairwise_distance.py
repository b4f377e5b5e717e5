"""All pairwise scores between two sets of vectors."""

from typing import Any

import torch
from torch import Tensor

from elips_torch.core.dispatch import Implementation, Request, choose, float64_reasons
from elips_torch.core.execution import plain_arithmetic, refuse_second_derivative, runs_directly
from elips_torch.core.metric import metric_of, resolve_metric
from elips_torch.core.tiling import DEFAULT_WORKSPACE_BYTES
from elips_torch.core.validation import check_vectors, check_workspace
from elips_torch.kernels.pairwise_distance_eager import pairwise_distance_eager, pairwise_gradient

IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation("eager", pairwise_distance_eager, float64_reasons),
)


def pairwise_distance(
    queries: Tensor,  # (Q, D)
    database: Tensor,  # (N, D)
    *,
    metric: str = "l2",
    p: float | None = None,
    implementation: str = "auto",
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> Tensor:  # (Q, N) float32
    """Score every query against every row of a database, exactly.

    Args:
        queries: ``(Q, D)``, float32, float16, bfloat16 or float64.
        database: ``(N, D)`` of any of these dtypes, on the queries' device.
        metric: name of the distance kind, see `elips_torch.METRICS`.
        p: exponent of metric "lp".
        implementation: "auto", or a name that `explain` lists.
        workspace_bytes: limit on temporary memory beside the result, in bytes. Default 256 MiB.

    Returns:
        ``(Q, N)`` float32: the definition accumulated in float64 and rounded once; what it gives for
        NaN and infinity too, since values are not checked. It carries gradients to both sides.

    Raises:
        ElipsError: an argument of wrong type, shape, dtype, device or value.

    >>> import torch
    >>> pairwise_distance(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]]), metric="l1")
    tensor([[7.]])
    """
    kind = resolve_metric(metric, p)
    check_vectors("database", database)
    dim, device = database.shape[1], database.device
    check_vectors("queries", queries, dim=dim, owner="the database", device=device)
    check_workspace(workspace_bytes)
    run = _pairwise_distance if runs_directly(queries, database) else pairwise_distance_op
    return run(queries, database, kind.name, kind.p, implementation, workspace_bytes)


def _pairwise_distance(
    queries: Tensor, database: Tensor, metric: str, p: float, implementation: str, workspace_bytes: int
) -> Tensor:
    kind = metric_of(metric, p)
    request = Request.of(queries, database, kind)
    chosen = choose("pairwise_distance", IMPLEMENTATIONS, request, implementation)
    with plain_arithmetic(queries.device):
        scores: Tensor = chosen.run(queries, database, kind, workspace_bytes)
    return scores


pairwise_distance_op = torch.library.custom_op(
    "elips_torch::pairwise_distance",
    _pairwise_distance,
    mutates_args=(),
    tags=(torch.Tag.cudagraph_unsafe,),
)


@pairwise_distance_op.register_fake
def _fake(queries: Tensor, database: Tensor, *rest: Any) -> Tensor:
    return queries.new_empty((queries.shape[0], database.shape[0]), dtype=torch.float32)


@torch.library.custom_op("elips_torch::pairwise_distance_backward", mutates_args=())
def pairwise_distance_backward_op(
    grad: Tensor, queries: Tensor, database: Tensor, metric: str, p: float, workspace_bytes: int
) -> Tensor:
    """Return d loss / d queries in the queries' dtype."""
    kind = metric_of(metric, p)
    with plain_arithmetic(queries.device):
        return pairwise_gradient(grad, queries, database, kind, workspace_bytes).to(queries.dtype)


pairwise_distance_backward_op.register_autograd(refuse_second_derivative)


@pairwise_distance_backward_op.register_fake
def _backward_fake(grad: Tensor, queries: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(queries, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    queries, database, metric, p, _implementation, workspace_bytes = inputs
    ctx.save_for_backward(queries, database)
    ctx.rest = (metric, p, workspace_bytes)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    queries, database = ctx.saved_tensors
    grad_queries = grad_database = None
    if ctx.needs_input_grad[0]:
        grad_queries = pairwise_distance_backward_op(grad, queries, database, *ctx.rest)
    if ctx.needs_input_grad[1]:
        grad_database = pairwise_distance_backward_op(grad.T, database, queries, *ctx.rest)
    return grad_queries, grad_database, None, None, None, None


pairwise_distance_op.register_autograd(_backward, setup_context=_setup_context)
