"""Indexes whose searches are prepared, and what these must agree with."""

import torch

from elips_torch import FlatIndex, IVFFlatIndex, IVFPQIndex, IVFSQIndex, PQIndex, SQIndex
from elips_torch.indexes.coded import CodedIndex

DIM = 24
# Numbers of lists to read; no test asks for so many neighbours.
AMONG_CENTROIDS = (3, 6)


def vectors(n=1500, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(30, DIM, generator=torch.Generator().manual_seed(99))
    chosen = torch.randint(0, 30, (n,), generator=generator)
    return (means[chosen] + 0.4 * torch.randn(n, DIM, generator=generator)).to(dtype)


FAMILIES = {
    "flat": lambda metric: FlatIndex(DIM, metric),
    "flat bf16": lambda metric: FlatIndex(DIM, metric, dtype=torch.bfloat16),
    "lists": lambda metric: IVFFlatIndex(DIM, 12, metric, nprobe=3, niter=4),
    "scalars": lambda metric: IVFSQIndex(DIM, 12, metric=metric, nprobe=3, niter=4),
    "products": lambda metric: IVFPQIndex(DIM, 12, 6, nbits=4, metric=metric, nprobe=3, niter=4),
    "plain scalars": lambda metric: SQIndex(DIM, "int8", metric),
    "plain products": lambda metric: PQIndex(DIM, 6, metric=metric, niter=4, min_points_per_centroid=1),
}


def made(family="lists", metric="l2", n=1500):
    index = FAMILIES[family](metric)
    rows = vectors(n)
    index.fit(rows)
    index.add(rows)
    # The code is compiled at the first large search, or here.
    index.search(rows[:2], 3, implementation="native")
    return index


def agrees(index, queries, k=5, **parameters):
    """Search as users do and by code that prepares nothing; return the ids."""
    scores, ids = index.search(queries, k, **parameters)
    unprepared = "decoded" if isinstance(index, CodedIndex) else "eager"
    wanted = index.search(queries, k, implementation=unprepared, **parameters)
    torch.testing.assert_close(scores, wanted.scores, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(ids, wanted.ids)
    return ids
