"""PQIndex keeps the contract of every index and agrees with faiss."""

from typing import ClassVar

import faiss
import pytest
import torch
from coded_contract import CodedContract, clustered, recall

from elips_torch import ArgumentError, ImplementationError, IVFPQIndex, PQIndex, SQIndex, knn
from elips_torch.core.hardware import device_facts
from elips_torch.core.native import native_reasons
from elips_torch.reference.knn import knn as reference_knn
from elips_torch.testing.contract import assert_same

# Where C++ can be compiled.
NATIVE = [] if native_reasons(device_facts("cpu")) else ["native"]


class TestPQIndex(CodedContract):
    index_class = PQIndex
    options: ClassVar = {"m": 4, "niter": 3, "min_points_per_centroid": 1}


class TestFourBitPQIndex(CodedContract):
    index_class = PQIndex
    options: ClassVar = {"m": 3, "nbits": 4, "niter": 3, "min_points_per_centroid": 1}


METRICS = {"l2": faiss.METRIC_L2, "ip": faiss.METRIC_INNER_PRODUCT}


def faiss_pq(database, m, nbits, metric, seed=0):
    index = faiss.IndexPQ(database.shape[1], m, nbits, METRICS[metric])
    index.pq.cp.min_points_per_centroid = 1
    index.pq.cp.niter = 10
    index.pq.cp.seed = 1234 + seed
    index.train(database.numpy())
    index.add(database.numpy())
    return index


@pytest.mark.parametrize(("m", "nbits"), [(4, 8), (8, 4)])
@pytest.mark.parametrize("metric", METRICS)
def test_recall_is_that_of_faiss(m, nbits, metric):
    database, queries = clustered(2500, 16, 0), clustered(150, 16, 1)
    truth = knn(queries, database, 10, metric=metric).ids
    ours, theirs = [], []
    for seed in range(3):
        index = PQIndex(16, m, nbits, metric, niter=10, seed=100 * seed, min_points_per_centroid=1)
        index.fit(database).add(database)
        ours.append(recall(index.search(queries, 10).ids, truth))
        found = faiss_pq(database, m, nbits, metric, seed).search(queries.numpy(), 10)[1]
        theirs.append(recall(torch.from_numpy(found), truth))
    # One seed differs from another by about a point.
    assert sum(ours) / 3 >= sum(theirs) / 3 - 0.01
    assert sum(ours) / 3 > 0.3


@pytest.mark.parametrize(("m", "nbits"), [(4, 8), (5, 4)])
@pytest.mark.parametrize("metric", METRICS)
def test_with_the_centroids_of_faiss_codes_and_scores_are_the_same(m, nbits, metric):
    database, queries = clustered(1000, 20, 0), clustered(50, 20, 1)
    theirs = faiss_pq(database, m, nbits, metric)
    centroids = torch.from_numpy(faiss.vector_to_array(theirs.pq.centroids))
    index = PQIndex(20, m, nbits, metric)
    index.load_state_dict({**index.state_dict(), "quantizer.codebooks": centroids.view(m, 2**nbits, -1)})
    index.add(database)
    codes = torch.from_numpy(faiss.vector_to_array(theirs.codes))
    assert torch.equal(index.codes, codes.view_as(index.codes))
    their_scores = torch.from_numpy(theirs.search(queries.numpy(), 10)[0])
    torch.testing.assert_close(index.search(queries, 10).scores, their_scores, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("nbits", [8, 4])
@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_tables_and_decoded_vectors_give_the_same(nbits, metric, offset):
    database, queries = clustered(2000, 12, 0) + offset, clustered(70, 12, 1) + offset
    index = PQIndex(12, 4, nbits, metric, niter=2, min_points_per_centroid=1).fit(database)
    index.add(database, ids=torch.randperm(2000, generator=torch.Generator().manual_seed(2)))
    mask = torch.rand(70, 2000, generator=torch.Generator().manual_seed(3)) < 0.2
    exclude = index.search(queries, 4).ids
    for options in ({}, {"mask": mask}, {"exclude": exclude}, {"mask": mask[0], "workspace_bytes": 2**20}):
        for k in (1, 10, 100):
            found = [
                index.search(queries, k, implementation=name, **options)
                for name in ("decoded", "tables", *NATIVE)
            ]
            for other in found[1:]:
                assert_same(other, found[0])


def test_a_few_queries_use_tables_and_many_do_not(monkeypatch):
    monkeypatch.setattr("elips_torch.ops.coded_search.library_reasons", lambda device: ["no C++ here"])
    index = PQIndex(12, 4, nbits=4, niter=2, min_points_per_centroid=1).fit(clustered(200, 12, 0))
    index.add(clustered(200, 12, 0))
    assert index.explain(torch.rand(5, 12)).chosen == "tables"
    assert index.explain(torch.rand(500, 12)).chosen == "decoded"
    assert index.explain(torch.rand(500, 12), implementation="tables").chosen == "tables"
    flat = PQIndex(12, 4, nbits=4, metric="l1")
    assert flat.explain(torch.rand(5, 12)).chosen == "decoded"
    with pytest.raises(ImplementationError, match="'l1' are no sums over parts"):
        index.__class__(12, 4, metric="l1", min_points_per_centroid=1, niter=0).fit(
            clustered(256, 12, 0)
        ).search(torch.rand(1, 12), implementation="tables")
    with pytest.raises(ImplementationError, match="no parts to look up"):
        SQIndex(12, "bf16").search(torch.rand(1, 12), implementation="tables")


def test_many_equal_codes_are_ranked_by_id():
    vectors = clustered(20, 12, 0)
    index = PQIndex(12, 4, nbits=4, niter=1, min_points_per_centroid=0).fit(vectors)
    ids = torch.arange(2000).flip(0)
    index.add(vectors[:4].repeat(500, 1), ids=ids)
    for name in ("tables", "decoded"):
        found = index.search(vectors[:1], 300, implementation=name).ids[0]
        assert found.tolist() == [3 + 4 * i for i in range(300)]


def test_bad_construction_is_refused():
    with pytest.raises(ArgumentError, match="m is 5, which does not divide dim = 12"):
        PQIndex(12, 5)
    with pytest.raises(ArgumentError, match="nbits is 5"):
        PQIndex(12, 4, 5)


def test_repr_shows_what_matters():
    assert repr(PQIndex(12, 4, metric="ip")) == (
        "PQIndex(dim=12, metric='ip', ntotal=0, k=10, dtype=float32, code_size=4, not fitted, m=4, nbits=8)"
    )


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e18])
@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("make", ["plain", "inverted"])
def test_tables_hold_for_tiny_and_huge_vectors(scale, metric, make):
    database = clustered(700, 12, 0) * scale
    # One row far away, and queries beyond all rows, in float64.
    database[7] *= 30
    queries = (clustered(12, 12, 1) * scale).double()
    queries[3] *= 1e3
    options = {"niter": 2, "min_points_per_centroid": 1}
    if make == "plain":
        index = PQIndex(12, 4, 4, metric, **options).fit(database)
    elif metric != "cosine":
        index = IVFPQIndex(12, 4, 4, 4, metric, nprobe=2, **options).fit(database)
    else:
        pytest.skip("inverted lists have no tables under cosine")
    index.add(database)
    other = "decoded" if make == "plain" else "eager"
    assert_same(
        index.search(queries, 20, implementation="tables"), index.search(queries, 20, implementation=other)
    )


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_tables_decide_near_ties_as_the_definition_does(metric):
    # Centroids that differ by a few units in the last place, far from the origin.
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(1, 12, generator=generator) + 1000
    steps = torch.randint(-2, 3, (300, 12), generator=generator) * 2.0**-13
    index = PQIndex(12, 4, 4, metric, niter=0, min_points_per_centroid=1).fit(base + steps)
    index.add(base + steps)
    queries = base + torch.randn(10, 12, generator=generator)
    found = index.search(queries, 15, implementation="tables")
    assert_same(found, index.search(queries, 15, implementation="decoded"))
    wanted = reference_knn(queries, index.reconstruct(index.ids), 15, metric)
    assert_same(found, wanted)
