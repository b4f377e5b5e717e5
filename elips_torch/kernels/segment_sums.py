"""Sums of the vectors of each label, without atomics: the same on every run and for any threads."""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

# Vectors added one after the other; more go through partial sums, which errs less and fills a GPU
# also where one label has most of the vectors.
_RUN = 256


def label_order(labels: Tensor, n_labels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort rows by label.

    Returns:
        Rows ``(N,)`` in the order of their labels, of one label ascending; where each label starts
        among them, and how many rows it has, both ``(n_labels,)``. All int64.
    """
    # Short keys sort several times faster on a CPU.
    short = labels.to(torch.int16 if n_labels <= 2**15 else torch.int32)
    order = short.sort(stable=True).indices
    counts = torch.bincount(labels, minlength=n_labels)
    return order, counts.cumsum(0) - counts, counts


def segment_sums(
    vectors: Tensor,  # (N, D) float32 or float64
    order: Tensor,  # (N,) from label_order
    starts: Tensor,  # (K,) from there
    counts: Tensor,  # (K,) from there
) -> Tensor:  # (K, D)
    """Return the sum of the vectors of each label; zeros for labels without any."""
    runs = (counts + (_RUN - 1)) // _RUN
    first_run = runs.cumsum(0) - runs
    owner = torch.repeat_interleave(runs)
    numbers = torch.arange(len(owner), device=vectors.device)
    offsets = starts[owner] + (numbers - first_run[owner]) * _RUN
    partial = embedding_bag(order, vectors, offsets, mode="sum")
    return embedding_bag(numbers, partial, first_run, mode="sum")
