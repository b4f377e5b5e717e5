"""The nearest row of each query, exactly, at hardly more than the cost of one float32 product.

A product gives approximate costs tile by tile; of each query only the two smallest are kept, found by
way of the minima of groups of rows. Where they lie further apart than the product may err, the smaller
one is the nearest row; the few other queries are decided by the definition. The answer is therefore
the same on every machine, with any number of threads and any split of the queries.
"""

import torch
from torch import Tensor

from elips_torch.core.metric import Metric
from elips_torch.core.ordering import EMPTY_KEY, order_keys, ranks_of_keys
from elips_torch.core.tiling import plan_tiles, spans
from elips_torch.kernels.approximate import error_bound
from elips_torch.kernels.definition import score_pairs
from elips_torch.kernels.plane import norm_slack

# Both costs may err; the rest covers the centring and the rounding of the definition to float32,
# which are at most a twelfth of a bound each.
_MARGIN = 4.0
# Bytes of a candidate pair: its two numbers, its score, its key and a bit of the mask.
_PAIR_BYTES = 48
# Costs computed at a time: on a CPU they stay in cache.
_LARGEST_WIDTH = 8192
_CELLS = 2**19
_ACCELERATOR_CELLS = 2**26


def nearest_rows(
    queries: Tensor,  # (Q, D) float32, float16 or bfloat16
    database: Tensor,  # (N, D) likewise, at least one row
    metric: Metric,  # "l2", "ip" or "cosine"
    workspace_bytes: int,
) -> Tensor:  # (Q,) int64
    """Return the best row of each query by the metric's definition, of equals the lowest."""
    n_queries, dim = queries.shape
    labels = torch.empty(n_queries, dtype=torch.int64, device=queries.device)
    limits = torch.empty(n_queries, dtype=torch.float64, device=queries.device)
    unsure = torch.empty(n_queries, dtype=torch.bool, device=queries.device)
    tables = _Tables(database, metric)
    width = min(len(tables.base), _LARGEST_WIDTH)
    cells = _CELLS if queries.device.type == "cpu" else _ACCELERATOR_CELLS
    affordable = workspace_bytes // 2 // (4 * width + 16 * dim + 64)
    for start, stop in spans(n_queries, max(1, min(cells // width, affordable))):
        part = slice(start, stop)
        labels[part], limits[part], unsure[part] = tables.select(queries[part], width)
    left = unsure.nonzero()[:, 0]
    if left.numel():
        labels[left] = tables.decide(queries[left], limits[left], workspace_bytes // 2)
    return labels


class _Tables:
    """What the products need of a database; the smaller a cost, the nearer the row."""

    def __init__(self, database: Tensor, metric: Metric) -> None:
        self.database = database
        self.metric = metric
        rows = database.float()
        self.shift: Tensor | None = None
        base: Tensor | float = 0.0
        if metric.name == "l2":
            # Close to the origin a product loses less.
            self.shift = rows.mean(0)
            rows = rows - self.shift
            base = rows.square().sum(1)
        elif metric.name == "cosine":
            # The norm of the query changes no order.
            wide = rows.double()
            norms = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
            rows = torch.where(norms == 0, 0.0, wide / norms).float()
        self.largest_norm = _norms(rows).max()
        n, dim = rows.shape
        # Groups of about the square root of the rows, so that neither their minima nor the members
        # of one are many; rows behind the end cost infinity.
        self.group = 1 << (min(n, _LARGEST_WIDTH).bit_length() - 1) // 2
        padded = -(-n // self.group) * self.group
        self.weights = rows.new_zeros(padded, dim)
        self.weights[:n] = rows.mul(-2.0 if metric.name == "l2" else -1.0)
        self.base = rows.new_full((padded,), torch.inf)
        self.base[:n] = base

    def costs(self, queries: Tensor, start: int, stop: int) -> Tensor:
        """Return approximate costs ``(Q, stop - start)`` of centred queries."""
        return torch.addmm(self.base[None, start:stop], queries, self.weights[start:stop].T)

    def centred(self, queries: Tensor) -> Tensor:
        """Return the queries as `costs` takes them."""
        return queries.float() if self.shift is None else queries.float() - self.shift

    def select(self, queries: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the nearest row by cost, limits, and whether it may be another, all ``(Q,)``.

        Rows whose cost is above the float64 limit of a query cannot be its nearest.
        """
        centred = self.centred(queries)
        best, second, nearest = self._smallest(centred, 0, width)
        for start in range(width, len(self.base), width):
            other, next_other, row = self._smallest(centred, start, start + width)
            # Strictly, so that of equals the lowest row stays.
            better = other < best
            second = torch.where(better, torch.minimum(best, next_other), torch.minimum(second, other))
            best = torch.where(better, other, best)
            nearest = torch.where(better, row, nearest)
        norms = _norms(centred)[:, None]
        bound = error_bound(
            self.metric, best[:, None], norms, self.largest_norm, queries.shape[1], torch.float32
        )[:, 0]
        if self.metric.name == "cosine":
            bound = bound * norms[:, 0]
        limit = best.double() + _MARGIN * bound
        # NaN, where nothing is known, compares False.
        return nearest, limit, ~(second > limit)

    def _smallest(self, centred: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the smallest and the second smallest cost of some rows, and the row of the smallest."""
        costs = self.costs(centred, start, stop).view(len(centred), self.group, -1)
        minima = costs.amin(1)
        best, column = minima.min(1, keepdim=True)
        members = costs.gather(2, column[:, None].expand(-1, self.group, 1))[:, :, 0]
        member = members.argmin(1, keepdim=True)
        elsewhere = minima.scatter_(1, column, torch.inf).amin(1)
        second = torch.minimum(elsewhere, members.scatter_(1, member, torch.inf).amin(1))
        nearest = start + member * minima.shape[1] + column
        return best[:, 0], second, nearest[:, 0]

    def decide(self, queries: Tensor, limit: Tensor, workspace_bytes: int) -> Tensor:
        """Return the nearest row ``(Q,)`` by the definition, among those within the limit."""
        tiles = plan_tiles(
            len(queries),
            len(self.database),
            workspace_bytes=workspace_bytes // 2,
            cell_bytes=_PAIR_BYTES,
            row_bytes=0,
            query_bytes=8 * queries.shape[1],
        )
        keys = torch.full((len(queries),), EMPTY_KEY, dtype=torch.int64, device=queries.device)
        for first, last in spans(len(queries), tiles.queries):
            part = queries[first:last]
            centred = self.centred(part)
            for start, stop in spans(len(self.database), tiles.rows):
                costs = self.costs(centred, start, stop)
                # Not another product: it may err otherwise by its shape, within the same bound.
                owner, row = (~(costs > limit[first:last, None])).nonzero().unbind(1)
                row = row + start
                scores = score_pairs(self.metric, part, self.database, owner, row, workspace_bytes // 2)
                found = order_keys(scores, row, self.metric.higher_is_better)
                keys[first:last].scatter_reduce_(0, owner, found, "amin")
        return ranks_of_keys(keys)


def _norms(vectors: Tensor) -> Tensor:
    """Return norms ``(N,)`` float64 that the true ones do not exceed."""
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=1)
    return norms.double() * (1.0 + norm_slack(vectors.shape[1]))
