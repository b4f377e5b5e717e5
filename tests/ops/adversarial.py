"""Data that is hard to search exactly, and an oracle that is fast enough for it."""

import pytest
import torch
from torch import Tensor

from elips_torch import METRICS
from elips_torch.core.metric import Metric, resolve_metric

# Every metric, "lp" with exponents below, at and above those that torch treats by themselves.
CASES = [(m.name, None) for m in METRICS if m.name != "lp"]
CASES += [("lp", 0.5), ("lp", 2.0), ("lp", 3.0)]
NAMES = [name if p is None else f"{name}{p:g}" for name, p in CASES]

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def vectors(kind: Metric, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return random vectors in the domain of a metric."""
    values = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return (values if kind.domain[0] == 0.0 else 2.0 * values - 1.0).to(dtype)


def oracle_scores(kind: Metric, queries: Tensor, database: Tensor) -> Tensor:
    """Return the definition of every pair, one query at a time."""
    wide = database.double().contiguous()
    rows = [kind.score(query, wide).float() + 0.0 for query in queries.double()]
    return torch.stack(rows) if rows else torch.empty(0, len(database))


def oracle_knn(
    kind: Metric, queries: Tensor, database: Tensor, k: int, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sort by (score, row): a stable sort of the definition's scores."""
    scores = oracle_scores(kind, queries, database)
    hidden = torch.zeros_like(scores, dtype=torch.bool) if keep is None else ~keep.expand_as(scores)
    # Sorting hidden rows behind the others takes a second stable sort.
    order = scores.argsort(dim=1, descending=kind.higher_is_better, stable=True)
    order = order.gather(1, hidden.gather(1, order).long().argsort(dim=1, stable=True))[:, :k]
    missing = hidden.gather(1, order)
    found = scores.gather(1, order).masked_fill(missing, kind.worst)
    order = order.masked_fill(missing, -1)
    short = k - order.shape[1]
    pad = torch.nn.functional.pad
    return pad(found, (0, short), value=kind.worst), pad(order, (0, short), value=-1)


def hard_sets(kind: Metric, n: int, dim: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return named (queries, database) pairs, float32 but for the one that says otherwise."""
    q, x = vectors(kind, 5, dim, seed=1), vectors(kind, n, dim, seed=2)
    steps = torch.arange(n)
    grid = (x * 2).round() / 2
    sets = {
        "random": (q, x),
        "grid": ((q * 2).round() / 2, grid),
        "duplicates": (q, x[steps % 7].contiguous()),
        "all equal": (q, x[:1].expand(n, dim)),
        "query repeated": (q, torch.cat([x[: n // 2], q[:1].expand(n - n // 2, dim)])),
        "near ties": (q, x[:1] * (1.0 + (steps[:, None] % 11 - 5) * 2.0**-23)),
        "tiny": (q * 1e-30, x * 1e-30),
        "denormal": (q * 1e-41, x * 1e-41),
        "zeros": (q * (torch.arange(5) > 1)[:, None], x * (steps % 3 > 0)[:, None]),
        "float64": (q.double(), x[steps % 9].double() * (1.0 + steps[:, None] * 1e-12)),
    }
    if kind.domain[1] > 1.0:
        sets["integers"] = ((q.abs() * 255).round(), (x.abs() * 255).round())
        sets["offset 1e4"] = (q + 1e4, x + 1e4)
        sets["offset 1e6"] = (q + 1e6, x + 1e6)
        sets["float64 offset"] = (q.double() + 1e6, x.double() + 1e6)
        sets["huge"] = (q * 3e38, x * 3e38)
        sets["one row 1e6"] = (q, torch.cat([x[:-1], x[-1:] * 1e6]))
        sets["one row 1e18"] = (q, torch.cat([x[:-1], x[-1:] * 1e18]))
        sets["norms of all sizes"] = (q, x * torch.logspace(-18, 18, n)[:, None])
        sets["float64 tiny"] = (q.double() * 1e-160, x.double() * 1e-160)
    return sets


def hard_cases() -> list:
    """Return pytest parameters (metric, p, name of a hard set), one per set that a metric may see."""
    return [
        pytest.param(metric, p, name, id=f"{label}-{name}")
        for (metric, p), label in zip(CASES, NAMES, strict=True)
        for name in hard_sets(resolve_metric(metric, p), 10, 3)
    ]
