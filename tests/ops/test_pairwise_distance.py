import pytest
import torch
from adversarial import CASES, DTYPES, NAMES, hard_cases, hard_sets, oracle_scores, vectors

from elips_torch import pairwise_distance
from elips_torch.core.metric import resolve_metric
from elips_torch.reference.pairwise_distance import pairwise_distance as reference_distance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("metric", "p"), CASES, ids=NAMES)
def test_every_metric_and_dtype_equals_the_reference(metric, p, dtype):
    kind = resolve_metric(metric, p)
    for n, n_queries, dim in [(0, 2, 3), (1, 1, 3), (63, 3, 1), (127, 1, 33), (60, 1, 100), (5, 0, 2)]:
        q, x = vectors(kind, n_queries, dim, dtype=dtype), vectors(kind, n, dim, seed=1, dtype=dtype)
        scores = pairwise_distance(q, x, metric=metric, p=p)
        assert scores.dtype == torch.float32
        assert torch.equal(scores, reference_distance(q, x, metric, p))


@pytest.mark.parametrize(("metric", "p", "name"), hard_cases())
def test_hard_data(metric, p, name):
    kind = resolve_metric(metric, p)
    q, x = hard_sets(kind, 120, 6)[name]
    scores = pairwise_distance(q, x, metric=metric, p=p)
    expected = oracle_scores(kind, q, x)
    assert torch.equal(scores.isnan(), expected.isnan())
    assert torch.equal(scores.nan_to_num(), expected.nan_to_num())
    assert not scores[scores == 0].signbit().any()


@pytest.mark.parametrize(("metric", "p"), CASES, ids=NAMES)
def test_neither_tiles_nor_layout_matter(metric, p):
    kind = resolve_metric(metric, p)
    q, x = vectors(kind, 30, 33), vectors(kind, 500, 33, seed=1)
    expected = oracle_scores(kind, q, x)
    assert torch.equal(pairwise_distance(q, x, metric=metric, p=p, workspace_bytes=2**20), expected)
    transposed = pairwise_distance(q.T.contiguous().T, x.T.contiguous().T, metric=metric, p=p)
    assert torch.equal(transposed, expected)
    assert torch.equal(pairwise_distance(x, q, metric=metric, p=p), expected.T)
