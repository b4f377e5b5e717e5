"""Vectors that `FlatIndex` keeps for faiss: made once, and never stale."""

import copy
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from elips_torch import FlatIndex
from elips_torch.core.errors import ImplementationError, NonFiniteError
from elips_torch.indexes import flat_mirror
from elips_torch.indexes.flat_mirror import vectors_for_faiss
from elips_torch.reference.knn import knn as reference

CASES = [
    ("cosine", torch.float32),
    ("cosine", torch.float16),
    ("l2", torch.float16),
    ("ip", torch.bfloat16),
    ("l1", torch.bfloat16),
    ("linf", torch.float16),
]


@pytest.fixture
def made(monkeypatch):
    """List how many rows each mirror was made of."""
    seen = []
    convert = flat_mirror._converted

    def spy(vectors, *rest):
        seen.append(len(vectors))
        return convert(vectors, *rest)

    monkeypatch.setattr(flat_mirror, "_converted", spy)
    return seen


def data(n=300, dim=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(7, dim, generator=generator), torch.randn(n, dim, generator=generator)


def filled(metric="cosine", dtype=torch.float32, **more):
    index = FlatIndex(24, metric, dtype=dtype, **more)
    index.add(data()[1])
    return index


def assert_right(index, queries, **selection):
    expected = reference(queries, index.vectors.detach(), 9, index.metric, None, **selection)
    found = index.search(queries, 9, implementation="faiss", **selection)
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.scores, expected.scores)


@pytest.mark.parametrize(("metric", "dtype"), CASES, ids=str)
def test_it_is_made_once_and_serves_every_search(metric, dtype, made):
    index, (queries, _) = filled(metric, dtype), data(seed=1)
    mask = torch.rand(7, 300, generator=torch.Generator().manual_seed(2)) < 0.2
    for selection in ({}, {"mask": mask}, {"mask": mask[0]}, {}):
        assert_right(index, queries, **selection)
        assert_right(index, queries.half(), **selection)
    assert_right(index, queries[:1])
    index.search(queries, 9)
    assert made == [300]


@pytest.mark.parametrize("metric", ["l2", "ip", "l1"])
def test_vectors_that_faiss_takes_as_they_are_are_not_copied(metric, made):
    assert_right(filled(metric), data(seed=1)[0])
    assert made == []


CHANGES = {
    "add": lambda index: index.add(data(seed=3)[1][:40]),
    "remove": lambda index: index.remove(torch.arange(0, 300, 3)),
    "upsert": lambda index: index.upsert(data(seed=3)[1][:9], torch.arange(9)),
    "write": lambda index: index.vectors.mul_(torch.linspace(-1, 1, 24)),
    "load": lambda index: index.load_state_dict(filled().state_dict() | {"vectors": data(seed=3)[1]}),
    "cast": lambda index: index.half(),
    "reset": lambda index: (index.reset(), index.add(data(seed=3)[1])),
}


@pytest.mark.parametrize("name", CHANGES)
def test_it_follows_every_change(name, made):
    index, (queries, _) = filled(), data(seed=1)
    assert_right(index, queries)
    CHANGES[name](index)
    ids = index.ids.clone()
    expected = reference(queries, index.vectors, 9, "cosine", None)
    found = index.search(queries, 9, implementation="faiss")
    assert torch.equal(found.ids, ids[expected.ids])
    assert torch.equal(found.scores, expected.scores)
    assert len(made) == 2


def test_nothing_takes_it_along_and_it_goes_with_its_index():
    index, (queries, _) = filled(), data(seed=1)
    index.search(queries, 9, implementation="faiss")
    gc.collect()
    before = len(flat_mirror._mirrors)
    size = len(pickle.dumps(index))
    other = pickle.loads(pickle.dumps(index))
    copied = copy.deepcopy(index)
    assert len(flat_mirror._mirrors) == before
    assert size == len(pickle.dumps(filled()))
    for each in (other, copied):
        assert_right(each, queries)
    assert len(flat_mirror._mirrors) == before + 2
    del index, other, copied, each
    gc.collect()
    assert len(flat_mirror._mirrors) == before - 1


def test_what_nobody_can_follow_is_converted_for_each_call(made):
    queries, vectors = data(seed=1)
    learnable = filled(learnable=True)
    optimiser = torch.optim.SGD(learnable.parameters(), lr=0.5, fused=True)
    assert_right(learnable, queries)
    learnable.search(queries, 9).scores.sum().backward()
    optimiser.step()
    assert_right(learnable, queries)
    assert made == []
    for refused in (
        FlatIndex(24, "cosine", dtype=torch.float64),
        FlatIndex(24, "canberra", dtype=torch.float16),
    ):
        refused.add(vectors.abs())
        with pytest.raises(ImplementationError):
            refused.search(queries.abs(), 9, implementation="faiss")
    assert made == []


def test_writes_in_inference_mode_are_followed(made):
    queries, _ = data(seed=1)
    with torch.inference_mode():
        index = filled()
        assert_right(index, queries)
        index.vectors.mul_(torch.linspace(-1, 1, 24))
        assert_right(index, queries)
    assert made == [300, 300]


def test_it_is_made_within_the_workspace(monkeypatch):
    queries, vectors = data(n=20_000)
    index = FlatIndex(24, "cosine", workspace_bytes=2**20)
    index.add(vectors * torch.logspace(-12, 12, 20_000)[:, None])
    index.vectors[5] = 0.0
    blocks = []
    convert = flat_mirror.prepared
    monkeypatch.setattr(
        flat_mirror, "prepared", lambda part, *rest: blocks.append(len(part)) or convert(part, *rest)
    )
    kept = vectors_for_faiss(index, index.vectors, index._metric, 2**20, make=True)
    assert sum(blocks) == 20_000
    assert max(blocks) * 24 * flat_mirror.CONVERTED_BYTES <= 2**20
    norms = kept.double().norm(dim=1)
    assert norms[5] == 0.0
    torch.testing.assert_close(norms.sum(), torch.tensor(19_999.0, dtype=torch.float64), atol=1e-3, rtol=0)
    assert_right(index, queries)


@pytest.mark.parametrize("error", [MemoryError, RuntimeError])
def test_where_there_is_no_memory_for_it_searches_convert_part_by_part(error, monkeypatch):
    tried = []

    def fail(*arguments):
        tried.append(1)
        raise error("no memory")

    monkeypatch.setattr(flat_mirror, "_converted", fail)
    index, (queries, _) = filled(), data(seed=1)
    mask = torch.arange(300) % 3 > 0
    for selection in ({}, {"mask": mask}):
        assert_right(index, queries, **selection)
    assert tried == [1]
    index.remove(torch.arange(5))
    expected = reference(queries, index.vectors, 9, "cosine", None)
    assert torch.equal(index.search(queries, 9, implementation="faiss").ids, expected.ids + 5)
    assert tried == [1, 1]


@pytest.mark.parametrize(
    ("queries", "error"),
    [(torch.randn(2, 24).double(), ImplementationError), (torch.full((2, 24), torch.nan), NonFiniteError)],
    ids=["float64", "NaN"],
)
def test_a_search_that_is_refused_makes_none(queries, error, made):
    index = filled()
    with pytest.raises(error):
        index.search(queries, 9, implementation="faiss")
    assert made == []


def test_threads_make_it_once(made):
    index, (queries, _) = filled(), data(seed=1)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: index.search(queries, 9, implementation="faiss"), range(16)))
    assert made == [300]
    assert all(torch.equal(each.ids, results[0].ids) for each in results)
