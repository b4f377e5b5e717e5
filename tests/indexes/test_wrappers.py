"""PreTransformIndex and RefineIndex keep the contract of every index, alone and around each other."""

import io
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from elips_torch import (
    ITQ,
    OPQ,
    PCA,
    ArgumentError,
    DtypeError,
    FlatIndex,
    IVFFlatIndex,
    L2Normalize,
    NonFiniteError,
    NotFittedError,
    ParameterError,
    PreTransformIndex,
    RandomRotation,
    RefineIndex,
    index_factory,
    load_index,
)
from elips_torch.core.metric import resolve_metric
from elips_torch.testing import IndexContract
from elips_torch.testing.contract import assert_same


class WrapperContract(IndexContract):
    """The contract with what differs around another index."""

    def wrap(self, metric, **options):
        raise NotImplementedError

    def make(self, metric="l2", **options):
        index = self.wrap(metric, **options)
        return index.fit(self.vectors(256, seed=7)) if not index.is_trained else index

    def as_searched(self, index, vectors):
        """Return vectors as the metric of the index compares them."""
        while isinstance(index, PreTransformIndex):
            vectors, index = index.transform(vectors), index.index
        return vectors

    def test_gradients_equal_those_of_the_dense_computation(self):
        for metric in ("l2", "ip", "cosine", "l1"):
            index = self.filled(metric=metric)
            queries = self.vectors(6, seed=2).requires_grad_()
            scores, ids = index.search(queries, k=5)
            weight = torch.rand(scores.shape, generator=torch.Generator().manual_seed(3))
            (scores * weight).sum().backward()
            dense = queries.detach().clone().requires_grad_()
            candidates = self.as_searched(index, index.reconstruct(ids.flatten())).view(6, 5, -1).double()
            kind = resolve_metric(metric)
            near = kind.score(self.as_searched(index, dense)[:, None].double(), candidates)
            torch.testing.assert_close(near.detach().float(), scores.detach(), rtol=1e-4, atol=1e-4)
            (near * weight).sum().backward()
            torch.testing.assert_close(queries.grad, dense.grad, rtol=1e-3, atol=1e-3)

    def test_bad_construction_is_refused(self):
        with pytest.raises(ArgumentError, match="k is 0"):
            self.make(k=0)


class TestPreTransformIndex(WrapperContract):
    index_class = PreTransformIndex

    def wrap(self, metric, **options):
        return PreTransformIndex(PCA(self.dim, 8), FlatIndex(8, metric, **options))


class TestRotatedIndex(WrapperContract):
    index_class = PreTransformIndex

    def wrap(self, metric, **options):
        return PreTransformIndex(RandomRotation(self.dim), FlatIndex(self.dim, metric, **options))


class TestRefineIndex(WrapperContract):
    index_class = RefineIndex

    def wrap(self, metric, **options):
        return RefineIndex(FlatIndex(self.dim, metric, **options))


class TestHalfRefineIndex(WrapperContract):
    index_class = RefineIndex
    dtype: ClassVar = torch.float16

    def wrap(self, metric, **options):
        inner = FlatIndex(self.dim, metric, dtype=torch.bfloat16, **options)
        return RefineIndex(inner, k_factor=20, dtype=torch.float16)


class TestRefineAroundPreTransform(WrapperContract):
    index_class = RefineIndex

    def wrap(self, metric, **options):
        coarse = PreTransformIndex(PCA(self.dim, 8), FlatIndex(8, metric, **options))
        return RefineIndex(coarse, refine_device="cpu")

    def as_searched(self, index, vectors):
        return vectors


class TestPreTransformAroundRefine(WrapperContract):
    index_class = PreTransformIndex

    def wrap(self, metric, **options):
        inner = PreTransformIndex(RandomRotation(9, 6), FlatIndex(6, metric, **options))
        return PreTransformIndex(OPQ(self.dim, 3, dim_out=9, nbits=4, niter=1), RefineIndex(inner))


def vectors(n=300, dim=12, seed=0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine", "l1"])
def test_refining_a_coarse_index_gives_exact_neighbours(metric):
    database, queries = vectors(500), vectors(20, seed=1)
    exact = FlatIndex(12, metric)
    exact.add(database)
    wanted = exact.search(queries, 5)
    index = RefineIndex(
        PreTransformIndex(PCA(12, 9), FlatIndex(9, metric, dtype=torch.bfloat16)).fit(database)
    )
    index.add(database)
    assert_same(index.search(queries, 5, k_factor=100), wanted)
    recalls = []
    for factor in (1, 4, 20):
        found = index.search(queries, 5, k_factor=factor)
        recalls.append(float((found.ids[:, :, None] == wanted.ids[:, None]).any(2).float().mean()))
        # Scores are those of the originals, whatever was found.
        for row, ids in enumerate(found.ids):
            alone = FlatIndex(12, metric)
            alone.add(database[ids], ids=ids)
            assert torch.equal(alone.search(queries[row], 5).scores, found.scores[row])
            assert torch.equal(alone.search(queries[row], 5).ids, found.ids[row])
    assert recalls == sorted(recalls)
    assert recalls[0] < 1.0
    index.k_factor = 100
    assert_same(index.search(queries, 5), wanted)


def test_range_search_rescores_by_the_originals():
    database, queries = vectors(200), vectors(10, seed=1)
    exact = FlatIndex(12)
    exact.add(database)
    index = RefineIndex(FlatIndex(12, dtype=torch.bfloat16), dtype=torch.float64)
    index.add(database)
    lims, scores, ids = index.range_search(queries, 15.0)
    wanted = exact.range_search(queries, 15.0)
    assert (scores < 15.0).all()
    for query in range(10):
        part = slice(int(lims[query]), int(lims[query + 1]))
        theirs = slice(int(wanted.lims[query]), int(wanted.lims[query + 1]))
        kept = torch.isin(wanted.ids[theirs], ids[part])
        assert ids[part].tolist() == wanted.ids[theirs][kept].tolist()
        assert torch.equal(scores[part], wanted.scores[theirs][kept])
        assert (~kept).sum() <= 1


def test_a_rotation_changes_no_neighbour():
    database, queries = vectors(), vectors(10, seed=1)
    plain = FlatIndex(12)
    plain.add(database)
    for transform in (RandomRotation(12), RandomRotation(12, 20), PCA(12, 12).fit(database)):
        index = PreTransformIndex(transform, FlatIndex(transform.dim_out))
        index.add(database)
        found, wanted = index.search(queries, 5), plain.search(queries, 5)
        assert torch.equal(found.ids, wanted.ids)
        torch.testing.assert_close(found.scores, wanted.scores, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(index.reconstruct([3, 5]), database[[3, 5]], rtol=1e-4, atol=1e-4)


def test_normalised_vectors_have_cosines_for_inner_products():
    database, queries = vectors(), vectors(10, seed=1)
    plain = FlatIndex(12, "cosine")
    plain.add(database)
    index = PreTransformIndex(L2Normalize(12), FlatIndex(12, "ip"))
    index.add(database)
    found, wanted = index.search(queries, 5), plain.search(queries, 5)
    assert torch.equal(found.ids, wanted.ids)
    torch.testing.assert_close(found.scores, wanted.scores, rtol=1e-5, atol=1e-6)


def test_fit_trains_what_is_not_trained():
    index = PreTransformIndex(ITQ(12, 4), FlatIndex(4))
    assert not index.is_trained
    with pytest.raises(NotFittedError, match="call fit"):
        index.add(vectors())
    with pytest.raises(NotFittedError, match="call fit"):
        index.search(vectors())
    index.fit(vectors())
    assert index.is_trained
    before = index.transform.matrix.clone()
    index.add(vectors())
    index.fit(vectors(seed=5))
    assert torch.equal(index.transform.matrix, before)


def test_search_parameters_are_those_of_the_inner_index():
    index = RefineIndex(PreTransformIndex(RandomRotation(12), FlatIndex(12)), k_factor=3)
    assert index.search_parameters == ("k_factor", "workspace_bytes")
    index.workspace_bytes = 2**21
    assert index.index.index.workspace_bytes == index.workspace_bytes == 2**21
    index.k = 7
    assert index.index.index.k == 7
    index.add(vectors())
    assert index.search(vectors(2), k_factor=2.5, workspace_bytes=2**22).ids.shape == (2, 7)
    with pytest.raises(
        ParameterError, match="no search parameter 'nprobe', it has k_factor, workspace_bytes"
    ):
        index.search(vectors(2), nprobe=4)
    with pytest.raises(ArgumentError, match=r"k_factor is 0\.5"):
        index.search(vectors(2), k_factor=0.5)
    nested = RefineIndex(RefineIndex(FlatIndex(12), k_factor=2), k_factor=5)
    assert (nested.k_factor, nested.index.k_factor) == (5, 2)


def test_compiles_without_a_break_and_grows_without_compiling_again():
    index = RefineIndex(PreTransformIndex(PCA(12, 9).fit(vectors()), FlatIndex(9)))
    index.add(vectors())
    outer = PreTransformIndex(RandomRotation(12), index)
    counter = CompileCounter()
    for made in (index, outer):
        counter.clear()
        model = torch.compile(
            lambda q, made=made: made.search(q * 1.0, 4, k_factor=3).scores, backend=counter, fullgraph=True
        )
        for growth in range(3):
            for queries in (vectors(5, seed=1), vectors(5, seed=1).requires_grad_()):
                assert torch.equal(model(queries), made.search(queries, 4, k_factor=3).scores)
            index.add(vectors(50, seed=growth))
        assert counter.frame_count == 2


def test_originals_stay_where_they_are_to_stay():
    index = RefineIndex(FlatIndex(12), refine_device="cpu")
    index.add(vectors())
    index.half()
    assert index.vectors.dtype == index.dtype == torch.float16
    index.to("meta")
    assert index.index.vectors.is_meta
    assert index.vectors.device.type == "cpu"
    assert len(index.vectors) == 300
    moved = RefineIndex(FlatIndex(12))
    moved.add(vectors())
    assert moved.to("meta").vectors.is_meta


def test_a_refused_batch_changes_nothing():
    index = RefineIndex(FlatIndex(12), dtype=torch.float16)
    index.add(vectors(5))
    for bad, ids in ((vectors(2), [1, 9]), (vectors(2) * 1e6, [8, 9])):
        with pytest.raises((ArgumentError, NonFiniteError)):
            index.add(bad, ids=ids)
        assert len(index) == len(index.vectors) == 5
    with pytest.raises(ArgumentError, match="holds 5 vectors, expected an empty one"):
        RefineIndex(index.index)


def test_state_of_a_nested_index_loads_into_another_size(tmp_path):
    def make():
        return RefineIndex(PreTransformIndex(PCA(12, 6), FlatIndex(6)), k_factor=2.5)

    index = make().fit(vectors())
    index.add(vectors())
    index.k_factor = 8
    model = nn.ModuleDict({"index": index})
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    assert set(index.state_dict()) == {
        "vectors",
        "k_factor",
        "index.transform.matrix",
        "index.transform.mean",
        "index.transform.variances",
        "index.index.vectors",
        "index.index.ids",
        "index.index.next_id",
    }
    for assign in (False, True):
        other = make()
        file.seek(0)
        nn.ModuleDict({"index": other}).load_state_dict(torch.load(file, weights_only=True), assign=assign)
        assert other.k_factor == 8
        assert_same(other.search(vectors(5, seed=1), 4), index.search(vectors(5, seed=1), 4))
    index.save(tmp_path / "index")
    assert_same(load_index(tmp_path / "index").search(vectors(5), 4), index.search(vectors(5), 4))
    with pytest.raises(RuntimeError, match="expected one number >= 1"):
        other.load_state_dict({**index.state_dict(), "k_factor": torch.tensor(0.0)})


def test_bad_construction_is_refused():
    for build, error, message in (
        (lambda: PreTransformIndex(PCA(12, 6), FlatIndex(7)), ArgumentError, "dim_out 6, index has dim 7"),
        (lambda: PreTransformIndex(nn.Linear(12, 6), FlatIndex(6)), DtypeError, "transform is a Linear"),
        (lambda: PreTransformIndex(PCA(12, 6), nn.Linear(6, 6)), DtypeError, "index is a Linear"),
        (lambda: RefineIndex(nn.Linear(6, 6)), DtypeError, "index is a Linear"),
        (lambda: RefineIndex(FlatIndex(6), k_factor=0), ArgumentError, "k_factor is 0"),
        (lambda: RefineIndex(FlatIndex(6), k_factor="2"), DtypeError, "k_factor is '2'"),
        (lambda: RefineIndex(FlatIndex(6), dtype=torch.int8), DtypeError, "torch.int8"),
    ):
        with pytest.raises(error, match=message):
            build()


def test_repr_shows_the_whole():
    index = RefineIndex(PreTransformIndex(L2Normalize(12), FlatIndex(12)))
    assert repr(index).startswith(
        "RefineIndex(PreTransformIndex(L2Normalize(dim=12), FlatIndex(dim=12, metric='l2'"
    )
    assert repr(index).endswith("k_factor=4, dtype=float32)")


def test_the_memory_of_the_inner_index_counts():
    vectors = torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
    lists = IVFFlatIndex(8, 8)
    index = RefineIndex(PreTransformIndex(PCA(16, 8), lists)).fit(vectors)
    index.add(vectors)
    # The matrix, the mean and the variances, and the originals; the lists are no buffers.
    own = 4 * (8 * 16 + 16 + 8) + vectors.nbytes
    assert index.memory_bytes() == lists.memory_bytes() + own


def test_a_checkpoint_without_rows_leaves_the_transform_alone():
    full = PreTransformIndex(PCA(12, 6), FlatIndex(6)).fit(vectors())
    full.add(vectors())
    matrix = full.transform.matrix.clone()
    other = PreTransformIndex(PCA(12, 6), FlatIndex(6)).fit(vectors(seed=5) * torch.arange(12))
    fitted = {key: value for key, value in other.state_dict().items() if key.startswith("transform.")}
    other.index.index_in_state_dict = full.index_in_state_dict = False
    assert not other.state_dict()
    for state in (other.state_dict(), fitted):
        full.load_state_dict(state)
        assert torch.equal(full.transform.matrix, matrix)


def test_a_failed_load_changes_neither_originals_nor_inner_rows():
    index, other = RefineIndex(FlatIndex(12)), RefineIndex(FlatIndex(12))
    index.add(vectors(20))
    other.add(vectors(20, seed=1))
    state = other.state_dict()
    for bad in (
        {**state, "index.vectors": state["index.vectors"][:, :2]},
        {**state, "vectors": state["vectors"][:, :2]},
    ):
        with pytest.raises(RuntimeError, match="got shape"):
            index.load_state_dict(bad)
        assert torch.equal(index.vectors, vectors(20))
        assert torch.equal(index.index.vectors, vectors(20))


def test_a_failed_fit_leaves_the_transform_untrained():
    index = PreTransformIndex(PCA(12, 6), IVFFlatIndex(6, nlist=100))
    with pytest.raises(ArgumentError):
        index.fit(vectors(50))
    assert not index.transform.is_trained


@pytest.mark.parametrize("verb", ["add", "upsert"])
def test_without_memory_for_originals_nothing_is_stored(verb, monkeypatch):
    index = RefineIndex(FlatIndex(12))
    index.add(vectors(5))

    def refuse(rows):
        raise MemoryError

    monkeypatch.setattr(index, "_append_rows", refuse)
    with pytest.raises(MemoryError):
        getattr(index, verb)(vectors(2, seed=1), ids=[4, 9] if verb == "upsert" else None)
    assert torch.equal(index.vectors, vectors(5))
    assert torch.equal(index.index.vectors, vectors(5))


@pytest.mark.parametrize("description", ["SQ8,RFlat", "PCA8,Flat", "PCA8,IVF4,Flat,RFlat"])
def test_explain_speaks_of_the_inner_index(description):
    vectors = torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
    index = index_factory(16, description).fit(vectors)
    index.add(vectors)
    explanation = index.explain(vectors[:3], 5)
    assert explanation.chosen is not None
    assert "3 x 400 x" in str(explanation)
