import faiss
import pytest
import torch

from elips_torch import ArgumentError, FaissIndex, FlatIndex, MetricError
from elips_torch.testing import IndexContract
from elips_torch.testing.contract import assert_same


class FaissContract(IndexContract):
    """As far as scores and order are faiss's own: ties go where it sends them."""

    index_class = FaissIndex
    description = "Flat"
    parameters = {}

    def make(self, metric="l2", **options):
        made = FaissIndex.from_factory(self.dim, self.description, metric, **{**self.parameters, **options})
        return made if made.is_trained else made.fit(self.vectors(256, seed=7))

    def test_ties_go_to_the_lower_id(self):
        index = self.make()
        index.add(self.vectors(1).expand(20, -1), ids=torch.arange(20).flip(0))
        assert sorted(index.search(self.vectors(1), k=20).ids[0].tolist()) == list(range(20))

    def test_scores_with_and_without_gradients_are_the_same(self):
        index = self.filled()
        queries = self.vectors(6, seed=2)
        traced = index.search(queries.clone().requires_grad_(), k=70)
        found = index.search(queries, k=70)
        assert torch.equal(traced.ids, found.ids)
        torch.testing.assert_close(traced.scores, found.scores, rtol=1e-5, atol=1e-5)

    def test_deterministic_mode(self):
        index = self.filled()
        queries = self.vectors(4, seed=2)
        wanted = index.search(queries, k=5)
        torch.use_deterministic_algorithms(True)
        try:
            assert_same(index.search(queries, k=5), wanted)
        finally:
            torch.use_deterministic_algorithms(False)

    def test_bad_construction_is_refused(self):
        with pytest.raises(MetricError, match="'l7'"):
            self.make("l7")
        with pytest.raises(ArgumentError, match="k is 0"):
            self.make(k=0)


class TestFlat(FaissContract):
    pass


class TestHNSW(FaissContract):
    description = "HNSW16"
    parameters = {"efSearch": 200}


class TestIVF(FaissContract):
    description = "IVF4,Flat"
    parameters = {"nprobe": 4}
