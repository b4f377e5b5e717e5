import pytest
import torch

from elips_torch.core.ordering import EMPTY_KEY, order_keys
from elips_torch.kernels import merge_triton
from elips_torch.kernels.merge_triton import merge_keys_triton


def check(keys, k):
    empty = torch.full((len(keys), max(0, k - keys.shape[1])), EMPTY_KEY)
    padded = torch.cat([keys, empty], 1)
    assert torch.equal(merge_keys_triton(keys, k), padded.sort(dim=1).values[:, :k])


def random_keys(shape, seed=0):
    return torch.randint(-(2**63), 2**63 - 1, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def _small_blocks(monkeypatch):
    """The interpreter takes seconds to sort a thousand keys."""
    monkeypatch.setattr(merge_triton, "LEAST_BLOCK", 16)
    monkeypatch.setattr(merge_triton, "_BLOCKS_PER_PART", 2)


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("k", [1, 2, 10, 33, 64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, 64), (2, 100)], ids=str)
def test_the_smallest_keys_are_found_in_order(shape, k):
    check(random_keys(shape), k)


@pytest.mark.usefixtures("_small_blocks")
def test_long_rows_are_merged_in_parts():
    check(random_keys((2, 500)), 3)


@pytest.mark.parametrize(("n_columns", "k"), [(600, 10), (1100, 1000)])
def test_blocks_of_their_ordinary_size(n_columns, k):
    check(random_keys((1, n_columns)), k)


@pytest.mark.usefixtures("_small_blocks")
def test_empty_places_come_last_and_no_columns_give_nothing_else():
    keys = random_keys((3, 90))
    keys[0] = EMPTY_KEY
    keys[1, ::2] = EMPTY_KEY
    check(keys, 60)
    assert (merge_keys_triton(keys[:, :0], 5) == EMPTY_KEY).all()


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("higher_is_better", [False, True])
def test_scores_that_tie_are_in_the_order_of_ranks(higher_is_better):
    scores = (torch.randn(3, 150, generator=torch.Generator().manual_seed(1)) * 2).round()
    ranks = torch.randperm(150, generator=torch.Generator().manual_seed(2))
    keys = order_keys(scores, ranks, higher_is_better)
    check(keys, 20)
    found = merge_keys_triton(keys, 20) & 0xFFFFFFFF
    expected = [
        sorted(range(150), key=lambda c, row=row: (-row[c] if higher_is_better else row[c], int(ranks[c])))
        for row in scores.tolist()
    ]
    assert found.tolist() == [[int(ranks[c]) for c in row[:20]] for row in expected]


def test_what_the_kernel_does_not_take_is_refused():
    with pytest.raises(ValueError, match="k is 0"):
        merge_keys_triton(random_keys((2, 3)), 0)
    with pytest.raises(ValueError, match="int64"):
        merge_keys_triton(torch.zeros(2, 3), 1)
    assert merge_keys_triton(random_keys((0, 3)), 2).shape == (0, 2)
