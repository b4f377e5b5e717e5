"""FlatIndex keeps the contract of every index, and some promises of its own."""

from typing import ClassVar

import pytest
import torch

from elips_torch import METRICS, FlatIndex, NonFiniteError
from elips_torch.testing import IndexContract
from elips_torch.testing.contract import Contract, assert_same


class TestFlatIndex(IndexContract):
    index_class = FlatIndex


class TestHalfFlatIndex(IndexContract):
    index_class = FlatIndex
    options: ClassVar = {"dtype": torch.float16}


class TestLearnableFlatIndex(IndexContract):
    index_class = FlatIndex
    options: ClassVar = {"learnable": True}


class TestEveryMetric(Contract):
    """Exactness and files of the remaining metrics."""

    index_class = FlatIndex

    @pytest.mark.parametrize("metric", [metric.name for metric in METRICS])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_every_metric_and_dtype_is_exact(self, metric, dtype, tmp_path):
        p = 3.0 if metric == "lp" else None
        index = self.filled(metric=metric, dtype=dtype, p=p)
        queries = self.vectors(6, seed=2)
        for k in (1, 7, 70):
            assert_same(index.search(queries, k), self.expected(index, queries, k))
        index.save(tmp_path / "index")
        assert_same(FlatIndex.load(tmp_path / "index").search(queries, 5), index.search(queries, 5))


def test_a_learnable_database_gets_gradients():
    torch.manual_seed(0)
    index = FlatIndex(5, "ip", learnable=True)
    index.add(torch.randn(30, 5))
    assert [name for name, _ in index.named_parameters()] == ["vectors"]
    queries = torch.randn(4, 5, requires_grad=True)
    scores, ids = index(queries, k=3)
    scores.sum().backward()
    dense = index.vectors.detach().clone().requires_grad_()
    (queries.detach()[:, None] * dense[ids]).sum().backward()
    torch.testing.assert_close(index.vectors.grad, dense.grad)
    torch.testing.assert_close(queries.grad, dense.detach()[ids].sum(1))


def test_an_optimiser_trains_a_learnable_database():
    torch.manual_seed(0)
    index = FlatIndex(5, learnable=True)
    index.add(torch.randn(30, 5))
    optimiser = torch.optim.SGD(index.parameters(), lr=0.1)
    queries = torch.randn(4, 5)
    before = index(queries, k=3).scores.sum()
    for _ in range(5):
        optimiser.zero_grad()
        index(queries, k=3).scores.sum().backward()
        optimiser.step()
    assert index(queries, k=3).scores.sum() < before / 2
    state = {name: tensor.clone() for name, tensor in index.state_dict().items()}
    kept = index.vectors
    index.load_state_dict(state)
    assert index.vectors is kept


def test_range_search_scores_carry_gradients():
    torch.manual_seed(0)
    index = FlatIndex(5)
    index.add(torch.randn(30, 5))
    queries = torch.randn(4, 5, requires_grad=True)
    lims, scores, ids = index.range_search(queries, 8.0)
    assert len(ids) > 4
    scores.sum().backward()
    hit = torch.repeat_interleave(lims.diff())
    expected = torch.zeros(4, 5).index_add_(0, hit, 2 * (queries.detach()[hit] - index.vectors[ids]))
    torch.testing.assert_close(queries.grad, expected)


def test_k_has_no_limit():
    index = FlatIndex(3)
    index.add(torch.rand(5000, 3))
    scores, ids = index(torch.rand(2, 3), k=5000)
    assert all(sorted(row) == list(range(5000)) for row in ids.tolist())
    assert (scores.diff(dim=1) >= 0).all()


def test_values_that_the_storage_cannot_hold_are_refused():
    index = FlatIndex(3, dtype=torch.float16)
    with pytest.raises(NonFiniteError, match=r"row 1, .*float16"):
        index.add(torch.tensor([[1.0, 2.0, 3.0], [1.0, 1e6, 3.0]]))
    gower = FlatIndex(3, "gower")
    with pytest.raises(NonFiniteError, match=r"\[0, 1\]"):
        gower.add(torch.tensor([[0.5, 2.0, 0.1]]))


def test_explain_says_what_runs():
    index = FlatIndex(3, "ip", screen="none", dtype=torch.float16)
    index.add(torch.rand(50, 3))
    explanation = index.explain(torch.rand(2, 3), k=5)
    assert explanation.chosen == "eager"
    assert "knn of 2 x 50 x 3 float16, ip, k=5 on cpu" in str(explanation)
    index = FlatIndex(3, screen="int8")
    index.add(torch.rand(50, 3))
    explanation = index.explain(torch.rand(2, 3), k=5)
    assert "knn of 2 x 50 x 3 float32, l2, k=5, screen int8 on cpu" in str(explanation)


def test_repr_shows_what_matters():
    index = FlatIndex(3, "lp", p=3, dtype=torch.bfloat16)
    index.add(torch.rand(5, 3))
    assert repr(index) == "FlatIndex(dim=3, metric='lp', p=3, ntotal=5, k=10, dtype=bfloat16)"
    screened = FlatIndex(3, screen="bf16")
    screened.add(torch.rand(5, 3))
    assert repr(screened).endswith("dtype=float32, screen='bf16')")
    assert index.memory_bytes() == 5 * 3 * 2 + 5 * 8
