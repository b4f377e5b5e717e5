"""Comparing an index with one of faiss."""

import torch

# Float32 sums of products of vectors of length 5 or so, in another order.
TOLERANCE = 2e-5


def uniform(n, dim=16, seed=0):
    return torch.rand(n, dim, generator=torch.Generator().manual_seed(seed))


def by_hand(index, queries, k):
    """Return what faiss finds, as tensors."""
    # Arrays give arrays, also where something has imported `faiss.contrib.torch_utils`.
    rows = queries if queries.dtype == torch.uint8 else queries.float()
    scores, ids = index.search(rows.numpy(), k)
    return torch.from_numpy(scores), torch.from_numpy(ids)


def assert_finds_the_same(index, there, queries, k=10, **parameters):
    """Fail unless an index and one of faiss find the same, to rounding.

    Where the lists that faiss reads hold fewer than k rows, ``index`` reads on: what it finds is no worse.
    """
    found, wanted = index.search(queries, k, **parameters), by_hand(there, queries, k)
    full = (wanted[1] >= 0).all(1)
    assert_agree((found.scores[full], found.ids[full]), [each[full] for each in wanted])
    scores, ids = found.scores[~full], found.ids[~full]
    some = wanted[1][~full] >= 0
    assert (ids[some] >= 0).all()
    gap = (scores - wanted[0][~full])[some]
    assert ((-gap if index.higher_is_better else gap) <= _limit(wanted[0][~full][some])).all()


def assert_agree(found, wanted):
    """Fail unless scores are equal to rounding, and ids are where scores tell them apart."""
    (scores, ids), (other_scores, other_ids) = found, wanted
    assert torch.equal(ids < 0, other_ids < 0)
    there = ids >= 0
    limit = _limit(other_scores[there])
    assert ((scores - other_scores).abs()[there] <= limit).all()
    for query, place in (ids != other_ids).nonzero().tolist():
        # Another row with as good a score, to rounding; it may be past the last place.
        near = (scores[query] - scores[query, place]).abs() <= 2 * limit
        assert near.sum() > 1 or place == ids.shape[1] - 1


def _limit(scores):
    return TOLERANCE * max(1.0, float(scores.abs().max()) if scores.numel() else 1.0)
