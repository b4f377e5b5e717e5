"""Terms that are made for one call, where that repays and there is room for them."""

import pytest
import torch

from elips_torch import explain, knn
from elips_torch.core.hardware import device_facts
from elips_torch.core.metric import resolve_metric
from elips_torch.core.native import native_reasons
from elips_torch.kernels import knn_native
from elips_torch.kernels.made_terms import with_terms
from elips_torch.kernels.plane import make_plane
from elips_torch.kernels.search_native import library_compiles
from elips_torch.reference.knn import knn as reference


def made(metric, n_queries=20, n=5000, dtype=torch.float32, k=10, workspace_bytes=2**24, plane=None):
    database = torch.randn(n, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    return with_terms(n_queries, database, k, resolve_metric(metric), plane, workspace_bytes)


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_they_are_made_where_they_repay_and_fit(metric):
    plane, rest = made(metric)
    assert plane.kind == "fp32"
    assert rest == 2**24 - 16 * 5000
    assert made(metric, k=None)[0].kind == "fp32"
    nothing = [
        made(metric, dtype=torch.float16),
        made(metric, k=2000),
        made(metric, workspace_bytes=2**23),
        made(metric, n=140_000),
    ]
    assert all(plane is None for plane, _ in nothing)
    assert [rest for _, rest in nothing] == [2**24, 2**24, 2**23, 2**24]


def test_few_queries_are_compared_by_distances_under_l2():
    assert made("l2", n_queries=1)[0] is None
    assert made("cosine", n_queries=1)[0] is not None
    assert made("ip", n_queries=1)[0] is not None
    assert made("l1")[0] is None


def test_a_plane_that_is_there_stays():
    database = torch.randn(5000, 8, generator=torch.Generator().manual_seed(0))
    plane = make_plane(resolve_metric("ip"), database, "int8")
    assert made("ip", plane=plane) == (plane, 2**24)


@pytest.mark.skipif(bool(native_reasons(device_facts("cpu"))), reason="there is no C++ code here")
@pytest.mark.parametrize("n_queries", [1, 9, 40])
@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_plain_tensors_are_searched_in_cpp(metric, n_queries, monkeypatch):
    assert library_compiles()
    generator = torch.Generator().manual_seed(1)
    queries, database = (torch.randn(n, 24, generator=generator) for n in (n_queries, 700))
    database[100:200], database[5] = database[:100].clone(), 0.0
    certified = []
    run = knn_native.NativeSearch.run

    def spy(self, *arguments):
        found = run(self, *arguments)
        certified.append(int(found[2].sum()))
        return found

    monkeypatch.setattr(knn_native.NativeSearch, "run", spy)
    expected = reference(queries, database, 7, metric, None)
    found = knn(queries, database, 7, metric=metric)
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.scores, expected.scores)
    # Few queries under "cosine" are searched in torch.
    assert certified == ([] if metric == "cosine" and n_queries < 16 else [n_queries])


@pytest.mark.skipif(bool(native_reasons(device_facts("cpu"))), reason="there is no C++ code here")
def test_the_automatic_choice_searches_few_queries_under_cosine_in_torch(monkeypatch):
    monkeypatch.setattr("elips_torch.ops.knn.library_is_ready", lambda device: True)
    database = torch.randn(700, 24, generator=torch.Generator().manual_seed(1))
    for operation in ("knn", "range_search"):
        for n_queries, chosen in ((1, "eager"), (15, "eager"), (16, "native")):
            k = 5 if operation == "knn" else None
            facts = explain(database[:n_queries], database, k, operation=operation, metric="cosine")
            assert facts.chosen == chosen
    found = knn(database[:3], database, 5, metric="cosine", implementation="native")
    expected = reference(database[:3], database, 5, "cosine", None)
    assert torch.equal(found.ids, expected.ids)
