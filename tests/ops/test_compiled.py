import shutil
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.torch_version import TorchVersion

from elips_torch import knn, pairwise_distance, range_search


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def knn_loss(q, x):
    scores, ids = knn(torch.tanh(q), x, 5, metric="cosine")
    return (scores.softmax(-1) * (ids % 3)).sum() + scores.exp().mean()


def pairwise_loss(q, x):
    return pairwise_distance(q * 2.0, x, metric="l1").logsumexp(1).mean()


def masked_loss(q, x):
    return knn(q, x, 3, mask=x[:, 0] > 0.5, exclude=torch.zeros(len(q), 1, dtype=torch.int64)).scores.sum()


def sides(n_queries=6, n=100):
    generator = torch.Generator().manual_seed(n_queries + n)
    q, x = torch.rand(n_queries, 8, generator=generator), torch.rand(n, 8, generator=generator)
    return q.requires_grad_(), x.requires_grad_()


def assert_same_as_eager(compiled, loss, q, x):
    value, expected = compiled(q, x), loss(q, x)
    torch.testing.assert_close(value, expected)
    for got, want in zip(
        torch.autograd.grad(value, (q, x)), torch.autograd.grad(expected, (q, x)), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("loss", [knn_loss, pairwise_loss, masked_loss])
def test_a_compiled_loss_equals_the_eager_one(loss):
    assert_same_as_eager(torch.compile(loss, backend="aot_eager", fullgraph=True), loss, *sides())


@pytest.mark.parametrize("loss", [knn_loss, pairwise_loss])
def test_other_shapes_compile_at_most_once_more(loss):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for n_queries, n in [(6, 100), (7, 120), (9, 150), (12, 333), (5, 64)]:
        assert_same_as_eager(compiled, loss, *sides(n_queries, n))
    assert counter.frame_count <= 2


def test_search_compiles_without_gradients():
    def search(q, x):
        scores, ids = knn(q, x, 4)
        return scores + 1.0, ids * 2

    q, x = (each.detach() for each in sides())
    found = torch.compile(search, backend="aot_eager", fullgraph=True)(q, x)
    for got, want in zip(found, search(q, x), strict=True):
        assert torch.equal(got, want)


@pytest.mark.skipif(
    TorchVersion(torch.__version__) < (2, 13),
    reason="an operator whose output size depends on its data breaks the graph in older torch",
)
def test_range_search_compiles():
    def search(q, x):
        lims, scores, ids = range_search(q, x, 0.5)
        return lims, scores * 2.0, ids

    q, x = (each.detach() for each in sides())
    found = torch.compile(search, backend="aot_eager", fullgraph=True)(q, x)
    for got, want in zip(found, search(q, x), strict=True):
        assert torch.equal(got, want)


@pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a C++ compiler"
)
@pytest.mark.slow
def test_inductor():
    with warnings.catch_warnings():
        # The compiler itself uses what torch deprecates.
        warnings.simplefilter("ignore")
        assert_same_as_eager(torch.compile(knn_loss, fullgraph=True), knn_loss, *sides())
