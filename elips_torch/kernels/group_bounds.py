"""What follows the product in every kernel of the scan: bounds of scores, one maximum per group."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from elips_torch.kernels.triton_language import LOWEST


@triton.jit
def group_bounds(
    products,
    AXIS: tl.constexpr,
    queries,
    rows,
    mask_rows,
    groups,
    scales_ptr,
    biases_ptr,
    residuals_ptr,
    norms_ptr,
    q_bias_ptr,
    q_residual_ptr,
    q_norm_ptr,
    mask_ptr,
    mask_stride,
    PAIR_MASK: tl.constexpr,
    PER_GROUP: tl.constexpr,
):
    """Return the largest bound along an axis, whose length becomes 1.

    Queries, rows and groups are numbers that broadcast with the 3-D products; a mask is looked up by
    ``mask_rows``. What is the same for all rows of a group waits until one value is left of them.
    """
    RAW: tl.constexpr = PER_GROUP and biases_ptr is None
    LOW: tl.constexpr = -(2**31) if RAW and products.dtype == tl.int32 else LOWEST
    if RAW:
        bounds = products
    else:
        bounds = products.to(tl.float32)
        if scales_ptr is not None:
            bounds = bounds * tl.load(scales_ptr + (groups if PER_GROUP else rows))
        if biases_ptr is not None:
            biases = tl.load(biases_ptr + rows)
            if q_bias_ptr is not None:
                biases = biases * tl.load(q_bias_ptr + queries)
            bounds += biases
    if not PER_GROUP:
        if residuals_ptr is not None:
            bounds += tl.load(residuals_ptr + rows) * tl.load(q_residual_ptr + queries)
        if norms_ptr is not None:
            bounds += tl.load(norms_ptr + rows) * tl.load(q_norm_ptr + queries)
    if mask_ptr is not None:
        if PAIR_MASK:
            keep = tl.load(mask_ptr + queries.to(tl.int64) * mask_stride + mask_rows)
        else:
            keep = tl.load(mask_ptr + mask_rows)
        bounds = tl.where(keep != 0, bounds, LOW)
    maxima = tl.max(bounds, axis=AXIS, keep_dims=True)
    if PER_GROUP:
        bounds = maxima.to(tl.float32)
        if mask_ptr is not None:
            bounds = tl.where(maxima == LOW, 0.0, bounds)
        if RAW and scales_ptr is not None:
            bounds = bounds * tl.load(scales_ptr + groups)
        if residuals_ptr is not None:
            bounds += tl.load(residuals_ptr + groups) * tl.load(q_residual_ptr + queries)
        if norms_ptr is not None:
            bounds += tl.load(norms_ptr + groups) * tl.load(q_norm_ptr + queries)
        if mask_ptr is not None:
            bounds = tl.where(maxima == LOW, LOWEST, bounds)
        return bounds
    else:
        return maxima
