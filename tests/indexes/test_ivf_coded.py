"""IVFSQIndex and IVFPQIndex keep the contract of every index and agree with faiss."""

import copy
from typing import ClassVar

import faiss
import pytest
import torch
from coded_contract import check_checkpoints_without_database, clustered, recall

from elips_torch import (
    OPQ,
    ArgumentError,
    FlatIndex,
    ImplementationError,
    IVFPQIndex,
    IVFSQIndex,
    NonFiniteError,
    NotEmptyError,
    NotFittedError,
    PQIndex,
    PreTransformIndex,
    RefineIndex,
    SQIndex,
    knn,
    load_index,
)
from elips_torch.testing import IndexContract
from elips_torch.testing.contract import assert_same, unchanged


class IVFCodedContract(IndexContract):
    """What inverted lists of codes promise beside the contract of every index."""

    @pytest.mark.parametrize("metric", ["l2", "ip", "cosine", "l1"])
    def test_with_all_lists_results_are_exact_for_the_decoded_vectors(self, metric):
        index = self.filled(200, metric=metric, nprobe=self.options["nlist"])
        for n_queries in (1, 30):
            queries = self.vectors(n_queries, seed=2)
            for k in (1, 10, 230):
                assert_same(index.search(queries, k), self.expected(index, queries, k))

    def test_scores_are_those_of_the_decoded_vectors(self):
        index = self.filled(200)
        queries = self.vectors(7, seed=2)
        scores, ids = index.search(queries, 10)
        decoded = index.reconstruct(ids.flatten()).view(7, 10, -1).double()
        expected = (queries[:, None].double() - decoded).square().sum(2).float()
        assert torch.equal(scores, expected)

    def test_nothing_works_before_fit(self):
        index = self.index_class(self.dim, **self.options)
        assert not index.is_trained
        assert "not fitted" in repr(index)
        vectors = self.vectors(3)
        for call in (index.add, index.search, lambda v: index.range_search(v, 1.0)):
            with unchanged(index), pytest.raises(NotFittedError, match=r"fit\(vectors\)"):
                call(vectors)

    def test_a_failed_fit_changes_nothing(self):
        index = self.index_class(self.dim, **self.options)
        poor = self.vectors(300)
        poor[7, 1] = torch.nan
        with unchanged(index), pytest.raises(NonFiniteError, match="row 7"):
            index.fit(poor)
        assert not index.is_trained
        filled = self.filled(20)
        with unchanged(filled), pytest.raises(NotEmptyError, match="20 vectors"):
            filled.fit(self.vectors(300))

    def test_a_fitted_state_loads_into_an_index_that_is_not(self):
        index, other = self.filled(30), self.index_class(self.dim, **self.options)
        other.load_state_dict(index.state_dict())
        self.assert_equal(index, other)

    def test_casts_leave_codes_and_what_was_learned_alone(self):
        index = self.filled(60)
        queries, stored = self.vectors(5, seed=2), index.reconstruct(index.ids)
        wanted = index.search(queries, 7)
        for cast in (lambda i: i.half(), lambda i: i.double(), lambda i: i.type(torch.float16)):
            assert_same(cast(index).search(queries, 7), wanted)
            assert torch.equal(index.reconstruct(index.ids), stored)
            index.upsert(self.vectors(60), index.ids)
            assert torch.equal(index.reconstruct(index.ids), stored)

    def test_a_checkpoint_without_the_database_leaves_a_filled_index_alone(self):
        check_checkpoints_without_database(self, "quantizer", "coarse")

    def test_removing_and_adding_back_restores_the_codes(self):
        index = self.filled(60)
        before = copy.deepcopy(index)
        queries = self.vectors(9, seed=2)
        gone = index.ids[::2].clone()
        index.remove(gone)
        index.add(self.vectors(60)[::2], ids=gone)
        assert torch.equal(index.reconstruct(before.ids), before.reconstruct(before.ids))
        assert_same(index.search(queries, 10), before.search(queries, 10))


class TestIVFSQIndex(IVFCodedContract):
    index_class = IVFSQIndex
    options: ClassVar = {"nlist": 4, "nprobe": 2, "niter": 5}


class TestPlainFourBitIVFSQIndex(IVFCodedContract):
    index_class = IVFSQIndex
    dim: ClassVar = 13
    options: ClassVar = {"nlist": 3, "nprobe": 1, "qtype": "int4", "by_residual": False}


class TestIVFPQIndex(IVFCodedContract):
    index_class = IVFPQIndex
    options: ClassVar = {"nlist": 4, "nprobe": 2, "m": 4, "niter": 3, "min_points_per_centroid": 1}


class TestPlainFourBitIVFPQIndex(IVFCodedContract):
    index_class = IVFPQIndex
    options: ClassVar = {
        "nlist": 3,
        "nprobe": 1,
        "m": 3,
        "nbits": 4,
        "by_residual": False,
        "niter": 3,
        "min_points_per_centroid": 1,
    }


METRICS = {"l2": faiss.METRIC_L2, "ip": faiss.METRIC_INNER_PRODUCT}
N, DIM, NLIST = 4000, 16, 20


def faiss_index(kind, metric, by_residual, coarse):
    if kind == "SQ":
        index = faiss.IndexIVFScalarQuantizer(
            coarse, DIM, NLIST, faiss.ScalarQuantizer.QT_4bit, METRICS[metric], by_residual
        )
    else:
        index = faiss.IndexIVFPQ(coarse, DIM, NLIST, 8, 4, METRICS[metric])
        index.pq.cp.min_points_per_centroid = 1
        index.by_residual = by_residual
    index.nprobe = 5
    return index


def our_index(kind, metric, by_residual, **options):
    options = {"by_residual": by_residual, "nprobe": 5, **options}
    if kind == "SQ":
        return IVFSQIndex(DIM, NLIST, "int4", metric, **options)
    return IVFPQIndex(DIM, NLIST, 8, 4, metric, min_points_per_centroid=1, **options)


@pytest.mark.parametrize("kind", ["SQ", "PQ"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("by_residual", [True, False])
def test_recall_is_that_of_faiss(kind, metric, by_residual):
    database, queries = clustered(N, DIM, 0), clustered(150, DIM, 1)
    truth = knn(queries, database, 10, metric=metric).ids
    coarse = faiss.IndexFlat(DIM, METRICS[metric])
    theirs = faiss_index(kind, metric, by_residual, coarse)
    theirs.train(database.numpy())
    theirs.add(database.numpy())
    their_scores, their_ids = map(torch.from_numpy, theirs.search(queries.numpy(), 10))
    ours = our_index(kind, metric, by_residual).fit(database)
    ours.add(database)
    # Other seeds: recall differs by up to three points from one to another, in either library.
    assert recall(ours.search(queries, 10).ids, truth) > recall(their_ids, truth) - 0.03

    # With their centroids, the same scores.
    same = our_index(kind, metric, by_residual)
    state = ours.state_dict()
    state["coarse.vectors"] = torch.as_tensor(coarse.reconstruct_n(0, NLIST))
    if kind == "SQ":
        trained = torch.from_numpy(faiss.vector_to_array(theirs.sq.trained))
        state["quantizer.minimum"], state["quantizer.extent"] = trained.view(2, DIM)
    else:
        centroids = torch.from_numpy(faiss.vector_to_array(theirs.pq.centroids))
        state["quantizer.codebooks"] = centroids.view(8, 16, 2)
    same.load_state_dict(state)
    same.reset()
    same.add(database, ids=range(N))
    found = same.search(queries, 10)
    assert recall(found.ids, their_ids) > 0.98
    assert abs(recall(found.ids, truth) - recall(their_ids, truth)) <= 0.005
    close = (found.scores - their_scores).abs() <= 1e-3 + 1e-4 * their_scores.abs()
    assert close.float().mean() > 0.98


@pytest.mark.parametrize("kind", ["SQ", "PQ"])
def test_residuals_are_coded_more_finely_than_vectors(kind):
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(NLIST, DIM, generator=generator)
    database = centres.repeat(N // NLIST, 1) + torch.randn(N, DIM, generator=generator)
    errors = []
    for by_residual in (True, False):
        index = our_index(kind, "l2", by_residual).fit(database)
        index.add(database)
        errors.append(float((index.reconstruct(index.ids) - database).square().mean()))
    assert errors[0] < errors[1]


def test_many_training_vectors_are_sampled(monkeypatch):
    monkeypatch.setattr("elips_torch.indexes.ivf_sq._EXAMPLES", 50)
    database = clustered(1000, DIM, 0)
    index = our_index("SQ", "l2", False).fit(database)
    whole = SQIndex(DIM, "int4").fit(database)
    assert (index.quantizer.extent < whole.quantizer.extent).any()
    few = our_index("PQ", "l2", True, max_points_per_centroid=2).fit(database)
    assert few.quantizer.n_examples == 32


@pytest.mark.parametrize("kind", ["SQ", "PQ"])
def test_masks_fill_up_from_lists_beyond_those_probed(kind):
    database = clustered(N, DIM, 0)
    index = our_index(kind, "l2", True, nprobe=1).fit(database)
    index.add(database)
    mask = torch.zeros(N, dtype=torch.bool)
    mask[torch.randperm(N, generator=torch.Generator().manual_seed(3))[:15]] = True
    found = index.search(database[:20], 10, mask=mask)
    assert (found.ids >= 0).all()
    assert mask[found.ids].all()


@pytest.mark.parametrize("kind", ["SQ", "PQ"])
def test_a_coarse_index_of_codes_serves(kind, tmp_path):
    database = clustered(N, DIM, 0)
    index = our_index(kind, "l2", True, coarse=SQIndex(DIM, "int8"), nprobe=NLIST).fit(database)
    index.add(database)
    queries = clustered(20, DIM, 1)
    decoded = index.reconstruct(index.ids)
    flat = FlatIndex(DIM)
    flat.add(decoded)
    assert_same(index.search(queries, 5), flat.search(queries, 5))
    index.save(tmp_path / "index")
    assert_same(load_index(tmp_path / "index").search(queries, 5), index.search(queries, 5))


@pytest.mark.parametrize("nbits", [4, 8])
@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("by_residual", [True, False])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_tables_and_decoded_lists_give_the_same(nbits, metric, by_residual, offset):
    database, queries = clustered(800, 12, 0) + offset, clustered(12, 12, 1) + offset
    index = IVFPQIndex(
        12, 8, 4, nbits, metric, by_residual=by_residual, niter=2, min_points_per_centroid=1, nprobe=3
    )
    index.fit(database).add(
        torch.cat([database, database[:200]]),
        ids=torch.randperm(1000, generator=torch.Generator().manual_seed(2)),
    )
    mask = torch.rand(12, 1000, generator=torch.Generator().manual_seed(3)) < 0.2
    exclude = index.search(queries, 4).ids
    for options in ({}, {"mask": mask}, {"exclude": exclude}, {"mask": mask[0], "nprobe": 8}, {"nprobe": 1}):
        for k in (1, 30):
            found = [
                index.search(queries, k, implementation=name, workspace_bytes=2**20, **options)
                for name in ("tables", "eager")
            ]
            assert_same(*found)


def test_without_cpp_a_few_queries_use_tables_and_many_do_not(monkeypatch):
    monkeypatch.setattr("elips_torch.ops.ivf_search.library_reasons", lambda device: ["no C++ here"])
    database = clustered(600, 12, 0)
    index = IVFPQIndex(12, 4, 4, 4, min_points_per_centroid=1).fit(database)
    index.add(database)
    assert index.explain(torch.rand(5, 12)).chosen == "tables"
    assert index.explain(torch.rand(500, 12)).chosen != "tables"
    codes = IVFSQIndex(12, 4, nprobe=2).fit(database)
    with pytest.raises(ImplementationError, match="no parts to look up"):
        codes.search(database, implementation="tables")
    cosine = IVFPQIndex(12, 4, 4, 4, "cosine", nprobe=2, min_points_per_centroid=1).fit(database)
    with pytest.raises(ImplementationError, match="'cosine' are no sums"):
        cosine.search(database, implementation="tables")


def test_decoded_vectors_stay_in_the_domain_of_the_metric():
    database = clustered(600, DIM, 0).clamp_min(0.0)
    index = IVFPQIndex(DIM, 4, 8, 4, "jensenshannon", min_points_per_centroid=1, nprobe=4).fit(database)
    index.add(database)
    assert (index.reconstruct(index.ids) >= 0).all()
    assert index.search(database[:5], 600).scores.isfinite().all()


def test_bad_construction_is_refused():
    with pytest.raises(ArgumentError, match="m is 5, which does not divide dim = 12"):
        IVFPQIndex(12, 4, 5)
    with pytest.raises(ArgumentError, match="'int3'"):
        IVFSQIndex(12, 4, "int3")
    with pytest.raises(ArgumentError, match="nlist is 0"):
        IVFSQIndex(12, 0)


@pytest.mark.filterwarnings("error")
def test_few_training_vectors_are_refused_before_anything_changes():
    index = IVFPQIndex(12, 10, 4)
    with (
        unchanged(index),
        pytest.raises(ArgumentError, match=r"100 rows, expected at least 2\*\*nbits = 256"),
    ):
        index.fit(torch.rand(100, 12))
    assert not index.is_trained


@pytest.mark.parametrize("make", [lambda: IVFSQIndex(12, 2), lambda: IVFPQIndex(12, 2, 4)])
def test_what_codes_are_of_is_settled_by_the_constructor(make):
    index = make()
    with pytest.raises(AttributeError):
        index.by_residual = False
    assert index.by_residual


def test_repr_shows_what_matters():
    assert "code_size=4, by_residual=True, m=4, nbits=8" in repr(IVFPQIndex(12, 2, 4))
    assert "code_size=9, by_residual=False, qtype='int6'" in repr(
        IVFSQIndex(12, 2, "int6", by_residual=False)
    )


def test_plain_and_inverted_codes_of_whole_vectors_are_the_same():
    database = clustered(800, DIM, 0)
    plain = PQIndex(DIM, 8, 4, niter=5, min_points_per_centroid=1, max_points_per_centroid=None).fit(database)
    plain.add(database)
    inverted = IVFPQIndex(
        DIM, 4, 8, 4, niter=5, by_residual=False, min_points_per_centroid=1, max_points_per_centroid=None
    ).fit(database)
    inverted.add(database)
    assert torch.equal(plain.codes, inverted.codes)


def test_rotations_and_refinement_raise_recall(tmp_path):
    database, queries = clustered(N, DIM, 0), clustered(100, DIM, 1)
    truth = knn(queries, database, 10).ids
    codes = our_index("PQ", "l2", True)
    refined = RefineIndex(PreTransformIndex(OPQ(DIM, 8, nbits=4), our_index("PQ", "l2", True)), k_factor=8)
    for index in (codes, refined):
        index.fit(database).add(database)
    assert recall(refined.search(queries, 10).ids, truth) > recall(codes.search(queries, 10).ids, truth) + 0.1
    refined.save(tmp_path / "index")
    assert_same(load_index(tmp_path / "index").search(queries, 10), refined.search(queries, 10))
