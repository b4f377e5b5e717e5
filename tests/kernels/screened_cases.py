"""Data that is hard to screen, and the answers of the reference."""

import torch
from hypothesis import strategies as st

from elips_torch.core.metric import resolve_metric

METRICS = ["l2", "ip", "cosine"]
WORKSPACE = 64 * 2**20


def assert_reference(metric, found, queries, database, k, ids=None, mask=None, exclude=None, p=None):
    """Compare with the definition's scores sorted by (score, id), as the reference does pair by pair."""
    scores, rows = found
    kind, n_rows = resolve_metric(metric, p), database.shape[0]
    exact = kind.rounded_score(queries[:, None].double(), database[None].double().contiguous())
    hidden = torch.zeros(exact.shape, dtype=torch.bool)
    if mask is not None:
        hidden |= ~mask
    if exclude is not None:
        spare = torch.zeros(len(queries), n_rows + 1, dtype=torch.bool)
        hidden |= spare.scatter_(1, exclude.where(exclude >= 0, n_rows), True)[:, :n_rows]
    order = (torch.arange(n_rows) if ids is None else ids).argsort().expand_as(exact)
    keys = exact.gather(1, order)
    order = order.gather(1, keys.argsort(dim=1, descending=kind.higher_is_better, stable=True))
    order = order.gather(1, hidden.gather(1, order).long().argsort(dim=1, stable=True))[:, :k]
    missing = hidden.gather(1, order)
    assert rows.shape == (len(queries), k)
    assert bool((rows[:, n_rows:] == -1).all())
    assert bool((scores[:, n_rows:] == kind.worst).all())
    assert torch.equal(scores[:, :n_rows], exact.gather(1, order).masked_fill(missing, kind.worst))
    assert torch.equal(rows[:, :n_rows], order.masked_fill(missing, -1))


def make(name, q, x, generator):
    n, dim = x.shape
    steps = torch.arange(n)[:, None]
    direction = torch.randn(1, dim, generator=generator)
    if name == "near ties":
        return q, x[:1] + direction * steps * 2.0**-22
    if name == "ties by the last bit":
        return q, x[:1].expand(n, dim).clone().view(torch.int32).add((steps % 5).int()).view(torch.float32)
    if name == "sphere":
        # All rows are equally far from the first query, but for rounding.
        return q, q[:1] + 3.0 * x / torch.linalg.vector_norm(x, dim=1, keepdim=True)
    if name == "duplicates":
        return q, x[steps[:, 0] % 37]
    if name == "all equal":
        return q, x[:1].expand(n, dim).clone()
    if name == "offset":
        return q + 1e4, x + 1e4
    if name == "far offset":
        return q + 1e7, x * 8 + 1e7
    if name == "sizes":
        logs = torch.rand(n, 1, generator=generator) * 9 - 3
        return q * 10 ** (torch.rand(len(q), 1, generator=generator) * 9 - 3), x * 10**logs
    if name == "integers":
        return (q * 30).round().clamp(-127, 127), (x * 30).round().clamp(-128, 127)
    if name == "bytes":
        return (q * 40 + 128).round().clamp(0, 255), (x * 40 + 128).round().clamp(0, 255)
    if name == "few integers":
        return q.sign(), x.sign()
    if name == "integers, others asked":
        return q * 30, (x * 30).round().clamp(-128, 127)
    if name == "zero rows":
        return q * (torch.arange(len(q)) > 0)[:, None], x * (steps % 3 > 0)
    if name == "all zero":
        return q, x * 0.0
    if name == "tiny rows":
        # A row's direction does not depend on its length.
        return q + 1, (x + 1) * torch.where(steps % 7 == 0, 2.0**-76, 1.0)
    if name == "tiny rows, large queries":
        return q * 2.0**50, (1 + x * 2.0**-8) * 2.0**-77
    if name == "one large feature":
        return q, x * torch.where(torch.arange(dim) == 3, 1e5, 1.0)
    if name == "one large row":
        return q, torch.where(steps == 5, x * 1e6, x)
    if name == "float16":
        return q.half(), x.half()
    if name == "bfloat16":
        return q, x.bfloat16()
    assert name == "own rows"
    return x[: len(q)] * (1 + 2.0**-23), x


NAMES = [
    *("near ties", "ties by the last bit", "sphere", "duplicates", "all equal", "offset", "far offset"),
    *("sizes", "integers", "bytes", "few integers", "integers, others asked", "zero rows", "all zero"),
    *("tiny rows", "tiny rows, large queries", "one large feature", "one large row", "float16"),
    *("bfloat16", "own rows"),
]


def drawn_case(name, data):
    """Return queries, database, k, ids in any order or None, mask and exclusions, drawn by hypothesis."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16), "seed"))
    k = data.draw(st.sampled_from([1, 2, 5]))
    n = 64 * (k + 3) + data.draw(st.integers(0, 260))
    dim, n_queries = data.draw(st.sampled_from([2, 3, 16, 33])), data.draw(st.integers(1, 9))
    q, x = torch.randn(n_queries, dim, generator=generator), torch.randn(n, dim, generator=generator)
    q, x = make(name, q, x, generator)
    # Ids in any order decide ties; rows are left out by masks and by number.
    ids = torch.randperm(n, generator=generator) * 3 if data.draw(st.booleans(), "ids") else None
    shape = data.draw(st.sampled_from([None, (n,), (n_queries, n)]), "mask")
    mask = (
        None
        if shape is None
        else torch.rand(shape, generator=generator) < data.draw(st.sampled_from([0.9, 0.3]))
    )
    m = data.draw(st.sampled_from([0, 1, 3]), "exclude")
    exclude = torch.randint(-1, n, (n_queries, m), generator=generator) if m else None
    return q, x, k, ids, mask, exclude


def misleading(metric):
    """Return data whose codes order the rows wrongly."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 32, generator=generator)
    q = torch.randn(20, 32, generator=generator)
    # One feature takes the whole range of a code; the others decide.
    x[:, 0], q[:, 0] = 300.0, 0.0
    x[::2, 0] = -300.0
    if metric == "l2":
        x[:, 0] = x[:, 0].abs()
        x[0, 0] = -1e4
        q[:, 0] = 300.0
    return q, x


def clustered(n, dim, n_queries, generator):
    centres = torch.randn(200, dim, generator=generator)
    owners = torch.randint(0, 200, (n + n_queries,), generator=generator)
    points = centres[owners] + 0.7 * torch.randn(n + n_queries, dim, generator=generator)
    points = torch.nn.functional.normalize(points)
    return points[:n_queries], points[n_queries:]


def hard(name):
    generator = torch.Generator().manual_seed(0)
    if name == "noise":
        return torch.randn(20, 4096, generator=generator), torch.randn(3000, 4096, generator=generator)
    q, x = torch.randn(20, 32, generator=generator), torch.randn(20_000, 32, generator=generator)
    if name == "duplicates":
        return q, x[:1].expand(20_000, 32).contiguous()
    x[777] *= 1e6
    return q, x
