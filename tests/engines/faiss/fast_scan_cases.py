"""Inverted files of fast scan give back their vectors after whatever reads or copies them."""

import copy
import dataclasses
import gc

import pytest
import torch

from elips_torch import FaissIndex, ParameterError
from elips_torch.engines.faiss.builds import load_installed
from elips_torch.engines.faiss.search_parameters import may_widen, search_parameters

DESCRIPTIONS = [
    "IVF8,PQ8x4fs",
    "IVF8,RQ4x4fs_Nrq2x4",
    "PCA8,IVF8,PQ4x4fs",
    "IVF8,PQ8x4fs,RFlat",
    "IDMap2,IVF8,PQ8x4fs",
]


def read(index, file):
    load_installed().module.write_index(index.to_faiss(), str(file))
    return FaissIndex.read(file)


def load(index, file):
    index.save(file)
    return FaissIndex.load(file)


def from_a_checkpoint(index, file):
    description = index.description.removeprefix("IDMap2,")
    empty = FaissIndex.from_factory(index.dim, description)
    empty.load_state_dict(index.state_dict())
    return empty


def of_a_clone(index, file):
    return FaissIndex(load_installed().module.clone_index(index.faiss_index))


WAYS = {
    "read": read,
    "load": load,
    "checkpoint": from_a_checkpoint,
    "deepcopy": lambda index, file: copy.deepcopy(index),
    "to_faiss": lambda index, file: FaissIndex(index.to_faiss()),
    "clone": of_a_clone,
}


def test_before_1_13_a_fast_scan_of_residuals_takes_no_nprobe_for_a_call():
    index = FaissIndex.from_factory(16, "PCA8,IVF8,PQ4x4fsr")
    for version, expected in (("1.12.0", False), ("1.13.2", True)):
        build = dataclasses.replace(load_installed(), version=version)
        assert may_widen(build, index.faiss_index) is expected
        if not expected:
            with pytest.raises(
                ParameterError, match=r"no single call of IndexIVFPQFastScan; set index.nprobe = 2"
            ):
                search_parameters(build, index.faiss_index, {"nprobe": 2})
        assert may_widen(build, FaissIndex.from_factory(16, "IVF8,PQ8x4fs").faiss_index)


def quantizer_of(build, index):
    lists = build.module.downcast_index(build.module.extract_index_ivf(index))
    own = lists.pq if hasattr(lists, "pq") else lists.rq
    return int(own.this), lists.fine_quantizer


@pytest.mark.parametrize("description", DESCRIPTIONS)
@pytest.mark.parametrize("way", WAYS)
def test_vectors_are_those_of_the_original(description, way, tmp_path):
    build = load_installed()
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(500, 16, generator=generator)
    made = build.module.index_factory(16, description)
    made.train(vectors.numpy())
    if description.startswith("IDMap"):
        made.add_with_ids(vectors.numpy(), torch.arange(500).numpy())
    else:
        made.add(vectors.numpy())
    index = FaissIndex(made)
    index.description = description
    expected = index.reconstruct(index.ids[:20])
    again = WAYS[way](index, tmp_path / "index")
    del made, index
    gc.collect()
    # Another one's, or none, crashes faiss below.
    own, used = quantizer_of(build, again.faiss_index)
    assert used is not None
    assert int(used.this) == own
    torch.testing.assert_close(again.reconstruct(again.ids[:20]), expected)
    queries = torch.randn(5, 16, generator=generator, requires_grad=True)
    again.search(queries, k=3).scores.sum().backward()
    assert bool(queries.grad.isfinite().all())
