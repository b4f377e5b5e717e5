"""What the parts of the index contract share: making an index and comparing it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from elips_torch.core.results import SearchResult
from elips_torch.indexes.base import Index
from elips_torch.reference.knn import knn as reference_knn


class Contract:
    """Makes the index under test.

    Attributes:
        index_class: the class under test.
        options: constructor keywords that every index of the test gets.
        dim: size of a vector.
    """

    index_class: ClassVar[type[Index]]
    options: ClassVar[dict[str, Any]] = {}
    dim: ClassVar[int] = 12

    def make(self, metric: str = "l2", **options: Any) -> Index:
        """Return an empty, fitted index."""
        index = self.index_class(self.dim, metric=metric, **{**self.options, **options})
        return index.fit(self.vectors(256, seed=7)) if not index.is_trained else index

    def vectors(self, n: int, seed: int = 0) -> Tensor:
        """Return ``(n, dim)`` vectors in [0, 1), a range that every metric takes."""
        return torch.rand(n, self.dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)

    def filled(self, n: int = 60, metric: str = "l2", **options: Any) -> Index:
        """Return an index of n vectors under shuffled ids of the user's."""
        index = self.make(metric, **options)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
        index.add(self.vectors(n), ids=order * 3)
        return index

    def expected(self, index: Index, queries: Tensor, k: int, **selection: Any) -> SearchResult:
        """Return what an exact index answers."""
        stored = index.reconstruct(index.ids)
        return reference_knn(queries, stored, k, index.metric, index.p, index.ids, **selection)


def assert_same(found: SearchResult, wanted: SearchResult) -> None:
    """Fail unless ids and scores are the same bits."""
    torch.testing.assert_close(found.ids, wanted.ids, rtol=0, atol=0)
    torch.testing.assert_close(found.scores, wanted.scores, rtol=0, atol=0, equal_nan=True)


def snapshot(index: Index) -> dict[str, Tensor]:
    """Return a copy of the index's state."""
    return {name: tensor.clone() for name, tensor in index.state_dict().items()}


@contextmanager
def unchanged(index: Index) -> Iterator[None]:
    """Fail unless the state of the index is the same after the block."""
    before = snapshot(index)
    yield
    after = snapshot(index)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=0, msg=f"{name} has changed")
