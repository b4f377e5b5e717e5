"""Classification by the labels of the nearest vectors."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from elips_torch.core.errors import ArgumentError, DtypeError, NotFittedError, ShapeError
from elips_torch.core.validation import check_count, check_device, check_vectors
from elips_torch.indexes.base import Index
from elips_torch.indexes.flat import FlatIndex
from elips_torch.training.attention import check_temperature, neighbour_weights, votes
from elips_torch.training.made_index import made_index


class KNNClassifier:
    """Classifies by a vote of the k nearest vectors, weighted by ``exp(similarity / temperature)``.

    The protocol by which self-supervised models are compared
    (`instance discrimination <https://arxiv.org/abs/1805.01978>`_, `DINO <https://arxiv.org/abs/2104.14294>`_):
    cosine, temperature 0.07, the best of k = 10, 20, 100, 200. ``temperature=None`` counts every neighbour
    alike. Distances count with a minus.

    Args:
        k: number of neighbours.
        temperature: what similarities are divided by; None for a plain majority.
        num_classes: C. Default: one more than the largest label.
        index: called with D, makes the empty index, anew at each `fit`. Default:
            ``FlatIndex(D, metric="cosine")``. One that has to be fitted is fitted on the vectors.

    Attributes:
        index: what `fit` has filled.
        labels: ``(N,)`` int64.

    Raises:
        ElipsError: an argument has a wrong type or value.

    >>> import torch
    >>> vectors, labels = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]), [0, 0, 1, 1]
    >>> classifier = KNNClassifier(k=3).fit(vectors, torch.tensor(labels))
    >>> classifier.predict(torch.tensor([[1.0, 0.2], [0.2, 1.0]]))
    tensor([0, 1])

    Leave one out:

    >>> classifier.predict(vectors, exclude_self=True)
    tensor([0, 0, 1, 1])
    """

    index: Index
    labels: Tensor

    def __init__(
        self,
        k: int = 20,
        *,
        temperature: float | None = 0.07,
        num_classes: int | None = None,
        index: Callable[[int], Index] | None = None,
    ) -> None:
        if isinstance(index, Index) or not (index is None or callable(index)):
            raise DtypeError(
                f"index is a {type(index).__name__}, expected a callable that makes one, such as "
                "lambda dim: FlatIndex(dim)"
            )
        self.k = check_count("k", k)
        self.temperature = check_temperature(temperature)
        self.num_classes = None if num_classes is None else check_count("num_classes", num_classes)
        self._make_index = _cosine_index if index is None else index

    def __repr__(self) -> str:
        return f"KNNClassifier(k={self.k}, temperature={self.temperature}, num_classes={self.num_classes})"

    def fit(self, vectors: Tensor, labels: Tensor) -> Self:
        """Take vectors and their labels in place of any before.

        Args:
            vectors: ``(N, D)``, as for `Index.add`; at least one.
            labels: ``(N,)`` int64, from 0 to C - 1.

        Returns:
            The classifier itself.

        Raises:
            ElipsError: vectors or labels of wrong type, shape, device or value.
        """
        check_vectors("vectors", vectors)
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
            got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise DtypeError(f"labels is {got}, expected an int64 tensor")
        if tuple(labels.shape) != (len(vectors),):
            raise ShapeError(f"labels has shape {tuple(labels.shape)}, expected ({len(vectors)},)")
        check_device("labels", labels, vectors.device, "vectors")
        if not len(labels):
            raise ShapeError("vectors has no row, expected at least one to learn from")
        low, high = (int(extreme) for extreme in torch.aminmax(labels))
        if low < 0 or high >= (high + 1 if self.num_classes is None else self.num_classes):
            limit = "" if self.num_classes is None else f" < num_classes = {self.num_classes}"
            raise ArgumentError(f"labels has {low} to {high}, expected 0 <= label{limit}")
        index = made_index("index", self._make_index, vectors)
        index.add(vectors, ids=torch.arange(len(vectors), device=vectors.device))
        self.index, self.labels = index, labels.clone()
        self._columns = high + 1 if self.num_classes is None else self.num_classes
        return self

    def predict_proba(
        self, queries: Tensor, *, k: int | None = None, exclude_self: bool = False, **search: Any
    ) -> Tensor:
        """Return the share of the vote that each class gets, with gradients to the queries.

        Args:
            queries: ``(Q, D)``.
            k: number of neighbours for this call.
            exclude_self: the queries are the vectors given to `fit`, in their order, and none votes on
                itself.
            **search: passed on to ``index.search``.

        Returns:
            ``(Q, C)`` float32; rows sum to 1, or to 0 where no neighbour was found.

        Raises:
            NotFittedError: there is nothing to compare with yet.
            ElipsError: as for `Index.search`.
        """
        if not hasattr(self, "labels"):
            raise NotFittedError("KNNClassifier holds no vectors yet; call fit(vectors, labels) first")
        check_vectors("queries", queries, dim=self.index.dim)
        count = self.k if k is None else check_count("k", k)
        scores, ids = self.index(queries, count, exclude_self=exclude_self, **search)
        weights = neighbour_weights(
            scores, ids, higher_is_better=self.index.higher_is_better, temperature=self.temperature
        )
        return votes(weights, self.labels[ids.clamp_min(0)], self._columns)

    @torch.no_grad()
    def predict(
        self, queries: Tensor, *, k: int | None = None, exclude_self: bool = False, **search: Any
    ) -> Tensor:
        """Return ``(Q,)`` int64, the class with the largest share; the lowest of several, -1 without any.

        The arguments are those of `predict_proba`.
        """
        shares = self.predict_proba(queries, k=k, exclude_self=exclude_self, **search)
        best, label = shares.max(1)
        return label.masked_fill(best <= 0, -1)


def _cosine_index(dim: int) -> Index:
    return FlatIndex(dim, metric="cosine")
