"""Indexes of bits that look at a part of their rows, or at floats: hashes, and floats under bits."""

import copy
import math

import faiss
import numpy as np
import pytest
import torch

from elips_torch import (
    ArgumentError,
    ConversionError,
    FaissIndex,
    FlatIndex,
    ImplementationError,
    MetricError,
    ParameterError,
    unpack_bits,
)

BITS = 64
HASHES = ("BHash8", "BHash4x8")


def codes(n, seed=0):
    return torch.randint(0, 256, (n, BITS // 8), generator=torch.Generator().manual_seed(seed)).byte()


def vectors(n, seed=0):
    return unpack_bits(codes(n, seed))


def by_hand(index, queries, k):
    distances, labels = index.search(queries.numpy(), k)
    return torch.from_numpy(distances), torch.from_numpy(labels)


@pytest.mark.parametrize("description", HASHES)
def test_hashes_find_what_faiss_finds(description):
    index = FaissIndex.from_factory(BITS, description, nflip=2)
    index.add(codes(300))
    plenty = index.search(codes(9, seed=2), 30)
    assert bool((plenty.ids >= 0).all())
    index.nflip = 1
    # Now some queries find fewer.
    distances, labels = by_hand(index.faiss_index, codes(9, seed=2), 30)
    assert bool((labels < 0).any())
    scores, ids = index.search(codes(9, seed=2), 30)
    assert torch.equal(ids, labels)
    assert torch.equal(scores, distances.float().masked_fill(labels < 0, math.inf))
    mask = torch.arange(300) % 2 == 0
    everything, found = index.search(codes(9, seed=2), 300), index.search(codes(9, seed=2), 30, mask=mask)
    for row, own in zip(everything.ids.tolist(), found.ids.tolist(), strict=True):
        assert [i for i in own if i >= 0] == [i for i in row if i >= 0 and mask[i]][:30]
    index.nflip = 0
    assert index.faiss_index.nflip == 0
    with pytest.raises(ArgumentError, match="nflip is -1, expected 0 to 8"):
        index.nflip = -1
    # With more than there are, faiss never returns.
    for many in (9, 2**40, math.inf):
        with pytest.raises(ArgumentError, match=f"nflip is {many}, expected 0 to 8"):
            index.nflip = many
    with pytest.raises(ParameterError, match="faiss takes nflip for no single call"):
        index.search(codes(1), 1, nflip=1)
    if description == "BHash8":
        with pytest.raises(ImplementationError, match="does not reconstruct"):
            index.reconstruct(3)


@pytest.mark.parametrize("description", HASHES)
def test_after_reset_only_new_rows_are_found(description):
    index = FaissIndex.from_factory(BITS, description, nflip=1)
    index.add(codes(700))
    index.reset()
    assert index.nflip == 1
    index.add(codes(5, seed=3), ids=[50, 40, 30, 20, 10])
    found = index.search(codes(700), 3).ids
    assert bool(torch.isin(found, torch.tensor([-1, 10, 20, 30, 40, 50])).all())
    assert index.search(codes(5, seed=3), 1).ids[:, 0].tolist() == [50, 40, 30, 20, 10]
    assert torch.equal(copy.deepcopy(index).search(codes(700), 3).ids, found)


def test_hashes_of_no_bits_or_too_many_are_refused():
    for dim, description, message in (
        (64, "BHash0", "hashes 0 bits"),
        (128, "BHash65", "65 bits, expected 1 to 64"),
    ):
        with pytest.raises(ArgumentError, match=message):
            FaissIndex.from_factory(dim, description)


def test_a_hash_comes_with_its_labels():
    there, ids = faiss.IndexBinaryHash(BITS, 8), torch.arange(300).flip(0) * 5
    there.add_with_ids(codes(300).numpy(), ids.numpy())
    index = FaissIndex(there)
    assert sorted(index.ids.tolist()) == sorted(ids.tolist())
    _, labels = by_hand(there, codes(9, seed=2), 4)
    assert torch.equal(index.search(codes(9, seed=2), 4).ids, labels)
    back = index.to_faiss()
    assert torch.equal(by_hand(back, codes(9, seed=2), 4)[1], labels)
    there.ntotal += 1
    with pytest.raises(ConversionError, match="damaged: it has 301 vectors and 300 labels"):
        FaissIndex(there)


def test_bits_over_floats():
    index = FaissIndex(faiss.IndexBinaryFromFloat(faiss.IndexFlatL2(BITS)))
    index.add(codes(50), ids=torch.arange(50) + 7)
    assert torch.equal(index.search(codes(50), 1).ids[:, 0], index.ids)
    exact = FlatIndex(BITS)
    exact.add(vectors(50))
    assert torch.equal(index.search(codes(9, seed=2), 5).scores, exact.search(vectors(9, seed=2), 5).scores)


@pytest.mark.parametrize("description", ["Flat", "IVF4,Flat", "HNSW8", "LSH"])
def test_bits_over_any_floats_take_masks_and_removals(description):
    floats = faiss.index_factory(BITS, description)
    index = FaissIndex(faiss.IndexBinaryFromFloat(floats))
    index.fit(codes(400)).add(codes(400))
    mask = torch.arange(400) % 50 == 0
    found = index.search(codes(5, seed=2), 8, mask=mask)
    assert bool(mask[found.ids[found.ids >= 0]].all())
    if description in ("Flat", "LSH"):
        assert bool((found.ids >= 0).all())
    index.remove(torch.arange(0, 400, 2))
    assert bool((index.search(codes(400), 9).ids % 2 != 0).all())
    for name in ("nprobe", "efSearch"):
        if hasattr(index, name):
            with pytest.raises(ParameterError, match=f"{name} for no single call of IndexBinaryFrom"):
                index.search(codes(5), 3, **{name: 4})
            setattr(index, name, 4)


def test_floats_under_bits_that_mean_something_else_are_refused():
    with pytest.raises(MetricError, match="bits over an index of metric 'ip', expected 'l2'"):
        FaissIndex(faiss.IndexBinaryFromFloat(faiss.IndexFlatIP(BITS)))
    lists = faiss.index_factory(BITS, "IVF4,Flat")
    lists.train(vectors(200).numpy())
    lists.add_with_ids(vectors(100).numpy(), np.arange(100) * 1000)
    mapped = faiss.IndexIDMap(faiss.IndexFlatL2(BITS))
    for floats in (lists, mapped):
        with pytest.raises(ConversionError, match=r"labels of its own in IndexI.* an IndexBinaryIDMap"):
            FaissIndex(faiss.IndexBinaryFromFloat(floats))
