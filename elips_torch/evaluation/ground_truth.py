"""The true nearest neighbours, computed in float64 apart from every kernel of the library."""

import torch
from torch import Tensor

from elips_torch.core.errors import ArgumentError, MetricError
from elips_torch.core.metric import Metric, resolve_metric
from elips_torch.core.ordering import order_keys
from elips_torch.core.tiling import spans
from elips_torch.core.validation import check_vectors

_QUERIES, _ROWS = 256, 16384
# Candidates beyond k, which leave room for ties.
_SPARE = 32
# The definition takes several float64 tensors of one number per feature and pair.
_PAIR_FEATURES = 2**23


def exact_neighbours(
    queries: Tensor,  # (Q, D)
    database: Tensor,  # (N, D)
    k: int,
    metric: str = "l2",
) -> Tensor:  # (Q, K) int64
    """Return the k nearest rows of each query by brute force in float64, best first.

    Float64 products find candidates, the metric's definition scores them, rounded once to float32,
    and ties go to the lower row. A query for which the products cannot rule out a further row is
    scored against every row by the definition.

    Args:
        queries: ``(Q, D)``, any floating dtype.
        database: ``(N, D)``, on the same device.
        k: number of neighbours, 1 to N.
        metric: "l2", "ip" or "cosine", or an alias.

    Returns:
        ``(Q, K)`` int64 row numbers.

    Raises:
        ElipsError: an argument of wrong type, shape or value.

    >>> import torch
    >>> database = torch.tensor([[0.0], [3.0], [1.0], [1.0]])
    >>> exact_neighbours(torch.tensor([[1.2]]), database, k=3)
    tensor([[2, 3, 0]])
    """
    kind = resolve_metric(metric)
    if kind.form != "product":
        raise MetricError(f"metric is {metric!r}, expected 'l2', 'ip' or 'cosine'")
    check_vectors("database", database)
    check_vectors("queries", queries, dim=database.shape[1], owner="the database", device=database.device)
    if not 1 <= k <= len(database):
        raise ArgumentError(f"k is {k}, expected 1 to {len(database)}, the number of rows")
    found = [
        _neighbours(queries[start:stop].double(), database, k, kind)
        for start, stop in spans(len(queries), _QUERIES)
    ]
    return torch.cat(found) if found else torch.empty(0, k, dtype=torch.int64, device=queries.device)


def _neighbours(queries: Tensor, database: Tensor, k: int, metric: Metric) -> Tensor:
    """Return ``(Q, K)`` rows for a few float64 queries."""
    n = len(database)
    count = min(k + _SPARE, n)
    costs, rows, scale = _candidates(queries, database, count, metric)
    keys = _keys(queries, database, rows, metric)
    best = keys.sort(dim=1).values[:, :k]
    result = best & 0xFFFFFFFF
    if count < n:
        # No row outside the candidates costs less than the last of them, up to the error of a product.
        error = 4.0 * (queries.shape[1] + 8) * torch.finfo(torch.float64).eps * scale
        limit = (costs[:, -1] - error).float()
        worst = _cost_of(best[:, -1])
        for i in (~(worst < limit)).nonzero().flatten().tolist():
            every = torch.arange(n, device=rows.device)[None]
            result[i] = (
                _keys(queries[i : i + 1], database, every, metric).sort(dim=1).values[0, :k] & 0xFFFFFFFF
            )
    return result


def _candidates(
    queries: Tensor, database: Tensor, count: int, metric: Metric
) -> tuple[Tensor, Tensor, Tensor]:
    """Return costs and rows ``(Q, C)``, ascending, and the size ``(Q,)`` of what the costs are made of."""
    norms = queries.norm(dim=1)
    costs = queries.new_empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    largest = queries.new_zeros(())
    for start, stop in spans(len(database), _ROWS):
        tile = database[start:stop].double()
        sizes = tile.norm(dim=1)
        largest = torch.maximum(largest, sizes.max())
        cost = queries @ tile.T
        if metric.name == "l2":
            cost = cost.mul_(-2.0).add_(sizes.square()).add_(norms.square()[:, None])
        elif metric.name == "cosine":
            products = norms[:, None] * sizes
            cost = torch.where(products == 0, 0.0, -cost / products)
        else:
            cost = cost.neg_()
        numbers = torch.arange(start, stop, device=rows.device).expand(len(queries), -1)
        costs, kept = torch.cat([costs, cost], 1).topk(
            min(count, costs.shape[1] + stop - start), largest=False
        )
        rows = torch.cat([rows, numbers], 1).gather(1, kept)
    if metric.name == "cosine":
        return costs, rows, torch.ones_like(norms)
    return costs, rows, (norms + largest).square()


def _keys(queries: Tensor, database: Tensor, rows: Tensor, metric: Metric) -> Tensor:
    """Return ``(Q, C)`` integers that sort as (score by definition, row)."""
    keys = torch.empty(len(queries), rows.shape[1], dtype=torch.int64, device=rows.device)
    step = max(1, _PAIR_FEATURES // (len(queries) * queries.shape[1]))
    for start, stop in spans(rows.shape[1], step):
        part = rows[:, start:stop]
        vectors = database[part].double()
        scores = metric.rounded_score(queries[:, None], vectors)
        keys[:, start:stop] = order_keys(scores, part, metric.higher_is_better)
    return keys


def _cost_of(keys: Tensor) -> Tensor:
    """Return the float32 cost (ascending, so negated where more is better) that a key holds."""
    ascending = (keys >> 32).to(torch.int32)
    return (ascending ^ ((ascending >> 31) & 0x7FFFFFFF)).view(torch.float32)
