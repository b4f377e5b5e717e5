"""Linear maps with gradients to the vectors."""

from typing import Any

import torch
from torch import Tensor

from elips_torch.core.execution import plain_arithmetic, runs_directly
from elips_torch.kernels.linear_map import linear_map


def apply_linear_map(
    vectors: Tensor,  # (N, I)
    matrix: Tensor,  # (O, I)
    before: Tensor | None = None,  # (I,)
    after: Tensor | None = None,  # (O,)
) -> Tensor:  # (N, O) float32
    """Return ``(vectors - before) @ matrix.T + after``, accumulated in float64 and rounded once.

    A row of the result depends on its vector alone. Gradients flow to the vectors. The arguments are not
    checked.
    """
    run = _linear_map if runs_directly(vectors) else linear_map_op
    mapped: Tensor = run(vectors, matrix, before, after)
    return mapped


def _linear_map(vectors: Tensor, matrix: Tensor, before: Tensor | None, after: Tensor | None) -> Tensor:
    with plain_arithmetic(vectors.device):
        return linear_map(vectors, matrix, before, after)


linear_map_op = torch.library.custom_op("elips_torch::linear_map", _linear_map, mutates_args=())


@linear_map_op.register_fake
def _fake(vectors: Tensor, matrix: Tensor, *rest: Any) -> Tensor:
    return vectors.new_empty((vectors.shape[0], matrix.shape[0]), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    vectors, matrix, _, _ = inputs
    ctx.dtype = vectors.dtype
    ctx.save_for_backward(matrix)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (matrix,) = ctx.saved_tensors
    # The transposed map, which has gradients of its own.
    return apply_linear_map(grad, matrix.T).to(ctx.dtype), None, None, None


linear_map_op.register_autograd(_backward, setup_context=_setup_context)
