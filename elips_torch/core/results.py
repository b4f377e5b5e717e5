"""What searches return."""

from typing import NamedTuple

from torch import Tensor


class SearchResult(NamedTuple):
    """The nearest rows of each query, best first; unpacks as ``scores, ids``.

    Attributes:
        scores: ``(Q, K)`` float32, or ``(K,)`` for a single 1-D query. Places that no row could
            fill hold the worst value: ``+inf`` where smaller is better, ``-inf`` otherwise.
        ids: ``(Q, K)`` int64, or ``(K,)``. ``-1`` where no row was found.
    """

    scores: Tensor
    ids: Tensor


class RangeResult(NamedTuple):
    """All rows within a radius of each query; unpacks as ``lims, scores, ids``.

    The rows of query ``i`` are ``scores[lims[i]:lims[i + 1]]``, best first.

    Attributes:
        lims: ``(Q + 1,)`` int64, the first result of each query and, last, their number M.
        scores: ``(M,)`` float32.
        ids: ``(M,)`` int64.
    """

    lims: Tensor
    scores: Tensor
    ids: Tensor
