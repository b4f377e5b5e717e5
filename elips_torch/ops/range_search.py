"""Search for all rows within a radius, both sides plain tensors."""

from typing import Any

import torch
from torch import Tensor

from elips_torch.core.dispatch import Implementation, Request, choose, float64_reasons
from elips_torch.core.execution import plain_arithmetic, refuse_second_derivative, runs_directly
from elips_torch.core.metric import Metric, metric_of, resolve_metric
from elips_torch.core.results import RangeResult
from elips_torch.core.tiling import DEFAULT_WORKSPACE_BYTES
from elips_torch.core.validation import (
    as_radius,
    bad_queries,
    check_exclude,
    check_mask,
    check_vectors,
    check_workspace,
)
from elips_torch.kernels.candidate_gradient import pair_gradient
from elips_torch.kernels.made_terms import few_queries_reasons
from elips_torch.kernels.range_search_eager import range_search_eager
from elips_torch.kernels.range_search_native import FindPlane, range_search_native
from elips_torch.kernels.search_native import library_reasons
from elips_torch.kernels.selection import Selection
from elips_torch.ops.knn import distance_reasons, uncompiled_reasons


def _native_reasons(request: Request) -> list[str]:
    return library_reasons(request.device) + distance_reasons(request)


def _native_unwise_reasons(request: Request) -> list[str]:
    return uncompiled_reasons(request) + few_queries_reasons(request)


IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation("native", range_search_native, _native_reasons, _native_unwise_reasons),
    Implementation("eager", range_search_eager, float64_reasons),
)


def range_search(
    queries: Tensor,  # (Q, D) or (D,)
    database: Tensor,  # (N, D)
    radius: float | Tensor,  # or (Q,)
    *,
    metric: str = "l2",
    p: float | None = None,
    mask: Tensor | None = None,  # (N,) or (Q, N)
    exclude: Tensor | None = None,  # (Q, M)
    implementation: str = "auto",
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> RangeResult:
    """Find all rows of a database within a radius of each query, exactly.

    Within means ``score < radius`` for distances and ``score > radius`` for "ip" and "cosine",
    compared in float32 with the radius rounded to float32.

    Args:
        queries: ``(Q, D)`` or ``(D,)``, float32, float16, bfloat16 or float64; finite.
        database: ``(N, D)`` of any of these dtypes, on the queries' device.
        radius: one number, or ``(Q,)``, in the unit of the scores ("l2" is squared).
        metric: name of the distance kind, see `elips_torch.METRICS`.
        p: exponent of metric "lp".
        mask: bool ``(N,)`` or ``(Q, N)``; True keeps the row.
        exclude: int64 ``(Q, M)`` row numbers to leave out; -1 is ignored.
        implementation: "auto", or a name that `explain` lists.
        workspace_bytes: limit on temporary memory beside the result and one copy of it, in bytes.
            Default 256 MiB.

    Returns:
        RangeResult: lims ``(Q + 1,)``, scores ``(M,)`` float32 and ids ``(M,)`` int64; the rows
        of query i lie between ``lims[i]`` and ``lims[i + 1]``, best first. Scores carry gradients.

    Raises:
        ElipsError: an argument of wrong type, shape, dtype, device or value.

    >>> import torch
    >>> database = torch.tensor([[0.0], [1.0], [5.0]])
    >>> lims, scores, ids = range_search(torch.tensor([[0.5], [9.0]]), database, 1.0)
    >>> lims.tolist(), ids.tolist()
    ([0, 2, 2], [0, 1])
    """
    kind = resolve_metric(metric, p)
    check_vectors("database", database)
    check_vectors(
        "queries",
        queries,
        dim=database.shape[1],
        owner="the database",
        device=database.device,
        allow_single=True,
    )
    check_workspace(workspace_bytes)
    queries = torch.atleast_2d(queries)
    check_mask(mask, queries.shape[0], database.shape[0], database.device)
    check_exclude(exclude, queries.shape[0], database.device)
    limits = as_radius(radius, queries.shape[0], queries.device)
    run = _range_search if runs_directly(queries, database) else range_search_op
    scores, ids, lims = run(
        queries, database, limits, mask, exclude, kind.name, kind.p, implementation, workspace_bytes
    )
    return RangeResult(lims, scores, ids)


def run_range_search(
    queries: Tensor,  # (Q, D)
    database: Tensor,  # (N, D)
    radius: Tensor,  # (Q,) float32
    metric: Metric,
    *,
    ranks: Tensor | None = None,
    selection: Selection = Selection(),
    implementation: str = "auto",
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    check_finite: bool = True,
    screen: str = "none",
    find_plane: FindPlane | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # (Q + 1,) int64, (M,) float32, (M,) int64
    """Choose an implementation and run it; the entry that indexes share with `range_search`.

    The arguments are those of `run_knn`, but for ``find_plane``, which returns codes of the database to
    screen with, of kind ``screen``, and is called where they are looked at. Returns lims, scores and row
    numbers; a query that holds NaN or infinity finds nothing on an accelerator and is an error on a CPU.
    """
    request = Request.of(queries, database, metric, screen=screen)
    chosen = choose("range_search", IMPLEMENTATIONS, request, implementation)
    with plain_arithmetic(queries.device):
        bad = bad_queries(queries, metric) if check_finite else None
        if bad is not None:
            # No score is beyond the best possible one.
            radius = radius.masked_fill(bad, -metric.worst)
        result: tuple[Tensor, Tensor, Tensor] = chosen.run(
            queries, database, radius, metric, ranks, selection, workspace_bytes, find_plane
        )
    return result


def _range_search(
    queries: Tensor,
    database: Tensor,
    radius: Tensor,
    mask: Tensor | None,
    exclude: Tensor | None,
    metric: str,
    p: float,
    implementation: str,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    lims, scores, rows = run_range_search(
        queries,
        database,
        radius,
        metric_of(metric, p),
        selection=Selection(mask, exclude),
        implementation=implementation,
        workspace_bytes=workspace_bytes,
    )
    return scores, rows, lims


range_search_op = torch.library.custom_op(
    "elips_torch::range_search", _range_search, mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)


@range_search_op.register_fake
def _fake(queries: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    found = torch.library.get_ctx().new_dynamic_size()
    return (
        queries.new_empty((found,), dtype=torch.float32),
        queries.new_empty((found,), dtype=torch.int64),
        queries.new_empty((queries.shape[0] + 1,), dtype=torch.int64),
    )


@torch.library.custom_op("elips_torch::range_search_backward", mutates_args=())
def range_search_backward_op(
    grad: Tensor,
    queries: Tensor,
    database: Tensor,
    ids: Tensor,
    lims: Tensor,
    metric: str,
    p: float,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:
    """Return d loss / d queries and d loss / d database."""
    kind = metric_of(metric, p)
    with plain_arithmetic(queries.device):
        return pair_gradient(grad, queries, database, ids, lims, kind, workspace_bytes)


range_search_backward_op.register_autograd(refuse_second_derivative)


@range_search_backward_op.register_fake
def _backward_fake(grad: Tensor, queries: Tensor, database: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return queries.new_empty(queries.shape), database.new_empty(database.shape)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    queries, database, _radius, _mask, _exclude, metric, p, _implementation, workspace_bytes = inputs
    _scores, ids, lims = output
    ctx.save_for_backward(queries, database, ids, lims)
    ctx.mark_non_differentiable(ids, lims)
    ctx.rest = (metric, p, workspace_bytes)


def _backward(ctx: Any, grad: Tensor, grad_ids: Any, grad_lims: Any) -> tuple[Any, ...]:
    grad_queries, grad_database = range_search_backward_op(grad, *ctx.saved_tensors, *ctx.rest)
    return grad_queries, grad_database, *(None,) * 7


range_search_op.register_autograd(_backward, setup_context=_setup_context)
