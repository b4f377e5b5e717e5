"""An index inside a compiled model: one graph, the same numbers, the same gradients."""

import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.torch_version import TorchVersion

from elips_torch import FlatIndex

INDUCTOR = pytest.param(
    "inductor",
    marks=pytest.mark.skipif(
        shutil.which("g++") is None and shutil.which("clang++") is None,
        reason="torch's default compiler backend needs a C++ compiler",
    ),
)
pytestmark = [
    # Raised inside torch's own compiler, by Python's ast module and by typing internals.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class Retriever(nn.Module):
    """Embeds, searches, and uses the scores in a loss."""

    def __init__(self, metric="cosine", **options):
        super().__init__()
        self.encoder = nn.Linear(16, 8)
        self.index = FlatIndex(8, metric, k=5, **options)

    def forward(self, inputs):
        scores, ids = self.index(self.encoder(inputs))
        return torch.logsumexp(scores, 1).mean() + 0.0 * ids.sum()


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(metric="cosine", **options):
    torch.manual_seed(0)
    model = Retriever(metric, **options)
    model.index.add(torch.randn(40, 8))
    return model


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
@pytest.mark.parametrize("learnable", [False, True])
def test_a_full_graph_gives_the_same_numbers_and_gradients(backend, learnable):
    model, inputs = make(learnable=learnable), torch.randn(6, 16)
    expected = model(inputs)
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    found = torch.compile(model, fullgraph=True, backend=backend)(inputs)
    found.backward()
    torch.testing.assert_close(found, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name])


def test_gradients_equal_the_dense_computation():
    model, inputs = make("l2"), torch.randn(6, 16)
    torch.compile(model, fullgraph=True, backend="aot_eager")(inputs).backward()
    found = model.encoder.weight.grad.clone()
    model.zero_grad()
    embedded = model.encoder(inputs)
    dense = (embedded[:, None] - model.index.vectors[None]).square().sum(-1)
    nearest = dense.topk(5, largest=False).values
    torch.logsumexp(nearest, 1).mean().backward()
    torch.testing.assert_close(found, model.encoder.weight.grad)


@pytest.mark.parametrize("training", [True, False])
def test_growth_does_not_compile_again(training):
    model = make()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(64):
        with torch.set_grad_enabled(training):
            compiled(torch.randn(6, 16))
        model.index.add(torch.randn(3, 8))
    assert counter.frame_count <= 2
    assert len(model.index) == 40 + 64 * 3


def test_batch_sizes_compile_at_most_twice():
    model = make()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for size in (4, 5, 6, 7, 8, 9):
        torch.testing.assert_close(compiled(inputs := torch.randn(size, 16)), model(inputs))
    assert counter.frame_count <= 2


def test_masks_exclusions_and_parameters_compile():
    model = make()

    def search(inputs, mask, exclude):
        return model.index(model.encoder(inputs), 4, mask=mask, exclude=exclude, workspace_bytes=2**22)

    inputs = torch.randn(6, 16)
    mask, exclude = torch.rand(6, 40) < 0.5, torch.randint(0, 40, (6, 3))
    found = torch.compile(search, fullgraph=True, backend="aot_eager")(inputs, mask, exclude)
    expected = search(inputs, mask, exclude)
    assert torch.equal(found.ids, expected.ids)
    torch.testing.assert_close(found.scores, expected.scores)


def test_a_single_query_compiles():
    model = make()
    query = torch.randn(8)
    found = torch.compile(lambda q: model.index(q), fullgraph=True, backend="aot_eager")(query)
    assert torch.equal(found.ids, model.index(query).ids)


def test_changing_verbs_run_outside_the_graph():
    model = make()

    def step(inputs):
        embedded = model.encoder(inputs)
        model.index.add(embedded)
        return model.index(embedded).scores.sum()

    compiled = torch.compile(step, backend="aot_eager")
    for count in (46, 52, 58):
        compiled(torch.randn(6, 16)).backward()
        assert len(model.index) == count


def test_two_indexes_in_one_model():
    torch.manual_seed(0)
    first, second = FlatIndex(8), FlatIndex(8)
    first.add(torch.randn(20, 8))
    second.add(torch.randn(30, 8))

    def both(queries):
        return first(queries, 3).ids, second(queries, 3).ids

    queries = torch.randn(4, 8)
    found = torch.compile(both, fullgraph=True, backend="aot_eager")(queries)
    assert torch.equal(found[0], first(queries, 3).ids)
    assert torch.equal(found[1], second(queries, 3).ids)


def test_operator_check():
    model = make()
    index = model.index
    for keep in (False, True):
        arguments = (torch.randn(6, 8), None, None, index._handle, 5, False, "auto", "", keep, torch.float32)
        torch.library.opcheck(torch.ops.elips_torch.index_search.default, arguments)
    masked = (
        torch.randn(6, 8),
        torch.rand(40) < 0.5,
        torch.randint(0, 40, (6, 2)),
        index._handle,
        5,
        False,
        "auto",
        "workspace_bytes=4194304",
        True,
        torch.float32,
    )
    torch.library.opcheck(torch.ops.elips_torch.index_search.default, masked)


@pytest.mark.skipif(
    TorchVersion(torch.__version__) < (2, 13),
    reason="an operator whose output size depends on its data breaks the graph in older torch",
)
def test_range_search_compiles():
    model = make("l2")

    def search(inputs):
        lims, scores, ids = model.index.range_search(model.encoder(inputs), 12.0)
        return lims, scores, ids

    inputs = torch.randn(6, 16)
    expected = search(inputs)
    found = torch.compile(search, fullgraph=True, backend="aot_eager")(inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    found[1].sum().backward()
    gradient = model.encoder.weight.grad.clone()
    model.zero_grad()
    expected[1].sum().backward()
    torch.testing.assert_close(gradient, model.encoder.weight.grad)
