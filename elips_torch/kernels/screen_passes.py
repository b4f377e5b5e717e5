"""The steps of a screened search that touch many numbers, each as it is and compiled.

Every step fuses what would otherwise be several passes over memory: compiled, it reads its input
once. As they are, the same functions run on every device.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from elips_torch.core.compilation import Compiled
from elips_torch.kernels.plane import BIAS, SCALE

# Bound of a place where there is no row.
NO_ROW = -3.0e38
# Part of every error: what may have underflowed.
FLOOR = 2.0**-100


def _bounds(products: Tensor, row_terms: Tensor, query_terms: tuple[Tensor, ...], slack: Tensor) -> Any:
    """Return similarities and the bounds of their errors; see `screen`."""
    scale, residual, norm, bias = row_terms.unbind(-1)
    query_scale, residual_factor, norm_factor = query_terms
    similarities = (products * scale) * query_scale + bias
    errors = residual * residual_factor + norm * norm_factor + (norm * norm * slack + FLOOR)
    return similarities, errors


def _group_bounds(
    products: Tensor,  # (L, C, R, Q) int32 or float32: C small groups of R rows make a large one
    row_terms: Tensor,  # (L, C, R, 1, 4) of the plane
    widths: Tensor,  # (L, C, R, 1) from `screen.group_terms`
    query_terms: Tensor,  # (2, Q) from there
    fine: Tensor,  # (L, C, Q) out: the largest upper bound of a small group
    coarse: Tensor,  # (2, L, Q) out: the largest upper and the largest lower bound of a large group
) -> None:
    scale, bias = row_terms[..., SCALE], row_terms[..., BIAS]
    similarities = (products * scale) * query_terms[0] + bias
    errors = widths * query_terms[1] + FLOOR
    # Two maxima over the same axis are one loop; over different axes they would read everything twice.
    upper = (similarities + errors).amax(2)
    lower = (similarities - errors).amax(2)
    fine.copy_(upper)
    coarse[0].copy_(upper.amax(1))
    coarse[1].copy_(lower.amax(1))


def _masked_group_bounds(
    products: Tensor,
    hidden: Tensor,  # (L, C, R, Q) bool, True where a query does not see a row
    row_terms: Tensor,
    widths: Tensor,
    query_terms: Tensor,
    fine: Tensor,
    coarse: Tensor,
) -> None:
    scale, bias = row_terms[..., SCALE], row_terms[..., BIAS]
    similarities = (products * scale) * query_terms[0] + bias
    errors = widths * query_terms[1] + FLOOR
    upper = torch.where(hidden, NO_ROW, similarities + errors).amax(2)
    lower = torch.where(hidden, NO_ROW, similarities - errors).amax(2)
    fine.copy_(upper)
    coarse[0].copy_(upper.amax(1))
    coarse[1].copy_(lower.amax(1))


def _row_bounds(
    codes: Tensor,  # (N, D)
    row_terms: Tensor,  # (N, 4)
    query: Tensor,  # (D,) float32
    query_terms: Tensor,  # (3,)
    slack: Tensor,  # ()
    upper: Tensor,  # (N,) out
    lower: Tensor,  # (N,) out
) -> None:
    products = (codes.float() * query).sum(1)
    similarities, errors = _bounds(products, row_terms, query_terms.unbind(0), slack)
    upper.copy_(similarities + errors)
    lower.copy_(similarities - errors)


def _pair_bounds(
    codes: Tensor,  # (N, D)
    row_terms: Tensor,  # (N, 4)
    query_codes: Tensor,  # (Q, D) float32
    query_terms: Tensor,  # (3, Q)
    slack: Tensor,  # ()
    owners: Tensor,  # (P,) int64, queries
    rows: Tensor,  # (P, R) int64
) -> Tensor:  # (P, R) upper bounds
    products = (codes[rows].float() * query_codes[owners][:, None]).sum(-1)
    of_owners = query_terms[:, owners][..., None].unbind(0)
    similarities, errors = _bounds(products, row_terms[rows], of_owners, slack)
    bounds: Tensor = similarities + errors
    return bounds


def _ip_pairs(queries: Tensor, database: Tensor, query_rows: Tensor, rows: Tensor) -> Tensor:
    return (queries[query_rows].double() * database[rows].double()).sum(-1)


def _l2_pairs(queries: Tensor, database: Tensor, query_rows: Tensor, rows: Tensor) -> Tensor:
    return (queries[query_rows].double() - database[rows].double()).square().sum(-1)


def _cosine_pairs(
    queries: Tensor, database: Tensor, query_rows: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    vectors = database[rows].double()
    return (queries[query_rows].double() * vectors).sum(-1), vectors.square().sum(-1)


@dataclasses.dataclass(frozen=True)
class Passes:
    """One way to run the steps.

    Attributes:
        group_bounds: bounds of groups of rows from products of codes; see `_group_bounds`.
        masked_group_bounds: the same where each query sees rows of its own.
        row_bounds: bounds of every row for one query; see `_row_bounds`.
        pair_bounds: upper bounds of chosen rows; see `_pair_bounds`.
        ip_pairs: float64 inner products of chosen pairs ``(P,)``.
        l2_pairs: float64 squared distances of chosen pairs ``(P,)``.
        cosine_pairs: float64 inner products of chosen pairs and squared norms of their rows ``(P,)``.
        is_compiled: nothing in between is kept in memory.
    """

    group_bounds: Callable[..., None]
    masked_group_bounds: Callable[..., None]
    row_bounds: Callable[..., None]
    pair_bounds: Callable[..., Tensor]
    ip_pairs: Callable[..., Tensor]
    l2_pairs: Callable[..., Tensor]
    cosine_pairs: Callable[..., tuple[Tensor, Tensor]]
    is_compiled: bool


EAGER = Passes(
    _group_bounds,
    _masked_group_bounds,
    _row_bounds,
    _pair_bounds,
    _ip_pairs,
    _l2_pairs,
    _cosine_pairs,
    is_compiled=False,
)
COMPILED = Passes(
    Compiled(_group_bounds),
    Compiled(_masked_group_bounds),
    Compiled(_row_bounds),
    Compiled(_pair_bounds),
    Compiled(_ip_pairs),
    Compiled(_l2_pairs),
    Compiled(_cosine_pairs),
    is_compiled=True,
)
