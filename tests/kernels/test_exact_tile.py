import pytest
import torch

from elips_torch import METRICS, knn, pairwise_distance
from elips_torch.kernels import exact_tile


@pytest.mark.parametrize("metric", [metric.name for metric in METRICS])
def test_small_problems_give_the_same_bits_by_a_shorter_way(metric, monkeypatch):
    torch.manual_seed(0)
    queries, database = torch.rand(3, 16), torch.rand(400, 16)
    database[100:200] = database[:100]
    p = 2.5 if metric == "lp" else None
    assert exact_tile.is_small(queries, database)
    short = knn(queries, database, 30, metric=metric, p=p)
    tile = pairwise_distance(queries, database, metric=metric, p=p)
    monkeypatch.setattr(exact_tile, "_FEW_FEATURES", 0)
    assert not exact_tile.is_small(queries, database)
    long = knn(queries, database, 30, metric=metric, p=p)
    assert torch.equal(short.scores, long.scores)
    assert torch.equal(short.ids, long.ids)
    assert torch.equal(tile, pairwise_distance(queries, database, metric=metric, p=p))
