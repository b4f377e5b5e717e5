import math

import faiss
import numpy as np
import pytest
import torch
from adversarial import CASES, DTYPES, NAMES, hard_sets, oracle_scores, vectors

from elips_torch import range_search
from elips_torch.core.metric import resolve_metric
from elips_torch.reference.range_search import range_search as reference_search

MIB = 2**20


def assert_same(found, expected):
    assert found.lims.dtype == found.ids.dtype == torch.int64
    assert found.scores.dtype == torch.float32
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)


def middle(kind, q, x):
    scores = oracle_scores(kind, q, x)
    return scores.median(1).values if x.shape[0] else torch.ones(len(q))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("metric", "p"), CASES, ids=NAMES)
def test_every_metric_and_dtype_equals_the_reference(metric, p, dtype):
    kind = resolve_metric(metric, p)
    for n, n_queries, dim in [(0, 2, 3), (1, 1, 3), (63, 2, 1), (127, 1, 33), (5, 0, 2)]:
        q, x = vectors(kind, n_queries, dim, dtype=dtype), vectors(kind, n, dim, seed=1, dtype=dtype)
        radius = middle(kind, q, x)
        assert_same(range_search(q, x, radius, metric=metric, p=p), reference_search(q, x, radius, metric, p))


@pytest.mark.parametrize("name", ["grid", "all equal", "near ties", "integers", "offset 1e6"])
@pytest.mark.parametrize("metric", ["l2", "ip", "cosine", "l1", "canberra"])
def test_ties_at_the_radius_are_outside(metric, name):
    kind = resolve_metric(metric)
    q, x = hard_sets(kind, 80, 3)[name]
    # The median is the score of a row, and of all that tie with it.
    radius = middle(kind, q, x)
    found = range_search(q, x, radius, metric=metric)
    assert_same(found, reference_search(q, x, radius, metric))
    limit = radius.repeat_interleave(found.lims.diff())
    assert bool((found.scores > limit if kind.higher_is_better else found.scores < limit).all())


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_masks_exclusions_and_small_workspaces(metric):
    kind = resolve_metric(metric)
    q, x = vectors(kind, 40, 8), (vectors(kind, 800, 8, seed=1) * 2).round() / 2
    generator = torch.Generator().manual_seed(0)
    exclude = torch.randint(-1, 800, (40, 30), generator=generator)
    mask = torch.rand(40, 800, generator=generator) < 0.5
    radius = middle(kind, q, x)
    for chosen in (None, mask[0], mask):
        found = range_search(q, x, radius, metric=metric, mask=chosen, exclude=exclude)
        small = {"mask": chosen, "exclude": exclude, "workspace_bytes": MIB}
        assert_same(range_search(q, x, radius, metric=metric, **small), found)
        part = None if chosen is None else chosen if chosen.ndim == 1 else chosen[:2]
        first = range_search(q[:2], x, radius[:2], metric=metric, mask=part, exclude=exclude[:2])
        assert_same(first, reference_search(q[:2], x, radius[:2], metric, mask=part, exclude=exclude[:2]))
        assert torch.equal(first.ids, found.ids[: found.lims[2]])


def test_the_radius_is_rounded_to_float32():
    score = float(np.float32(0.1) ** 2)
    database = torch.tensor([[0.1]])
    at = float(np.float32(score))
    assert range_search(torch.zeros(1, 1), database, at).ids.tolist() == []
    # Above the score in float64, equal to it in float32.
    assert range_search(torch.zeros(1, 1), database, at * (1 + 1e-12)).ids.tolist() == []
    above = float(np.nextafter(np.float32(score), np.float32(1.0)))
    assert range_search(torch.zeros(1, 1), database, above).ids.tolist() == [0]


def test_extreme_radii():
    q, x = torch.rand(2, 3), torch.rand(50, 3)
    assert range_search(q, x, math.inf).lims.tolist() == [0, 50, 100]
    assert range_search(q, x, -math.inf, metric="ip").lims.tolist() == [0, 50, 100]
    assert range_search(q, x, 0.0).lims.tolist() == [0, 0, 0]
    assert range_search(q, x, 1e39).lims.tolist() == [0, 50, 100]
    mixed = range_search(q, x, torch.tensor([math.inf, 0.0], dtype=torch.float64))
    assert mixed.lims.tolist() == [0, 50, 50]


def test_a_single_query():
    q, x = torch.rand(3), torch.rand(50, 3)
    assert_same(range_search(q, x, 0.4), range_search(q[None], x, 0.4))


@pytest.mark.parametrize(("metric", "kind"), [("l2", faiss.METRIC_L2), ("ip", faiss.METRIC_INNER_PRODUCT)])
def test_the_rows_are_those_of_faiss(metric, kind):
    generator = torch.Generator().manual_seed(0)
    # Integers, which faiss adds up without rounding.
    q = torch.randint(-5, 5, (9, 12), generator=generator).float()
    x = torch.randint(-5, 5, (400, 12), generator=generator).float()
    index = faiss.IndexFlat(12, kind)
    index.add(x.numpy())
    radius = float(middle(resolve_metric(metric), q, x).median())
    lims, scores, ids = index.range_search(q.numpy(), radius)
    found = range_search(q, x, radius, metric=metric)
    assert found.lims.tolist() == lims.tolist()
    for first, last in zip(lims[:-1].tolist(), lims[1:].tolist(), strict=True):
        ours = dict(zip(found.ids[first:last].tolist(), found.scores[first:last].tolist(), strict=True))
        assert ours == dict(zip(ids[first:last].tolist(), scores[first:last].tolist(), strict=True))
