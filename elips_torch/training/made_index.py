"""The empty index that a caller's function makes for vectors of some size."""

from collections.abc import Callable

from torch import Tensor

from elips_torch.core.errors import ArgumentError, DtypeError, ShapeError
from elips_torch.indexes.base import Index


def made_index(name: str, make_index: Callable[[int], Index], vectors: Tensor) -> Index:
    """Return an index that is made for vectors, fitted on them if it learns, and still empty.

    Args:
        name: of the argument that makes it, for messages.
        make_index: called with D.
        vectors: ``(N, D)``; the index goes to their device.

    Raises:
        DtypeError: no index is made.
        ShapeError: one of another dim is.
        ArgumentError: one that holds vectors is.
    """
    dim = vectors.shape[1]
    index = make_index(dim)
    if not isinstance(index, Index):
        raise DtypeError(f"{name} made a {type(index).__name__}, expected an Index")
    if index.dim != dim:
        raise ShapeError(
            f"{name} made an index of dim {index.dim}, the vectors have dim {dim}, which it was called with"
        )
    if index.ntotal:
        raise ArgumentError(
            f"{name} made an index that holds {index.ntotal} vectors, expected an empty one at each call"
        )
    index = index.to(vectors.device)
    if not index.is_trained:
        index.fit(vectors)
    return index
