"""Differentiable scores of candidates that a search has already found."""

from typing import Any

import torch
from torch import Tensor

from elips_torch.core.execution import plain_arithmetic, refuse_second_derivative
from elips_torch.core.metric import metric_of
from elips_torch.core.tiling import spans
from elips_torch.core.validation import rows_outside_domain
from elips_torch.kernels.candidate_gradient import candidate_gradient, queries_at_once


@torch.library.custom_op("elips_torch::candidate_scores", mutates_args=())
def candidate_scores_op(
    queries: Tensor,  # (Q, D)
    candidates: Tensor,  # (Q, K, D)
    ids: Tensor,  # (Q, K), -1 where there is no candidate
    metric: str,
    p: float,
    workspace_bytes: int,
) -> Tensor:  # (Q, K) float32
    """Return the definition of each pair, with gradients to the queries and the candidates.

    The candidates are saved as they are, so the database may change before the backward pass.
    """
    kind = metric_of(metric, p)
    scores = torch.empty(ids.shape, dtype=torch.float32, device=queries.device)
    step = queries_at_once(candidates.shape[1], candidates.shape[2], workspace_bytes)
    with plain_arithmetic(queries.device):
        for start, stop in spans(len(queries), step):
            q, x = queries[start:stop].double().contiguous(), candidates[start:stop].double().contiguous()
            scores[start:stop] = kind.rounded_score(q[:, None], x)
        scores.masked_fill_(ids < 0, kind.worst)
        # A query that could not be served on an accelerator has found nothing and scores NaN.
        unserved = (ids < 0).all(1) & rows_outside_domain(queries, kind)
        return scores.masked_fill_(unserved[:, None], torch.nan)


@candidate_scores_op.register_fake
def _fake(queries: Tensor, candidates: Tensor, ids: Tensor, *rest: Any) -> Tensor:
    return queries.new_empty(ids.shape, dtype=torch.float32)


@torch.library.custom_op("elips_torch::candidate_scores_backward", mutates_args=())
def candidate_scores_backward_op(
    grad: Tensor,
    queries: Tensor,
    candidates: Tensor,
    ids: Tensor,
    metric: str,
    p: float,
    workspace_bytes: int,
    for_candidates: bool,
) -> tuple[Tensor, Tensor]:
    """Return d loss / d queries and d loss / d candidates (empty unless asked for)."""
    kind = metric_of(metric, p)
    grad_queries = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
    shape = candidates.shape if for_candidates else (0,)
    grad_candidates = torch.empty(shape, dtype=candidates.dtype, device=queries.device)
    with plain_arithmetic(queries.device):
        weight = grad.masked_fill(ids < 0, 0.0)
        step = queries_at_once(candidates.shape[1], candidates.shape[2], workspace_bytes)
        for start, stop in spans(len(queries), step):
            part = slice(start, stop)
            slopes = candidate_gradient(weight[part], queries[part], candidates[part], kind, for_candidates)
            grad_queries[part] = slopes[0]
            if slopes[1] is not None:
                grad_candidates[part] = slopes[1]
    return grad_queries, grad_candidates


candidate_scores_backward_op.register_autograd(refuse_second_derivative)


@candidate_scores_backward_op.register_fake
def _backward_fake(grad: Tensor, queries: Tensor, candidates: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    for_candidates = rest[-1]
    return queries.new_empty(queries.shape), candidates.new_empty(
        candidates.shape if for_candidates else (0,)
    )


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    queries, candidates, ids, *ctx.rest = inputs
    ctx.save_for_backward(queries, candidates, ids)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    wanted = ctx.needs_input_grad[:2]
    grads = candidate_scores_backward_op(grad, *ctx.saved_tensors, *ctx.rest, wanted[1])
    return *(each if want else None for each, want in zip(grads, wanted, strict=True)), *(None,) * 4


candidate_scores_op.register_autograd(_backward, setup_context=_setup_context)
