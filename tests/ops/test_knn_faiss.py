import dataclasses
import importlib
import sys

import pytest
import torch

from elips_torch import FlatIndex, explain, faiss_stats, knn
from elips_torch.core.errors import ImplementationError, NonFiniteError
from elips_torch.core.hardware import device_facts
from elips_torch.core.native import native_reasons
from elips_torch.kernels.search_native import library_compiles
from elips_torch.reference.knn import knn as reference

# The function has the name of its module.
knn_module = importlib.import_module("elips_torch.ops.knn")
METRICS = ["l2", "ip", "cosine", "l1", "linf", "lp"]


def data(n_rows=300, n_queries=7, dim=24):
    generator = torch.Generator().manual_seed(0)
    queries, database = (torch.rand(n, dim, generator=generator) for n in (n_queries, n_rows))
    mask = torch.rand(n_queries, n_rows, generator=generator) < 0.02
    return queries, database, mask, torch.randint(-1, n_rows, (n_queries, 4), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("metric", METRICS)
def test_candidates_are_scored_and_ordered_by_the_definition(metric, dtype):
    queries, database, mask, exclude = data()
    database = database.to(dtype)
    p = 3.0 if metric == "lp" else None
    for selection in ({}, {"mask": mask}, {"mask": mask[0]}, {"exclude": exclude}):
        for k in (1, 400):
            expected = reference(queries, database, k, metric, p, **selection)
            found = knn(queries, database, k, metric=metric, p=p, implementation="faiss", **selection)
            assert torch.equal(found.ids, expected.ids)
            assert torch.equal(found.scores, expected.scores)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_a_small_workspace_cuts_rows_and_queries(metric):
    queries, database, _, _ = data(n_rows=5000, dim=64)
    expected = reference(queries, database, 30, metric)
    found = knn(queries, database, 30, metric=metric, workspace_bytes=2**20, implementation="faiss")
    assert torch.equal(found.ids, expected.ids)
    strided = knn(queries, database.T.contiguous().T, 30, metric=metric, implementation="faiss")
    assert torch.equal(strided.scores, expected.scores)


def test_an_index_keeps_its_ids_and_its_ties():
    queries, database, _, _ = data()
    ids = torch.randperm(600, generator=torch.Generator().manual_seed(1))
    index = FlatIndex(24, screen="int8")
    index.add(torch.cat((database, database)), ids)
    mask = torch.arange(600) % 3 > 0
    # Room for both of each pair: which of two equal rows faiss takes is its own affair.
    expected, found = (
        index.search(queries, 600, mask=mask, implementation=name) for name in ("eager", "faiss")
    )
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.scores, expected.scores)


def test_gradients_flow_through_the_scores():
    queries, database, _, _ = data()
    gradients = []
    for name in ("eager", "faiss"):
        leaf = queries.clone().requires_grad_()
        knn(leaf, database, 5, implementation=name).scores.sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_it_is_never_chosen_and_says_what_it_cannot(monkeypatch):
    queries, database, _, _ = data()
    explanation = explain(queries, database, 5)
    assert explanation.chosen != "faiss"
    assert "proves nothing" in explanation.reasons["faiss"][0]
    with pytest.raises(ImplementationError, match="no float64 vectors"):
        knn(queries.double(), database, 5, implementation="faiss")
    for metric in ("canberra", "braycurtis", "jensenshannon", "gower"):
        with pytest.raises(ImplementationError, match=f"not '{metric}'"):
            knn(queries, database, 5, metric=metric, implementation="faiss")
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImplementationError, match="faiss is not installed"):
        knn(queries, database, 5, implementation="faiss")


def test_no_row_and_no_query():
    queries, database, _, _ = data()
    assert knn(queries, database[:0], 3, implementation="faiss").ids.unique().tolist() == [-1]
    assert knn(queries[:0], database, 3, implementation="faiss").ids.shape == (0, 3)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_on_a_gpu(metric):
    queries, database, mask, _ = (each.cuda() for each in data())
    for selection in ({}, {"mask": mask}):
        expected = reference(
            queries.cpu(), database.cpu(), 9, metric, **{k: v.cpu() for k, v in selection.items()}
        )
        found = knn(queries, database, 9, metric=metric, implementation="faiss", **selection)
        assert (found.ids.cpu() == expected.ids).float().mean() > 0.99


def test_it_is_counted_among_what_faiss_searched():
    queries, database, mask, _ = data()
    before = faiss_stats()
    # Masks make it ask faiss several times: one search all the same.
    scores, rows = knn(queries, database, 5, mask=mask, implementation="faiss")
    after = faiss_stats()
    assert (after.searches - before.searches, after.queries - before.queries) == (1, 7)
    assert after.bytes - before.bytes == queries.nbytes + scores.nbytes + rows.nbytes
    knn(queries, database, 5, implementation="eager")
    assert faiss_stats() == after


def test_what_faiss_cannot_rank_is_found_the_long_way():
    queries, database, _, _ = data()
    database[8:] = torch.nan
    expected = reference(queries, database[:8], 8, "l2", None)
    found = knn(queries, database, 20, implementation="faiss")
    assert torch.equal(found.ids[:, :8], expected.ids)
    assert torch.equal(found.scores[:, :8], expected.scores)


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_near_ties_are_ordered_by_the_definition(metric):
    # Far from the origin faiss's float32 products cannot tell these rows apart.
    generator = torch.Generator().manual_seed(0)
    database = 300 + torch.rand(40, 24, generator=generator) / 100
    queries = 300 + torch.rand(9, 24, generator=generator) / 100
    expected = reference(queries, database, 40, metric, None)
    found = knn(queries, database, 40, metric=metric, implementation="faiss")
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.scores, expected.scores)


@pytest.fixture
def ways(monkeypatch):
    """List which way each call went."""
    taken = []

    def spy(module, name):
        function = getattr(module, name)

        def run(*args, **kwargs):
            found = function(*args, **kwargs)
            taken.append("long" if name == "knn_faiss" else "refused" if found is None else "direct")
            return found

        return run

    monkeypatch.setattr(knn_module, "search_directly", spy(knn_module, "search_directly"))
    long = dataclasses.replace(
        next(each for each in knn_module.IMPLEMENTATIONS if each.name == "faiss"),
        run=spy(knn_module, "knn_faiss"),
    )
    known = tuple(long if each.name == "faiss" else each for each in knn_module.IMPLEMENTATIONS)
    monkeypatch.setattr(knn_module, "IMPLEMENTATIONS", known)
    return taken


@pytest.mark.skipif(bool(native_reasons(device_facts("cpu"))), reason="there is no C++ code here")
@pytest.mark.parametrize("metric", METRICS)
def test_plain_tensors_go_directly_and_everything_else_the_long_way(metric, ways):
    assert library_compiles()
    queries, database, mask, exclude = data()
    p = {"metric": metric, "p": 3.0 if metric == "lp" else None}
    expected = reference(queries, database, 9, **p)

    def found(queries=queries, database=database, **more):
        return knn(queries, database, 9, implementation="faiss", **p, **more)

    found()
    direct = ["refused", "long"] if metric == "cosine" else ["direct"]
    assert ways == direct
    long_ways = [
        found(queries, database.T.contiguous().T),
        found(queries, database.bfloat16()),
        found(mask=mask),
        found(exclude=exclude),
    ]
    assert ways == [*direct, *["refused", "long"] * 2, "long", "long"]
    assert all(len(each.ids) == 7 for each in long_ways)
    ways.clear()
    strided = torch.stack([queries] * 2, 2)[..., 0]
    for each in (found(), found(queries.clone().requires_grad_()), found(strided)):
        assert torch.equal(each.ids, expected.ids)
        assert torch.equal(each.scores, expected.scores)
    assert torch.equal(found(queries[0]).ids, expected.ids[0])
    halves = reference(queries.half(), database, 9, **p)
    assert torch.equal(found(queries.half()).scores, halves.scores)
    assert ways == 5 * direct


@pytest.mark.parametrize("metric", METRICS)
def test_where_there_is_no_cpp_torch_ranks(metric, ways, monkeypatch):
    monkeypatch.setattr("elips_torch.ops.knn_faiss.prepare_ranking", lambda *arguments: None)
    queries, database, _, _ = data()
    p = {"metric": metric, "p": 3.0 if metric == "lp" else None}
    expected = reference(queries, database, 9, **p)
    found = knn(queries, database, 9, implementation="faiss", **p)
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.scores, expected.scores)
    assert ways == (["refused", "long"] if metric == "cosine" else ["direct"])
    ways.clear()
    database[20:] = torch.nan
    found = knn(queries, database, 30, implementation="faiss", **p)
    assert torch.equal(found.ids[:, :20].sort(1).values, torch.arange(20).expand(7, 20))
    assert ways == ["refused", "long"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("metric", METRICS)
def test_queries_that_are_not_finite_are_refused(metric, value):
    queries, database, _, _ = data()
    queries[4, 3] = value
    with pytest.raises(NonFiniteError, match="row 4"):
        knn(queries, database, 5, metric=metric, p=3.0 if metric == "lp" else None, implementation="faiss")
    index = FlatIndex(24, metric, p=3.0 if metric == "lp" else None)
    index.add(database)
    with pytest.raises(NonFiniteError, match="row 4"):
        index.search(queries, 5, implementation="faiss")


def test_a_direct_search_is_counted_once():
    queries, database, _, _ = data()
    knn(queries, database, 5, implementation="faiss")
    before = faiss_stats()
    scores, rows = knn(queries, database, 5, implementation="faiss")
    after = faiss_stats()
    assert (after.searches - before.searches, after.queries - before.queries) == (1, 7)
    assert after.bytes - before.bytes == queries.nbytes + scores.nbytes + rows.nbytes


@pytest.mark.parametrize(("metric", "dtype"), [("l2", torch.float16), ("cosine", torch.float32)], ids=str)
def test_each_block_is_asked_until_it_has_given_enough(metric, dtype):
    # Blocks of some 80 rows: of those that faiss names first in one, most may be hidden.
    generator = torch.Generator().manual_seed(0)
    queries, database = (torch.randn(n, 129, generator=generator) for n in (60, 300))
    database = database.to(dtype)
    mask = torch.rand(60, 300, generator=generator) < 0.3
    exclude = knn(queries, database, 30, metric=metric).ids
    for selection in ({"mask": mask}, {"mask": mask[0]}, {"exclude": exclude}):
        expected = reference(queries, database, 10, metric, None, **selection)
        found = knn(
            queries, database, 10, metric=metric, workspace_bytes=2**20, implementation="faiss", **selection
        )
        assert torch.equal(found.ids, expected.ids)
        assert torch.equal(found.scores, expected.scores)


def test_more_than_the_workspace_holds_goes_the_long_way(ways):
    queries, database, _, _ = data(n_queries=200)
    knn(queries, database, 100, workspace_bytes=2**20, implementation="faiss")
    knn(queries[:20], database, 100, workspace_bytes=2**20, implementation="faiss")
    assert ways == ["refused", "long", "direct"]
