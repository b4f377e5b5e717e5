"""The nearest row of each query, exactly, at hardly more than the cost of one float32 product.

A product gives approximate costs tile by tile; of each query only the two smallest are kept, found by
way of the minima of groups of rows. Where they lie further apart than the product may err, the smaller
one is the nearest row; the few other queries are decided by the definition. The answer is therefore
the same on every machine, with any number of threads and any split of the queries.
"""

import math

import torch
from torch import Tensor

from elips_torch.core.metric import Metric
from elips_torch.core.ordering import EMPTY_KEY, order_keys, ranks_of_keys
from elips_torch.core.tiling import plan_tiles, spans
from elips_torch.kernels.approximate import error_bound
from elips_torch.kernels.definition import score_pairs
from elips_torch.kernels.plane import norm_slack

# By how much an error may exceed the bound of its product: centring and the rounding of the definition to
# float32 add less than a sixth.
_MARGIN = 1.25
# Bytes of a candidate pair: its two numbers, its score, its key and a bit of the mask.
_PAIR_BYTES = 48
# Rows that say where the middle is.
_SAMPLE = 64
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
    """What the products need of a database; the smaller a cost, the nearer the row.

    A cost errs by no more than one part that depends on its row and one that depends on its query: for
    "l2", (|q| + |x|)**2 <= 2 |q|**2 + 2 |x|**2. The part of the row is taken off the cost, so that a row far
    away from all others, which errs much, puts no other in doubt.
    """

    def __init__(self, database: Tensor, metric: Metric) -> None:
        self.database = database
        self.metric = metric
        rows = database.float()
        self.shift: Tensor | None = None
        base: Tensor | float = 0.0
        if metric.name == "l2":
            # Close to the origin a product loses less. A mean would follow a row far away.
            some = rows[:: max(1, len(rows) // _SAMPLE)]
            # The median, which on CUDA torch refuses in deterministic mode.
            self.shift = some.sort(0).values[len(some) // 2]
            rows = rows - self.shift
            base = rows.square().sum(1)
        elif metric.name == "cosine":
            # The norm of the query changes no order.
            wide = rows.double()
            norms = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
            rows = torch.where(norms == 0, 0.0, wide / norms).float()
        norms = _norms(rows)
        self.largest_norm = norms.max()
        self.row_errors: Tensor | None = None
        if metric.name == "l2":
            self.row_errors = self.errors(norms.new_zeros(()), norms).float()
            base = base - self.row_errors
        n, dim = rows.shape
        # Groups of about the square root of the rows, so that neither their minima nor the members
        # of one are many; rows behind the end cost infinity.
        self.group = 1 << (min(n, _LARGEST_WIDTH).bit_length() - 1) // 2
        padded = -(-n // self.group) * self.group
        self.weights = rows.new_zeros(padded, dim)
        self.weights[:n] = rows.mul(-2.0 if metric.name == "l2" else -1.0)
        self.base = rows.new_full((padded,), torch.inf)
        self.base[:n] = base

    def errors(self, query_norms: Tensor, row_norms: Tensor) -> Tensor:
        """Bound the errors of costs, float64; for "l2" their parts, where one of the norms is zero."""
        dim = self.database.shape[1]
        bound = error_bound(self.metric, row_norms, query_norms, row_norms, dim, torch.float32)
        if self.metric.name == "l2":
            bound = 2.0 * bound
        elif self.metric.name == "cosine":
            # Costs are of queries as they are, not of length 1.
            bound = bound * query_norms
        return _MARGIN * bound

    def costs(self, queries: Tensor, start: int, stop: int) -> Tensor:
        """Return approximate costs ``(stop - start, Q)`` of centred queries, less the errors of rows."""
        return torch.addmm(self.base[start:stop, None], self.weights[start:stop], queries.T)

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
        norms = _norms(centred)
        if self.row_errors is None:
            errors = self.errors(norms, self.largest_norm)
        else:
            errors = self.errors(norms, norms.new_zeros(())) + self.row_errors[nearest]
        # The cost of another may be too large, and this one too small.
        limit = best.double() + 2.0 * errors
        # NaN, where nothing is known, compares False.
        return nearest, limit, ~(second > limit)

    def _smallest(self, centred: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the smallest and the second smallest cost of some rows, and the row of the smallest."""
        # Minima over the first axis run along the queries, which lie side by side.
        costs = self.costs(centred, start, stop).view(-1, self.group, len(centred))
        minima = costs.amin(1)
        best, group = minima.min(0, keepdim=True)
        members = costs.gather(0, group[:, None].expand(-1, self.group, -1))[0]
        # The same as `argmin`, and several times faster.
        member = members.min(0, keepdim=True).indices
        elsewhere = minima.scatter_(0, group, torch.inf).amin(0)
        second = torch.minimum(elsewhere, members.scatter_(0, member, torch.inf).amin(0))
        nearest = start + group * self.group + member
        return best[0], second, nearest[0]

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
                # This product may round otherwise than the one before, within the same bound.
                row, owner = (~(costs > limit[None, first:last])).nonzero().unbind(1)
                row = row + start
                scores = score_pairs(self.metric, part, self.database, owner, row, workspace_bytes // 2)
                found = order_keys(scores, row, self.metric.higher_is_better)
                keys[first:last].scatter_reduce_(0, owner, found, "amin")
        return ranks_of_keys(keys)


def _norms(vectors: Tensor) -> Tensor:
    """Return norms ``(N,)`` float64 that the true ones do not exceed."""
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=1)
    dim = vectors.shape[1]
    # Squares below the normal numbers may be lost.
    return norms.double() * (1.0 + norm_slack(dim)) + math.sqrt(dim) * 2.0**-63
