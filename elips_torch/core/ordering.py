"""The order of results as one integer: by score, then by the lower id.

A key holds the score's bits in its upper half and the rank of the row's id in its lower half, so
that comparing keys compares (score, id). Selecting by key is exact on ties, whatever the size of
the tiles, and deterministic.
"""

import torch
from torch import Tensor

# Larger than the key of any row: a place that is not filled.
EMPTY_KEY = torch.iinfo(torch.int64).max


def order_keys(scores: Tensor, ranks: Tensor, higher_is_better: bool) -> Tensor:
    """Return int64 keys; the smaller the key, the better the row.

    Args:
        scores: float32, any shape. NaN sorts behind every number.
        ranks: int64 below 2**31 that broadcasts with ``scores``: position of the row's id among
            the sorted ids.
        higher_is_better: order of the metric.
    """
    # Adding zero turns -0.0 into +0.0: the two are equal and must tie.
    signed = (-scores if higher_is_better else scores) + 0.0
    bits = signed.view(torch.int32)
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ascending = torch.where(signed.isnan(), 0x7FFFFFFF, ascending)
    return (ascending.to(torch.int64) << 32) | ranks


def scores_of_keys(keys: Tensor, higher_is_better: bool) -> Tensor:
    """Return the float32 scores that `order_keys` made keys of, any shape."""
    ascending = (keys >> 32).to(torch.int32)
    signed = (ascending ^ ((ascending >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return (-signed if higher_is_better else signed) + 0.0


def ranks_of_keys(keys: Tensor) -> Tensor:
    """Return the int64 ranks that `order_keys` made keys of, any shape."""
    return keys & 0xFFFFFFFF
