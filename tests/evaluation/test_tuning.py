import itertools

import pytest
import torch

from elips_torch import FaissIndex, FlatIndex, IVFFlatIndex, IVFPQIndex, RefineIndex, index_factory
from elips_torch.core.errors import ArgumentError, DtypeError, ElipsError, ParameterError
from elips_torch.evaluation import TuningCurve, TuningPoint, index_recall, tune, tuning

D, NLIST = 8, 20


def normal(n, seed=0):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


VECTORS, QUERIES = normal(1000), normal(50, seed=1)


@pytest.fixture(autouse=True)
def few_repeats(monkeypatch):
    monkeypatch.setattr(tuning, "_ENOUGH_SECONDS", 0.0)


def filled(index):
    index.fit(VECTORS)
    index.add(VECTORS)
    return index


@pytest.fixture
def lists():
    return filled(IVFFlatIndex(D, nlist=NLIST, nprobe=3))


@pytest.mark.parametrize("target", [0.3, 0.8, 0.95, 1.0])
def test_the_least_nprobe_that_reaches_the_target_is_set(lists, target):
    recalls = [index_recall(lists, QUERIES, 10, nprobe=nprobe) for nprobe in range(1, NLIST + 1)]
    least = next(i for i, recall in enumerate(recalls) if recall >= target) + 1
    curve = tune(lists, QUERIES, target)
    assert lists.nprobe == least
    assert curve.best.parameters == {"nprobe": least}
    assert curve.best.recall == recalls[least - 1]
    # Every point says what a search of one's own would.
    for point in curve.points:
        assert point.recall == recalls[point.parameters["nprobe"] - 1]
        assert point.queries_per_second > 0
    assert [point.recall for point in curve.points] == sorted(point.recall for point in curve.points)
    assert (curve.k, curve.n_queries, curve.target_recall) == (10, 50, target)


@pytest.mark.parametrize(
    ("description", "name", "most"), [("HNSW8", "efSearch", 4096), ("IVF20,SQ8", "nprobe", 20)]
)
def test_indexes_of_faiss_are_tuned(description, name, most):
    index = filled(FaissIndex.from_factory(D, description))
    curve = tune(index, QUERIES, 0.8)
    assert getattr(index, name) == curve.best.parameters[name]
    assert index_recall(index, QUERIES, 10) == curve.best.recall >= 0.8
    assert max(point.parameters[name] for point in curve.points) <= most


def test_what_is_tried_follows_from_recall_alone(lists):
    tried = [[point.parameters for point in tune(lists, QUERIES, 0.9).points] for _ in range(2)]
    assert sorted(map(str, tried[0])) == sorted(map(str, tried[1]))


def test_the_curve_goes_on_to_recall_one(lists):
    curve = tune(lists, QUERIES, 0.3)
    assert curve.highest.recall == 1.0
    assert len(curve.points) >= 5


def test_nprobe_and_k_factor_together_and_through_the_wrapper():
    index = filled(RefineIndex(IVFPQIndex(D, NLIST, m=2, nbits=4, nprobe=1), k_factor=1))
    curve = tune(index, QUERIES, 0.9)
    assert set(curve.best.parameters) == {"nprobe", "k_factor"}
    assert index.index.nprobe == index.nprobe == curve.best.parameters["nprobe"]
    assert index.k_factor == curve.best.parameters["k_factor"]
    assert index_recall(index, QUERIES, 10) == curve.best.recall >= 0.9
    reaching = [point for point in curve.points if point.recall >= 0.9]
    assert curve.best in reaching
    # Of each k_factor the least nprobe competes by speed.
    least = {}
    for point in sorted(reaching, key=lambda point: point.parameters["nprobe"]):
        least.setdefault(point.parameters["k_factor"], point)
    assert curve.best is max(least.values(), key=lambda point: point.queries_per_second)


def test_the_lists_inside_a_transform_bound_nprobe():
    index = filled(index_factory(D, f"PCA6,IVF{NLIST},Flat"))
    tuned = tune(index, QUERIES, 0.9)
    assert max(point.parameters["nprobe"] for point in tuned.points) <= NLIST
    assert index.nprobe == tuned.best.parameters["nprobe"]


def test_tuned_values_are_in_the_state_dict(lists):
    tune(lists, QUERIES, 0.9)
    other = IVFFlatIndex(D, nlist=NLIST, nprobe=1)
    other.load_state_dict(lists.state_dict())
    assert other.nprobe == lists.nprobe != 1


def test_an_index_without_parameters_gives_one_point():
    index = FlatIndex(D)
    index.add(VECTORS)
    curve = tune(index, QUERIES)
    assert [point.parameters for point in curve.points] == [{}]
    assert curve.best.recall == 1.0
    assert "the index as it is reaches recall@10 1.0000" in repr(curve)


def test_a_target_out_of_reach_leaves_the_index_and_is_warned_of():
    index = filled(IVFPQIndex(D, NLIST, m=2, nbits=4, nprobe=3))
    with pytest.warns(UserWarning, match="recall@10 0.99 is out of reach: the highest is 0") as caught:
        curve = tune(index, QUERIES, 0.99, database=VECTORS)
    # The warning stands where tune was called.
    assert caught[0].filename == __file__
    assert curve.best is None
    assert index.nprobe == 3
    assert curve.highest.recall == max(point.recall for point in curve.points) < 0.99
    assert "out of reach" in repr(curve)
    assert "<- best" not in repr(curve)


def test_one_may_name_the_values_to_try(lists):
    curve = tune(lists, QUERIES, 0.5, parameters={"nprobe": [20, 2, 7, 7]})
    assert {point.parameters["nprobe"] for point in curve.points} <= {2, 7, 20}
    assert lists.nprobe in (2, 7, 20)


def test_a_sample_of_the_queries_is_searched(lists):
    assert tune(lists, QUERIES, 0.5, sample=20).n_queries == 20


def test_searches_leave_no_trace_when_the_target_is_not_a_number_or_arguments_are_wrong(lists):
    state = {name: tensor.clone() for name, tensor in lists.state_dict().items()}
    for arguments, options, error, words in [
        ((QUERIES, 0.0), {}, ArgumentError, "target_recall is 0.0, expected above 0, at most 1"),
        ((QUERIES, 1.5), {}, ArgumentError, "target_recall is 1.5"),
        ((QUERIES, float("nan")), {}, ArgumentError, "target_recall is nan"),
        ((QUERIES, "high"), {}, DtypeError, "target_recall is 'high'"),
        ((QUERIES, True), {}, DtypeError, "target_recall is True"),
        ((QUERIES, 0.9, 0), {}, ArgumentError, "k is 0"),
        ((QUERIES, 0.9), {"parameters": {"ef": [1]}}, ParameterError, "has no search parameter 'ef'"),
        ((QUERIES, 0.9), {"parameters": {"nprobe": []}}, ArgumentError, "no value for 'nprobe'"),
        ((QUERIES, 0.9), {"parameters": {"nprobe": [0]}}, ArgumentError, "nprobe"),
        ((QUERIES[:, :3], 0.9), {}, ArgumentError, "queries has dim 3"),
        ((QUERIES[:0], 0.9), {}, ArgumentError, "queries has no row"),
    ]:
        with pytest.raises(error, match=words) as caught:
            tune(lists, *arguments, **options)
        assert isinstance(caught.value, ElipsError)
    assert all(torch.equal(tensor, state[name]) for name, tensor in lists.state_dict().items())
    with pytest.raises(ArgumentError, match="the index is empty"):
        tune(FlatIndex(D), QUERIES)


def test_the_curve_is_shown_as_a_table():
    points = (
        TuningPoint({"nprobe": 1, "k_factor": 2}, 0.5, 123456.7),
        TuningPoint({"nprobe": 16, "k_factor": 2}, 0.96, 9876.5),
    )
    assert repr(TuningCurve(points, 0.95, 10, 100, points[1])).splitlines() == [
        "nprobe  k_factor  recall@10  queries/s",
        "     1         2     0.5000    123,457",
        "    16         2     0.9600      9,876  <- best",
        "nprobe=16, k_factor=2 reaches recall@10 0.9600 (target 0.95) at 9,876 queries per second",
    ]


@pytest.mark.parametrize("limit", [1, 2, 3, 20, 64, 65])
def test_values_double_up_to_the_limit(limit):
    values = tuning._doubled(limit)
    assert values[0] == 1
    assert values[-1] == limit
    assert all(low < high <= 2 * low for low, high in itertools.pairwise(values))


def test_what_is_no_index_is_refused():
    vectors = torch.randn(5, 4)
    with pytest.raises(DtypeError, match="index is a Tensor, expected an Index"):
        tune(vectors, vectors, target_recall=0.9)
    with pytest.raises(DtypeError, match="index is a Tensor, expected an Index"):
        index_recall(vectors, vectors, 3)
