"""IVFFlatIndex keeps the contract of every index, and some promises of its own."""

import copy
import io
from typing import ClassVar

import faiss
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from elips_torch import (
    METRICS,
    ArgumentError,
    DtypeError,
    ElipsError,
    FlatIndex,
    IVFFlatIndex,
    NotEmptyError,
    NotFittedError,
    ParameterError,
    SearchResult,
    ShapeError,
    load_index,
)
from elips_torch.testing import IndexContract
from elips_torch.testing.contract import assert_same, unchanged


class TestAllLists(IndexContract):
    index_class = IVFFlatIndex
    options: ClassVar = {"nlist": 4, "nprobe": 4}


class TestOneList(IndexContract):
    index_class = IVFFlatIndex
    options: ClassVar = {"nlist": 5, "nprobe": 1}


class TestHalf(IndexContract):
    index_class = IVFFlatIndex
    options: ClassVar = {"nlist": 3, "nprobe": 3, "dtype": torch.float16}


def clusters(n, dim=16, centres=40, seed=0, spread=0.3):
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(centres, dim, generator=torch.Generator().manual_seed(99))
    chosen = torch.randint(0, centres, (n,), generator=generator)
    return means[chosen] + spread * torch.randn(n, dim, generator=generator)


def made(n=2000, nlist=20, metric="l2", dim=16, spread=0.3, **options):
    vectors = clusters(n, dim, spread=spread)
    if metric in ("jensenshannon", "gower"):
        vectors = vectors.sigmoid()
    index = IVFFlatIndex(dim, nlist, metric, **options).fit(vectors)
    index.add(vectors)
    return index, vectors


def recall(found, wanted):
    return float((found[:, :, None] == wanted[:, None, :]).any(2).double().mean())


@pytest.mark.parametrize("metric", [metric.name for metric in METRICS])
def test_with_all_lists_results_are_those_of_exact_search(metric):
    p = 3.0 if metric == "lp" else None
    index, vectors = made(1500, metric=metric, p=p, nprobe=20)
    flat = FlatIndex(16, metric, p=p)
    flat.add(vectors)
    for n_queries in (1, 40):
        queries = vectors[:n_queries] * 0.9
        for k in (1, 10, 100):
            assert_same(index(queries, k), flat(queries, k))


@pytest.mark.parametrize("metric", [metric.name for metric in METRICS])
def test_few_lists_find_most_neighbours_under_every_metric(metric):
    p = 3.0 if metric == "lp" else None
    index, vectors = made(metric=metric, p=p, nprobe=8, spread=1.0)
    queries = vectors[:50] * 0.9
    wanted = index(queries, nprobe=20).ids
    assert recall(index(queries).ids, wanted) > 0.85
    assert recall(index(queries, nprobe=1).ids, wanted) < recall(index(queries).ids, wanted)


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_recall_is_that_of_faiss(metric):
    vectors, queries = clusters(20_000, 32, 300, spread=0.8), clusters(1000, 32, 300, seed=1, spread=0.8)
    kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    flat = FlatIndex(32, metric)
    flat.add(vectors)
    wanted = flat(queries, 10).ids
    quantizer = faiss.IndexFlat(32, kind)
    theirs = faiss.IndexIVFFlat(quantizer, 32, 100, kind)
    theirs.train(vectors.numpy())
    theirs.add(vectors.numpy())
    ours = IVFFlatIndex(32, 100, metric).fit(vectors)
    ours.add(vectors)
    for nprobe in (1, 4, 16):
        theirs.nprobe = nprobe
        reached = recall(torch.from_numpy(theirs.search(queries.numpy(), 10)[1]), wanted)
        assert recall(ours(queries, 10, nprobe=nprobe).ids, wanted) > reached - 0.01


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_with_the_centroids_of_faiss_results_are_those_of_faiss(metric):
    vectors, queries = clusters(5000), clusters(60, seed=1)
    kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    quantizer = faiss.IndexFlat(16, kind)
    theirs = faiss.IndexIVFFlat(quantizer, 16, 50, kind)
    theirs.train(vectors.numpy())
    theirs.add(vectors.numpy())
    coarse = FlatIndex(16, metric)
    coarse.add(torch.as_tensor(quantizer.reconstruct_n(0, 50)))
    ours = IVFFlatIndex(16, 50, metric, coarse=coarse)
    ours.add(vectors)
    assert ours.is_trained
    sizes = [theirs.invlists.list_size(number) for number in range(50)]
    # Vectors between two centroids may fall to either side of rounding.
    assert (ours.list_sizes() - torch.tensor(sizes)).abs().sum() <= 4
    assert ours.imbalance_factor() == pytest.approx(theirs.invlists.imbalance_factor(), rel=1e-3)
    theirs.nprobe = 4
    scores, ids = theirs.search(queries.numpy(), 10)
    found = ours(queries, 10, nprobe=4)
    assert recall(found.ids, torch.from_numpy(ids)) > 0.995
    torch.testing.assert_close(found.scores.mean(), torch.from_numpy(scores).mean(), rtol=1e-4, atol=1e-4)


def test_removing_half_and_adding_it_back_leaves_recall_unchanged():
    index, vectors = made(nprobe=3)
    queries = clusters(100, seed=1)
    before = index(queries, 10)
    gone = torch.randperm(2000, generator=torch.Generator().manual_seed(2))[:1000]
    assert index.remove(gone) == 1000
    assert not torch.isin(index(queries, 10).ids, gone).any()
    index.add(vectors[gone], ids=gone)
    assert_same(index(queries, 10), before)


def test_upsert_moves_vectors_to_other_lists():
    index, vectors = made(nprobe=1)
    moved = torch.arange(0, 2000, 7)
    index.upsert(-vectors[moved], moved)
    fresh = IVFFlatIndex(16, 20, coarse=copy.deepcopy(index.coarse), nprobe=1)
    fresh.add(vectors.index_copy(0, moved, -vectors[moved]))
    assert torch.equal(index.list_sizes(), fresh.list_sizes())
    queries = torch.cat([clusters(50, seed=1), -clusters(50, seed=2)])
    assert_same(index(queries), fresh(queries))
    assert index(-vectors[moved], k=1).ids[:, 0].tolist() == moved.tolist()


def test_adding_in_batches_is_adding_at_once():
    index, vectors = made(nprobe=3)
    other = IVFFlatIndex(16, 20, coarse=copy.deepcopy(index.coarse), nprobe=3)
    for part in vectors.split(37):
        other.add(part)
        other(part[:1])
    queries = clusters(50, seed=1)
    assert_same(other(queries), index(queries))


class InListOrder(IVFFlatIndex):
    """Keeps a copy of its vectors in the order of the lists."""

    def _attach(self):
        super()._attach()
        self.payload = torch.empty(0, 16)

    def _slots_changed(self, change):
        super()._slots_changed(change)
        self.payload = change.carry(self.payload)
        self.payload[change.filled] = self.vectors[self._lists.slots[change.filled]]


COARSE = FlatIndex(16)
COARSE.add(clusters(8, spread=1.0))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(["add", "remove", "upsert"]), st.integers(1, 60)), max_size=10))
def test_any_sequence_of_changes_keeps_results_exact_and_payload_in_place(steps):
    coarse = copy.deepcopy(COARSE)
    index, flat = InListOrder(16, 8, coarse=coarse, nprobe=8, screen="int8"), FlatIndex(16)
    for number, (verb, size) in enumerate(steps):
        vectors = clusters(size, seed=number, spread=1.0)
        order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(number))
        some = flat.ids[order[:size]]
        for each in (index, flat):
            if verb == "add":
                each.add(vectors)
            elif verb == "remove":
                each.remove(some)
            else:
                each.upsert(vectors, torch.cat([some, 10**6 * (number + 1) + torch.arange(size)])[:size])
        queries = clusters(3, seed=100 + number)
        assert_same(index(queries, 7), flat(queries, 7))
        assert torch.equal(index.payload[index.lists.places], index.vectors)
        assert_bounded(index)


def assert_bounded(index):
    """The plane is that of the rows, in the order of the lists."""
    decode = index._decoder()
    if not index.ntotal:
        return
    assert decode.in_slots
    places, vectors, plane = index.lists.places, index.vectors.double(), decode.plane
    assert plane.codes.dtype == torch.int8
    assert plane.codes.shape[0] == plane.terms.shape[0] == index.lists.capacity
    assert bool(plane.terms.isfinite().all())
    scales, residuals, norms, _ = plane.terms[places].double().unbind(1)
    centred = vectors - plane.mean.double()
    lost = torch.linalg.vector_norm(centred - scales[:, None] * plane.codes[places].double(), dim=1)
    assert bool((lost <= residuals).all())
    assert bool((residuals <= 0.1 * norms.max() + 1e-9).all())
    assert bool((torch.linalg.vector_norm(centred, dim=1) <= norms).all())


def test_the_plane_follows_the_lists_without_being_made_anew(monkeypatch):
    index, vectors = made(screen="int8")
    index(vectors[:3])
    assert_bounded(index)
    monkeypatch.setattr(index.plane, "_make", lambda vectors: pytest.fail("the plane is made anew"))
    index.add(clusters(300, seed=5))
    assert_bounded(index)
    index.remove(index.ids[::3])
    assert_bounded(index)
    index.upsert(clusters(10, seed=6), index.ids[:10])
    assert_bounded(index)
    flat = FlatIndex(16)
    flat.add(index.vectors, index.ids)
    assert_same(index.search(vectors[:30], 9, nprobe=index.nlist), flat(vectors[:30], 9))


def test_a_plane_in_lists_is_made_anew_where_these_are(monkeypatch):
    index, vectors = made(screen="int8")
    index(vectors[:3])
    for change in (copy.deepcopy, lambda each: each.double().float(), lambda each: each.share_memory()):
        index = change(index)
        assert_bounded(index)
    index.assignments.add_(0)
    assert_bounded(index)
    index.vectors.mul_(2.0)
    assert_bounded(index)
    state = index.state_dict()
    index.reset()
    assert_bounded(index)
    index.add(vectors[:100])
    index.load_state_dict(state)
    assert_bounded(index)


@pytest.mark.parametrize("n_queries", [1, 30])
def test_queries_that_find_too_few_read_on(n_queries):
    index, _ = made(nprobe=1)
    queries = clusters(n_queries, seed=1)
    generator = torch.Generator().manual_seed(3)
    # Most of the rows near a query are hidden, and some queries may see five rows in all.
    mask = torch.rand(n_queries, 2000, generator=generator) < 0.01
    mask[0] = torch.arange(2000) >= 1995
    found = index(queries, 20, mask=mask)
    assert ((found.ids >= 0).sum(1) == mask.sum(1).clamp_max(20)).all()
    assert mask.gather(1, found.ids.clamp_min(0))[found.ids >= 0].all()
    steps = found.scores.diff(dim=1)
    assert (steps[steps.isfinite()] >= 0).all()
    whole = index(queries, 20, mask=mask, nprobe=20)
    # Read on, not read all: nearest lists first.
    assert recall(found.ids[1:], whole.ids[1:]) > 0.3 or n_queries == 1
    exclude = index(queries, 150).ids
    again = index(queries, 150, exclude=exclude)
    assert (again.ids >= 0).all()
    assert not (again.ids[:, :, None] == exclude[:, None, :]).any()
    assert (index(queries, 2000).ids.sort().values == torch.arange(2000)).all()


def test_reading_on_gives_what_reading_so_many_lists_gives():
    index, _ = made(nprobe=1)
    queries = clusters(30, seed=1)
    few = index(queries, 300)
    for query in range(30):
        sizes = index.list_sizes()[index.coarse(queries[query], 20).ids]
        read = next(n for n in (1, 2, 4, 8, 16, 20) if sizes[:n].sum() >= 300)
        assert_same(index(queries[query], 300, nprobe=read), SearchResult(few.scores[query], few.ids[query]))


def test_the_queries_that_read_on_change_no_other(monkeypatch):
    index, _ = made(nprobe=2)
    queries = clusters(30, seed=1)
    mask = torch.ones(30, 2000, dtype=torch.bool)
    mask[::3, 20:] = False
    found = index(queries, mask=mask)
    others = torch.arange(30) % 3 > 0
    assert_same(
        SearchResult(found.scores[others], found.ids[others]), index(queries[others], mask=mask[others])
    )


@pytest.mark.parametrize("nprobe", [2, 19, 20])
def test_queries_in_blocks_find_the_same(nprobe):
    index, _ = made(nprobe=nprobe, workspace_bytes=2**28)
    queries = clusters(1800, seed=1)
    mask = torch.rand(1800, 2000, generator=torch.Generator().manual_seed(2)) < 0.2
    exclude = torch.randint(0, 2000, (1800, 3), generator=torch.Generator().manual_seed(3))
    for k in (5, 150):
        options = {"k": k, "mask": mask, "exclude": exclude}
        assert_same(index(queries, workspace_bytes=2**20, **options), index(queries, **options))
    small = index.range_search(queries, 3.0, mask=mask, workspace_bytes=2**20)
    for one, other in zip(small, index.range_search(queries, 3.0, mask=mask), strict=True):
        assert torch.equal(one, other)


def test_exclude_self_builds_the_graph_of_neighbours():
    index, vectors = made(800, nprobe=20)
    scores, ids = index(vectors, 5, exclude_self=True)
    flat = FlatIndex(16)
    flat.add(vectors)
    assert_same(SearchResult(scores, ids), flat(vectors, 5, exclude_self=True))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_a_fitted_state_loads_into_an_unfitted_index(nested, assign):
    index, vectors = made(nprobe=3)
    index.nprobe = 6
    other = IVFFlatIndex(16, 20)
    if nested:
        file = io.BytesIO()
        torch.save(nn.Sequential(nn.Linear(2, 2), index).state_dict(), file)
        file.seek(0)
        model = nn.Sequential(nn.Linear(2, 2), other)
        model.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    else:
        other.load_state_dict(index.state_dict(), assign=assign)
    assert other.is_trained
    assert other.nprobe == 6
    queries = clusters(20, seed=1)
    assert_same(other(queries), index(queries))
    other.add(vectors[:100] + 1)
    index.add(vectors[:100] + 1)
    assert torch.equal(other.list_sizes(), index.list_sizes())
    assert_same(other(queries), index(queries))


def test_states_that_do_not_fit_change_nothing():
    index, _ = made(200, nlist=4)
    other, _ = made(160, nlist=4, spread=1.0)
    state = index.state_dict()
    bad = {
        "assignments": [
            (torch.full((200,), 4, dtype=torch.int32), "got 4 to 4, expected 0 <= list < 4"),
            (torch.zeros(199, dtype=torch.int32), "differ in length"),
            (torch.zeros(200), "dtype"),
        ],
        "nprobe": [(torch.tensor([1, 2]), "expected one number")],
        "coarse.vectors": [(torch.rand(3, 16), "differ in length")],
    }
    for name, values in bad.items():
        for value, message in values:
            with unchanged(other), pytest.raises(RuntimeError, match=message):
                other.load_state_dict({**state, name: value})
    rows_only = {name: tensor for name, tensor in state.items() if not name.startswith("coarse")}
    with unchanged(other), pytest.raises(RuntimeError, match="without their centroids"):
        other.load_state_dict(rows_only)
    smaller = IVFFlatIndex(16, 3)
    with unchanged(smaller), pytest.raises(RuntimeError, match="expected 3"):
        smaller.load_state_dict(state)


def test_part_of_a_state_keeps_rows_and_centroids_together():
    class Labelled(IVFFlatIndex):
        def __init__(self):
            super().__init__(16, 4)
            self.register_buffer("labels", torch.zeros(3))

    index, vectors = made(200, nlist=4)
    # Where a buffer is missing, neither rows nor centroids load.
    other = Labelled().fit(-vectors)
    other.add(-vectors[:50])
    with unchanged(other):
        assert other.load_state_dict(index.state_dict(), strict=False).missing_keys == ["labels"]
    # Centroids alone go to an empty index, and leave one with rows alone.
    learned = {name: tensor for name, tensor in index.state_dict().items() if name.startswith("coarse")}
    empty = IVFFlatIndex(16, 4)
    empty.load_state_dict(learned, strict=False)
    assert torch.equal(empty.centroids, index.centroids)
    filled, _ = made(200, nlist=4, spread=1.0)
    with unchanged(filled):
        assert "ids" in filled.load_state_dict(learned, strict=False).missing_keys


def test_an_unfitted_index_refuses_what_needs_centroids():
    index = IVFFlatIndex(16, 20)
    vectors = clusters(50)
    for verb in (
        lambda: index.add(vectors),
        lambda: index.upsert(vectors, range(50)),
        lambda: index(vectors),
        lambda: index.range_search(vectors, 1.0),
        lambda: index.centroids,
    ):
        with pytest.raises(NotFittedError, match="fit"):
            verb()
    assert not index.is_trained
    assert "not fitted" in repr(index)
    state = index.state_dict()
    fitted, _ = made()
    fitted.load_state_dict(state)
    assert not fitted.is_trained


def test_training_vectors_are_counted():
    with pytest.raises(ArgumentError, match="19 rows, expected at least nlist = 20"):
        IVFFlatIndex(16, 20).fit(clusters(19))
    with pytest.warns(UserWarning, match="500 rows to fit 20 lists on, expected 780"):
        assert IVFFlatIndex(16, 20).fit(clusters(500)).is_trained


def test_fitting_again_takes_an_empty_index():
    index, vectors = made()
    with unchanged(index), pytest.raises(NotEmptyError, match=r"holds 2000 vectors .* reset\(\)"):
        index.fit(vectors)
    index.reset()
    before = index.centroids.clone()
    index.fit(vectors + 5).add(vectors + 5)
    assert not torch.equal(index.centroids, before)
    assert index(vectors[:5] + 5, k=1).scores.tolist() == [[0.0]] * 5


def test_more_probes_than_lists_are_clamped_and_said_once(caplog):
    index, vectors = made(nprobe=20)
    wanted = index(vectors[:5])
    assert not caplog.messages
    for nprobe in (21, 500):
        assert_same(index(vectors[:5], nprobe=nprobe), wanted)
    assert caplog.messages == ["nprobe is 21, there are 20 lists: all are read"]
    for bad, error in ((0, ArgumentError), (2.5, DtypeError), (True, ParameterError)):
        with pytest.raises(error, match="nprobe is"):
            index(vectors[:5], nprobe=bad)
    with pytest.raises(ArgumentError, match="nlist is 0"):
        IVFFlatIndex(16, 0)
    with pytest.raises(ArgumentError, match="nprobe is 0"):
        IVFFlatIndex(16, 4, nprobe=0)


def test_unbalanced_lists_are_said_once():
    index, vectors = made()
    index.reset()
    with pytest.warns(UserWarning, match="badly unbalanced"):
        index.add(vectors[:1].expand(3000, -1))
    assert index.imbalance_factor() == 20.0
    index.add(vectors[:1].expand(9000, -1))


def test_the_parts_of_an_index_are_shown_and_counted():
    index, _ = made(nlist=20)
    sizes = index.list_sizes()
    assert sizes.sum() == 2000
    spread = f"list_sizes={sizes.min()}..{sizes.max()}, imbalance={index.imbalance_factor():.2f}"
    assert f"nlist=20, nprobe=8, {spread}" in repr(index)
    # Vectors, ids, assignments, centroids and the plane; then slots, places and three numbers per list.
    assert index.memory_bytes() == index.memory_bytes()
    plane = sum(tensor.nbytes for tensor in index.plane.stored_tensors())
    stored = 2000 * (16 * 4 + 8 + 4) + index.coarse.memory_bytes() + plane
    lists = 8 * (index.lists.capacity + 2000 + 3 * 20)
    assert index.memory_bytes() == stored + lists
    assert lists < 2000 * 8 * 2.5


def test_explain_says_what_runs():
    index, vectors = made()
    explanation = index.explain(vectors[:3])
    assert explanation.chosen in ("native", "eager")
    assert "ivf_search of 3 x 2000 x 16 float32, l2, k=10 on cpu" in str(explanation)


def test_coarse_search_is_any_index(tmp_path):
    vectors = clusters(2000)
    with pytest.warns(UserWarning, match="40 rows to fit 4 lists"):
        index = IVFFlatIndex(16, 40, coarse=IVFFlatIndex(16, 4, nprobe=2), nprobe=40).fit(vectors)
    index.add(vectors)
    flat = FlatIndex(16)
    flat.add(vectors)
    assert_same(index(vectors[:40] * 0.9), flat(vectors[:40] * 0.9))
    assert ((index(vectors[:40], 1500, nprobe=2).ids >= 0).sum(1) == 1500).all()
    index.save(tmp_path / "index")
    loaded = load_index(tmp_path / "index")
    assert type(loaded.coarse) is IVFFlatIndex
    assert loaded.config() == index.config()
    assert_same(loaded(vectors[:40], nprobe=3), index(vectors[:40], nprobe=3))
    for coarse, error, message in (
        (FlatIndex(15), ShapeError, "coarse has dim 15"),
        (torch.rand(4, 16), DtypeError, "coarse is a Tensor"),
        (flat, ArgumentError, "coarse holds 2000 vectors"),
    ):
        with pytest.raises(error, match=message):
            IVFFlatIndex(16, 20, coarse=coarse)


def test_rows_written_behind_the_back_of_the_index_are_noticed():
    index, vectors = made(nprobe=20)
    other, _ = made(nprobe=20)
    wanted = index(vectors[:10])
    index.assignments.copy_(other.assignments.flip(0))
    assert_same(index(vectors[:10]), wanted)
    assert torch.equal(index.lists.sizes, index.list_sizes())


def test_a_cast_of_everything_spares_labels():
    index, _ = made(nprobe=20)
    assignments = index.assignments.clone()
    index.type(torch.float16)
    assert index.vectors.dtype == torch.float16
    assert torch.equal(index.assignments, assignments)
    assert index.ids.dtype == torch.int64


def test_the_index_compiles_and_grows():
    torch._dynamo.reset()
    index, _ = made(nprobe=3)
    counter = CompileCounterWithBackend("aot_eager")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.index = nn.Linear(16, 16), index

        def forward(self, inputs, mask=None):
            return self.index(self.layer(inputs), 4, nprobe=5, mask=mask)

    model = Model()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(12):
        inputs = clusters(6, seed=len(index))
        found, wanted = compiled(inputs), model(inputs)
        assert torch.equal(found.ids, wanted.ids)
        (slope,) = torch.autograd.grad(found.scores.sum(), model.layer.weight)
        (dense,) = torch.autograd.grad(wanted.scores.sum(), model.layer.weight)
        torch.testing.assert_close(slope, dense)
        index.add(clusters(50, seed=len(index) + 1))
    assert counter.frame_count <= 2
    mask = torch.rand(6, len(index)) < 0.1
    assert torch.equal(compiled(inputs, mask).ids, model(inputs, mask).ids)
    torch._dynamo.reset()


def test_an_index_on_the_meta_device_is_shown():
    index, _ = made(nlist=20)
    assert "nlist=20" in repr(index.to("meta"))


@pytest.mark.parametrize("nprobe", [0, -1, "8", 2.5, None])
def test_what_is_no_number_of_lists_is_refused_when_it_is_set(nprobe):
    index = IVFFlatIndex(8, 4, nprobe=2)
    with pytest.raises(ElipsError, match="nprobe"):
        index.nprobe = nprobe
    assert index.nprobe == 2
    with pytest.raises(AttributeError):
        index.nlist = 8
