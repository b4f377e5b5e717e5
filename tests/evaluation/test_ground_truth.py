import pytest
import torch

from elips_torch import ArgumentError, MetricError, ShapeError
from elips_torch.evaluation import ground_truth
from elips_torch.evaluation.ground_truth import exact_neighbours
from elips_torch.reference.knn import knn as reference_knn

METRICS = ("l2", "ip", "cosine")


def wanted(queries, database, k, metric):
    return reference_knn(queries, database, k, metric).ids


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 10, 90])
@pytest.mark.parametrize("tile", [1, 7, 4096])
def test_it_equals_the_reference(monkeypatch, metric, k, tile):
    monkeypatch.setattr(ground_truth, "_ROWS", tile)
    monkeypatch.setattr(ground_truth, "_QUERIES", 3)
    generator = torch.Generator().manual_seed(k)
    queries, database = torch.randn(8, 5, generator=generator), torch.randn(90, 5, generator=generator)
    assert torch.equal(exact_neighbours(queries, database, k, metric), wanted(queries, database, k, metric))


@pytest.mark.parametrize("metric", METRICS)
def test_more_ties_than_candidates_go_to_the_lower_row(metric):
    database = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).repeat(60, 1)
    queries = database[:3] + 0.01
    found = exact_neighbours(queries, database, 70, metric)
    assert torch.equal(found, wanted(queries, database, 70, metric))


@pytest.mark.parametrize("metric", METRICS)
def test_differences_below_float32_are_ties(metric):
    # All scores round to few float32 numbers, while their float64 values differ.
    generator = torch.Generator().manual_seed(0)
    database = (1.0 + 1e-9 * torch.randn(200, 3, generator=generator, dtype=torch.float64)).flip(0)
    queries = torch.ones(2, 3, dtype=torch.float64) * 5.0
    found = exact_neighbours(queries, database, 20, metric)
    assert torch.equal(found, wanted(queries, database, 20, metric))


@pytest.mark.parametrize("metric", METRICS)
def test_zero_vectors(metric):
    database = torch.zeros(50, 3)
    database[7] = 1.0
    queries = torch.stack([torch.zeros(3), torch.ones(3), -torch.ones(3)])
    assert torch.equal(exact_neighbours(queries, database, 9, metric), wanted(queries, database, 9, metric))


def test_a_far_cluster_does_not_blur_a_near_one():
    # The products are far larger than the differences that decide.
    generator = torch.Generator().manual_seed(0)
    database = 1e4 + torch.randn(300, 8, generator=generator)
    queries = 1e4 + torch.randn(5, 8, generator=generator)
    assert torch.equal(exact_neighbours(queries, database, 10), wanted(queries, database, 10, "l2"))


def test_no_queries():
    assert exact_neighbours(torch.zeros(0, 3), torch.zeros(4, 3), 2).shape == (0, 2)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"metric": "l1"}, MetricError),
        ({"k": 5}, ArgumentError),
        ({"queries": torch.zeros(1, 2)}, ShapeError),
    ],
)
def test_what_does_not_fit_is_refused(change, error):
    arguments = {"queries": torch.zeros(1, 3), "database": torch.zeros(4, 3), "k": 2, "metric": "ip"} | change
    with pytest.raises(error):
        exact_neighbours(**arguments)
