import pytest
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from elips_torch import ArgumentError
from elips_torch.lightning.embedding import own_batches

N = 10


class Wrapped(Sampler):
    """Gives on what another sampler gives."""

    def __init__(self, sampler):
        self.sampler = sampler

    def __iter__(self):
        return iter(self.sampler)

    def __len__(self):
        return len(self.sampler)


@pytest.mark.parametrize("place", ["sampler", "batch_sampler", "nested"])
@pytest.mark.parametrize(
    "sampler",
    [
        RandomSampler(range(N)),
        SubsetRandomSampler(range(N)),
        WeightedRandomSampler([1.0] * N, N),
        DistributedSampler(range(N), num_replicas=1, rank=0, shuffle=True),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_a_loader_that_shuffles_is_refused(place, sampler):
    if place == "sampler":
        loader = DataLoader(range(N), sampler=sampler)
    else:
        inner = sampler if place == "batch_sampler" else Wrapped(sampler)
        loader = DataLoader(range(N), batch_sampler=BatchSampler(inner, 3, False))
    with pytest.raises(ArgumentError, match=f"the loader shuffles .{type(sampler).__name__}"):
        own_batches(loader, 0, 2)


def test_a_loader_of_a_part_is_refused():
    sampler = DistributedSampler(range(N), num_replicas=2, rank=0, shuffle=False)
    with pytest.raises(ArgumentError, match="yields one of 2 parts of the data"):
        own_batches(DataLoader(range(N), sampler=sampler, batch_size=3), 0, 2)


def test_batches_of_a_batch_sampler_are_dealt_out_in_order():
    loader = DataLoader(range(N), batch_sampler=BatchSampler(SequentialSampler(range(N)), 3, False))
    parts = [[batch.tolist() for batch in own_batches(loader, rank, 2)] for rank in range(2)]
    assert parts == [[[0, 1, 2], [6, 7, 8]], [[3, 4, 5], [9]]]
