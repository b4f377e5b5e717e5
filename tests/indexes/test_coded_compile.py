"""Indexes of codes inside a compiled model: one graph, the same numbers, no compilation at growth."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from elips_torch import PQIndex, SQIndex

pytestmark = [
    # Raised inside torch's own compiler, by Python's ast module and by typing internals.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class Retriever(nn.Module):
    def __init__(self, index):
        super().__init__()
        self.encoder = nn.Linear(16, 8)
        self.index = index

    def forward(self, inputs):
        scores, ids = self.index(self.encoder(inputs), 5)
        return torch.logsumexp(scores, 1).mean() + 0.0 * ids.sum()


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "index",
    [SQIndex(8, "int4"), PQIndex(8, 4, nbits=4, metric="cosine", niter=2, min_points_per_centroid=1)],
    ids=["SQIndex", "PQIndex"],
)
def test_a_full_graph_gives_the_same_and_growth_does_not_compile_again(index):
    torch.manual_seed(0)
    model = Retriever(index.fit(torch.randn(60, 8)))
    index.add(torch.randn(60, 8))
    inputs = torch.randn(6, 16)
    expected = model(inputs)
    expected.backward()
    gradient = model.encoder.weight.grad.clone()
    model.zero_grad()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    found = compiled(inputs)
    found.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(model.encoder.weight.grad, gradient)
    for _ in range(12):
        index.add(torch.randn(7, 8))
        torch.testing.assert_close(compiled(inputs), model(inputs))
    assert counter.frame_count <= 2
