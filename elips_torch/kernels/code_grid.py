"""Rows that are stored as codes, on a grid of whole steps, so that int8 products screen them.

A row decodes to ``x = c + z + s * y``, feature by feature: c is the centroid of its list, z and s are the
same for all rows, and y is close to a vector u of int8, which a few instructions make of the row's code.
So

    q . x = q . (c + z) + (q * s) . y

where the first term belongs to a query and a list, and the second is screened as in `screen`: q * s is
coded, u is the row's code of scale 1, |y| its norm and |y - u| its residual. For "l2" queries and
centroids are first centred about a mean, and the similarity ``q . x - |x|**2 / 2`` has the bias
``-(c + z) . (s * y) - |s * y|**2 / 2``.

Every code of a feature of a scalar quantizer is a whole number of steps already: y is u but for rounding.
The centroids of a product quantizer are rounded to the grid, which takes a byte a feature of the codebooks.
"""

import torch
from torch import Tensor

from elips_torch.core.metric import Metric
from elips_torch.kernels.coded_rows import CodeGrid, PackedTable
from elips_torch.kernels.plane import UNIT

# The largest code on the grid that a centroid of a part gets, and how many codes there are.
_LARGEST, _CODES = 127.0, 256


def has_grid(metric: Metric, table: PackedTable) -> bool:
    """Whether rows of a table have a grid, unless values are not finite.

    They have none under "cosine", where what a list adds differs from row to row. Short floats are no whole
    steps of anything.
    """
    return metric.name in ("l2", "ip") and table.kind in ("scalars", "parts")


def make_grid(metric: Metric, table: PackedTable, centroids: Tensor | None) -> CodeGrid | None:
    """Return the grid of rows of a table about centroids ``(L, D)``; None where there is none.

    There is none where `has_grid` says so, where values are not finite, and where steps are below zero.
    """
    if not has_grid(metric, table):
        return None
    make = _part_grid if table.low is None else _scalar_grid
    steps, zero, codes, scalars, off = make(table)
    dim = zero.shape[0]
    mean = torch.zeros(dim, dtype=torch.float32, device=zero.device)
    if metric.name == "l2":
        mean = (zero if centroids is None else centroids.double().mean(0) + zero).float()
    # Decoding rounds a product and up to two sums, none of which is larger than this.
    largest = zero.abs() + (_CODES if table.low is None else 2**table.bits) * steps.double()
    if centroids is not None:
        largest += centroids.double().abs().amax(0)
    rounded = float(torch.linalg.vector_norm(4 * UNIT * largest / steps.double())) * (1 + 4 * UNIT)
    residual = off * (1 + 4 * UNIT) + rounded
    if not residual < torch.inf:
        return None
    features = None
    if table.low is None:
        middle = zero.view(table.table.shape[0], 1, -1)
        features = (table.table.double() - middle).float().transpose(1, 2).contiguous()
    return CodeGrid(steps, zero - mean.double(), mean, codes, scalars, residual, rounded, features)


def grid_bytes(table: PackedTable, dim: int) -> int:
    """Return the bytes of the tensors of a grid of D features, for a table that may be of no fit yet."""
    # Of a feature: s, z, the mean, and two bytes, or a byte and a float32 of every centroid.
    return dim * (16 + (5 * 2**table.bits if table.low is None else 2))


def _scalar_grid(table: PackedTable) -> tuple[Tensor, Tensor, None, Tensor, float]:
    assert table.low is not None
    steps, low = table.table.contiguous(), table.low.double()
    # Nothing that is learned has steps below zero; whoever has put them there gets no grid.
    off = torch.inf if bool((steps < 0).any()) else 0.0
    # The code in the middle is 0 on the grid. A feature that does not vary is the same whatever its code is.
    counts_and_zero = torch.tensor([[255], [2 ** (table.bits - 1)]], dtype=torch.int64, device=low.device)
    scalars = torch.where(steps > 0, counts_and_zero, 0)
    steps = _positive(steps)
    return steps, low + scalars[1] * steps.double(), None, scalars.to(torch.uint8), off


def _part_grid(table: PackedTable) -> tuple[Tensor, Tensor, Tensor, None, float]:
    centroids = table.table.double()  # (m, ksub, D / m)
    low, high = centroids.amin(1), centroids.amax(1)
    zero = (low + high) / 2
    steps = _positive(((high - low) / (2 * _LARGEST)).float())
    places = (centroids - zero[:, None]) / steps.double()[:, None]
    codes = places.round().clamp_(-_LARGEST, _LARGEST)
    # The furthest centroid of each part stands for all of them.
    off = torch.linalg.vector_norm(places - codes, dim=2).amax(1)
    return steps.flatten(), zero.flatten(), codes.to(torch.int8), None, float(torch.linalg.vector_norm(off))


def _positive(steps: Tensor) -> Tensor:
    """Return steps with those that are not above zero, which any number serves, as large as is usual."""
    usual = steps.sum() / (steps > 0).sum().clamp_min(1)
    return torch.where(steps > 0, steps, torch.where(usual > 0, usual, 1.0))
