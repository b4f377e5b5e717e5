"""Indexes as the nearest-neighbour functions of pytorch-metric-learning."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from elips_torch.core.errors import ArgumentError, DtypeError, NotFittedError
from elips_torch.core.validation import check_count, check_flag, check_vectors
from elips_torch.indexes.base import Index
from elips_torch.indexes.catalog import load_index
from elips_torch.indexes.flat import FlatIndex
from elips_torch.training.made_index import made_index


class IndexKNN:
    """What ``knn_func`` of ``AccuracyCalculator`` and ``InferenceModel`` is given; see `knn_func`.

    Attributes:
        index: what `train` has filled, None before.
    """

    def __init__(self, make_index: Callable[[int], Index]) -> None:
        self._make_index = make_index
        self.index: Index | None = None

    @torch.no_grad()
    def __call__(
        self,
        query: Tensor,  # (Q, D)
        k: int,
        reference: Tensor | None = None,  # (N, D)
        ref_includes_query: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return the scores ``(Q, k)`` and rows ``(Q, k)`` of the nearest references, best first.

        Args:
            query: ``(Q, D)``.
            k: number of neighbours.
            reference: ``(N, D)`` to search; None searches what `train` and `add` were given.
            ref_includes_query: the first Q references are the queries, and none is to find itself.

        Raises:
            NotFittedError: no reference, and `train` has not been called.
            ArgumentError: there are fewer than k references, which the callers have no way to be told.
            ElipsError: as for `Index.search`.
        """
        check_vectors("query", query)
        k = check_count("k", k)
        check_flag("ref_includes_query", ref_includes_query)
        if reference is not None:
            index = self._filled(reference)
        elif self.index is None:
            raise NotFittedError("there is nothing to search; call train(embeddings) or pass reference")
        else:
            index = self.index
        others = index.ntotal - int(ref_includes_query)
        if k > others:
            raise ArgumentError(f"k is {k}, expected at most the {others} references there are to find")
        own = torch.arange(len(query), device=query.device)[:, None] if ref_includes_query else None
        found = index.search(query.to(index.device), k, exclude=None if own is None else own.to(index.device))
        return found.scores.to(query.device), found.ids.to(query.device)

    def train(self, embeddings: Tensor) -> None:
        """Start over with embeddings ``(N, D)`` as references."""
        self.index = self._filled(torch.as_tensor(embeddings))

    def add(self, embeddings: Tensor) -> None:
        """Add embeddings ``(N, D)`` to the references."""
        embeddings = torch.as_tensor(embeddings)
        if self.index is None:
            self.train(embeddings)
        else:
            self.index.add(embeddings.to(self.index.device))

    def reset(self) -> None:
        """Forget the references."""
        self.index = None

    def save(self, filename: str | os.PathLike[str]) -> None:
        """Write the references to a file."""
        if self.index is None:
            raise NotFittedError("there is nothing to save; call train(embeddings) first")
        self.index.save(filename)

    def load(self, filename: str | os.PathLike[str]) -> None:
        """Read the references from a file that `Index.save` wrote."""
        self.index = load_index(filename)

    def _filled(self, vectors: Tensor) -> Index:
        check_vectors("reference", vectors)
        index = made_index("index_type", self._make_index, vectors)
        index.add(vectors)
        return index


def knn_func(index_type: Callable[..., Index] = FlatIndex, metric: str = "l2", **options: Any) -> IndexKNN:
    """Return a nearest-neighbour function for pytorch-metric-learning.

    ``AccuracyCalculator(knn_func=knn_func())`` and ``InferenceModel(model, knn_func=knn_func())`` search
    an index in place of faiss, on the device of the embeddings. A query is excluded from its own
    neighbours during the search, also among duplicates.

    Args:
        index_type: class of the index, or a callable with the same keywords that makes an empty one. It is
            called with the ``dim`` of the embeddings, each time that there are new references.
        metric: name of the distance kind; "l2" is what these classes use by default.
        **options: passed on, such as ``nlist=64`` for `IVFFlatIndex`.

    Raises:
        DtypeError: an index, or what cannot be called.
        ArgumentError: options have a dim.

    >>> import torch
    >>> search = knn_func(FlatIndex, metric="cosine")
    >>> points = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    >>> search(points, 1, points, ref_includes_query=True)[1].flatten()
    tensor([1, 0, 1])
    """
    if isinstance(index_type, Index) or not callable(index_type):
        raise DtypeError(
            f"index_type is a {type(index_type).__name__}, expected a class of index such as FlatIndex, "
            "which is called with the dim of the embeddings"
        )
    if "dim" in options:
        raise ArgumentError(f"options has dim={options['dim']!r}, expected none: embeddings say their dim")

    def make_index(dim: int) -> Index:
        return index_type(dim=dim, metric=metric, **options)

    return IndexKNN(make_index)
