"""A layer that mixes what belongs to the nearest vectors."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from elips_torch.core.errors import ArgumentError, DtypeError, ShapeError, UnknownIdError
from elips_torch.core.validation import FLOAT_DTYPES, check_count
from elips_torch.indexes.base import Index
from elips_torch.training.attention import check_temperature, neighbour_weights, votes


class RetrievalLayer(nn.Module):
    """Mixes the values of the k nearest keys, by attention over their scores.

    The keys are the vectors of an index; id j has the value ``values[j]``. Gradients reach the queries
    through the scores, the values if they are a parameter, and the keys of a learnable index. Only
    the k values found take part, so there may be millions
    (`product-key memory <https://arxiv.org/abs/1907.05242>`_, `kNN-LM <https://arxiv.org/abs/1911.00172>`_,
    `memorizing transformers <https://arxiv.org/abs/2203.08913>`_).

    Args:
        index: the keys; ids from 0 to ``len(values) - 1``, as `Index.add` gives them to an empty index.
        values: ``(N, V)`` floats, mixed as they are; or ``(N,)`` int64 classes, such as the next token,
            which are mixed to a distribution. A `torch.nn.Parameter` is learned, any other
            tensor is a buffer.
        k: number of neighbours.
        temperature: what scores are divided by before the softmax; "l2" is squared.
        num_classes: number of classes V. Default: one more than the largest.

    Raises:
        ElipsError: an argument has a wrong type, shape or value.

    A memory of 512 learned slots in a network:

    >>> import torch
    >>> from elips_torch.indexes.flat import FlatIndex
    >>> keys = FlatIndex(16, "ip", learnable=True)
    >>> _ = keys.add(torch.randn(512, 16))
    >>> memory = RetrievalLayer(keys, torch.nn.Parameter(torch.randn(512, 32)), k=8)
    >>> memory(torch.randn(4, 10, 16)).shape
    torch.Size([4, 10, 32])

    A kNN language model: what followed in similar contexts, beside what the network says:

    >>> contexts, next_tokens = torch.randn(1000, 16), torch.randint(50, (1000,))
    >>> store = FlatIndex(16)
    >>> _ = store.add(contexts)
    >>> knn_lm = RetrievalLayer(store, next_tokens, k=64, temperature=10.0, num_classes=50)
    >>> network = torch.randn(3, 50).softmax(1)
    >>> probabilities = 0.25 * knn_lm(torch.randn(3, 16)) + 0.75 * network
    >>> torch.allclose(probabilities.sum(1), torch.ones(3))
    True
    """

    values: Tensor

    def __init__(
        self,
        index: Index,
        values: Tensor,
        k: int = 32,
        *,
        temperature: float = 1.0,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(index, Index):
            raise DtypeError(f"index is a {type(index).__name__}, expected an Index")
        if not isinstance(values, Tensor):
            raise DtypeError(f"values is a {type(values).__name__}, expected a torch.Tensor")
        self.num_classes = _check_values(values, num_classes)
        self.index = index
        if isinstance(values, nn.Parameter):
            self.values = values
        else:
            self.register_buffer("values", values.detach())
        self.k = check_count("k", k)
        checked = check_temperature(temperature)
        if checked is None:
            raise DtypeError("temperature is None, expected a number")
        self.temperature = checked

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return f"k={self.k}, temperature={self.temperature:g}, values={tuple(self.values.shape)}"

    def forward(self, queries: Tensor, k: int | None = None, **search: Any) -> Tensor:
        """Return the mixed values of each query.

        Args:
            queries: ``(..., D)``.
            k: number of neighbours for this call.
            **search: passed on to ``index.search``; ``mask``, ``exclude`` and others count all leading
                axes of the queries as one.

        Returns:
            ``(..., V)``; zeros where no neighbour was found.

        Raises:
            UnknownIdError: a neighbour has no value (on a CPU; accelerators do not wait to look).
            ElipsError: as for `Index.search`.
        """
        if not isinstance(queries, Tensor) or queries.ndim < 1:
            raise ShapeError(f"queries is {type(queries).__name__} or 0-D, expected a tensor (..., D)")
        weights, ids = self.attend(queries.reshape(-1, queries.shape[-1]), k, **search)
        if ids.device.type == "cpu" and not torch.compiler.is_compiling():
            largest = int(ids.max()) if ids.numel() else -1
            if largest >= len(self.values):
                raise UnknownIdError(
                    f"the index holds the id {largest}, expected ids below {len(self.values)}, one per value"
                )
        if self.num_classes is not None:
            mixed = votes(weights, self.values[ids.clamp_min(0)], self.num_classes)
        else:
            found = functional.embedding(ids.clamp_min(0), self.values)
            mixed = torch.einsum("qk,qkv->qv", weights.to(found.dtype), found)
        return mixed.reshape(*queries.shape[:-1], mixed.shape[-1])

    def attend(self, queries: Tensor, k: int | None = None, **search: Any) -> tuple[Tensor, Tensor]:
        """Return the weights ``(Q, K)`` and ids ``(Q, K)`` of neighbours of queries ``(Q, D)``."""
        scores, ids = self.index(queries, self.k if k is None else k, **search)
        weights = neighbour_weights(
            scores, ids, higher_is_better=self.index.higher_is_better, temperature=self.temperature
        )
        return weights, ids


def _check_values(values: Tensor, num_classes: int | None) -> int | None:
    """Return the number of classes, None if values are vectors."""
    if values.dtype in FLOAT_DTYPES:
        if values.ndim != 2:
            raise ShapeError(
                f"values has shape {tuple(values.shape)}, expected (N, V), or (N,) int64 classes"
            )
        if num_classes is not None:
            raise ArgumentError(
                f"num_classes is {num_classes}, but values has dtype {values.dtype}, not int64"
            )
        if not len(values):
            raise ShapeError("values has no row, expected one per vector of the index")
        return None
    if values.dtype != torch.int64:
        raise DtypeError(f"values has dtype {values.dtype}, expected a float dtype or int64")
    if values.ndim != 1 or not len(values):
        raise ShapeError(f"values has shape {tuple(values.shape)}, expected (N,) classes, N at least 1")
    low, high = (int(extreme) for extreme in torch.aminmax(values))
    count = high + 1 if num_classes is None else check_count("num_classes", num_classes)
    if low < 0 or high >= count:
        raise ArgumentError(f"values has classes from {low} to {high}, expected 0 <= class < {count}")
    return count
