import pytest
import torch

from elips_torch import FlatIndex, IVFFlatIndex, PQIndex, RefineIndex, SQIndex, index_factory
from elips_torch.core.errors import ArgumentError, DeviceError, ElipsError, ParameterError, ShapeError
from elips_torch.evaluation import RecallAtK, index_recall, own_recall
from elips_torch.evaluation.ground_truth import exact_neighbours

N, D, K = 700, 8, 10


def normal(n, seed=0, dim=D):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def lists(metric="l2", nprobe=2, **options):
    index = IVFFlatIndex(D, nlist=16, metric=metric, nprobe=nprobe, **options).fit(normal(N))
    index.add(normal(N))
    return index


def by_ids(found, true):
    metric = RecallAtK(K)
    metric.update(found, true)
    return metric.compute()[f"recall@{K}"].item()


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_without_ties_it_is_the_recall_of_ids(metric):
    index, queries = lists(metric), normal(40, seed=1)
    true = exact_neighbours(queries, normal(N), K, metric)
    expected = by_ids(index.search(queries, K).ids, true)
    assert 0.1 < expected < 0.95
    assert index_recall(index, queries, K) == pytest.approx(expected, abs=1e-7)
    assert index_recall(index, queries, K, ground_truth=true) == pytest.approx(expected, abs=1e-7)


def test_of_codes_it_is_held_against_the_originals_only_where_they_are_given():
    index = PQIndex(D, m=2, nbits=4).fit(normal(N))
    index.add(normal(N))
    queries = normal(40, seed=1)
    true = exact_neighbours(queries, normal(N), K)
    # Search is exact for what was decoded, with all its ties.
    assert index_recall(index, queries, K) == 1.0
    found = index.search(queries, K).ids
    expected = by_ids(found, true)
    assert expected < 1.0
    assert index_recall(index, queries, K, database=normal(N)) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    "make",
    [
        lambda: FlatIndex(D, "cosine"),
        lambda: FlatIndex(D, "l1"),
        lambda: FlatIndex(D, "lp", p=3.0),
        lambda: FlatIndex(D, dtype=torch.float16),
        lambda: SQIndex(D),
        lambda: index_factory(D, "IVF8,SQ8", nprobe=8),
        lambda: index_factory(D, "PCA4,Flat"),
    ],
    ids=["cosine", "l1", "lp", "float16", "SQ", "IVFSQ, all lists", "PCA"],
)
def test_what_searches_exactly_what_it_holds_has_recall_one(make):
    index = make()
    if not index.is_trained:
        index.fit(normal(N))
    index.add(normal(N))
    assert index_recall(index, normal(20, seed=1), K) == 1.0


def test_what_ties_for_the_last_place_counts():
    index = FlatIndex(D)
    index.add(torch.ones(30, D))
    # The other end of the ties: none of these ids is among those of exact search.
    reversed_ids = torch.arange(29, 19, -1).expand(5, K)
    assert by_ids(reversed_ids, exact_neighbours(normal(5), torch.ones(30, D), K)) == 0.0
    index.search = lambda queries, k, **parameters: FlatIndex.search(index, queries, k)._replace(
        ids=reversed_ids
    )
    assert index_recall(index, normal(5), K) == 1.0


def test_what_is_missing_is_a_miss():
    index = FlatIndex(D)
    index.add(normal(N))
    found = index.search(normal(5, seed=1), K)
    half = found.ids.clone()
    half[:, K // 2 :] = -1
    index.search = lambda queries, k, **parameters: found._replace(ids=half)
    assert index_recall(index, normal(5, seed=1), K) == 0.5


def test_an_index_with_fewer_than_k_is_asked_for_all():
    index = FlatIndex(D)
    index.add(normal(4))
    assert index_recall(index, normal(5, seed=1), K) == 1.0


def test_ids_of_ones_own_and_removed_rows():
    index = FlatIndex(D)
    ids = torch.randperm(N, generator=torch.Generator().manual_seed(3)) + 1000
    index.add(normal(N), ids=ids)
    index.remove(ids[::3])
    kept = torch.arange(N) % 3 != 0
    assert index_recall(index, normal(20, seed=1), K) == 1.0
    assert index_recall(index, normal(20, seed=1), K, database=normal(N)[kept]) == 1.0


def test_blocks_change_nothing(monkeypatch):
    index, queries = lists(), normal(40, seed=1)
    whole = index_recall(index, queries, K)
    # Seven rows a block, fewer than are asked for.
    # The function stands before the module of its name.
    monkeypatch.setattr(own_recall, "_BLOCK_BYTES", 4 * D * 7)
    assert index_recall(index, queries, K) == whole
    assert index_recall(index, queries, K, database=normal(N)) == whole


def test_a_sample_is_the_same_for_a_seed():
    index, queries = lists(), normal(200, seed=1)
    first, again, other = (index_recall(index, queries, K, sample=50, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert index_recall(index, queries, K, sample=1000) == index_recall(index, queries, K)


def test_a_search_parameter_holds_for_one_call():
    index, queries = lists(), normal(40, seed=1)
    assert index_recall(index, queries, K, nprobe=16) == 1.0 > index_recall(index, queries, K)
    assert index.nprobe == 2


def test_the_queries_may_require_grad_and_come_in_half_precision():
    index = FlatIndex(D)
    index.add(normal(N))
    assert index_recall(index, normal(5, seed=1).requires_grad_(), K) == 1.0
    assert index_recall(index, normal(5, seed=1).half(), K) == 1.0


def test_refined_codes_find_more_of_the_originals():
    coded = PQIndex(D, m=2, nbits=4).fit(normal(N))
    refined = RefineIndex(PQIndex(D, m=2, nbits=4).fit(normal(N)), k_factor=8)
    queries = normal(40, seed=1)
    for index in (coded, refined):
        index.add(normal(N))
    assert index_recall(refined, queries, K) > index_recall(coded, queries, K, database=normal(N))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((normal(5, dim=3), K), {}, ShapeError, "queries has dim 3"),
        ((normal(5).to("meta"), K), {}, DeviceError, "queries is on meta"),
        ((normal(0), K), {}, ArgumentError, "queries has no row"),
        ((normal(5), 0), {}, ArgumentError, "k is 0"),
        ((normal(5), K), {"database": normal(3)}, ShapeError, "database has 3 rows, the index holds 700"),
        ((normal(5), K), {"ground_truth": torch.zeros(5, 3, dtype=torch.int64)}, ShapeError, "at least 10"),
        ((normal(5), K), {"ground_truth": torch.full((5, K), 10**6)}, ElipsError, "1000000"),
        ((normal(5), K), {"sample": 0}, ArgumentError, "sample is 0"),
        ((normal(5), K), {"ef": 3}, ParameterError, "ef"),
    ],
)
def test_bad_input_is_refused(arguments, options, error, words):
    with pytest.raises(error, match=words):
        index_recall(lists(), *arguments, **options)


def test_an_empty_index_is_refused():
    with pytest.raises(ArgumentError, match="the index is empty"):
        index_recall(FlatIndex(D), normal(5), K)
