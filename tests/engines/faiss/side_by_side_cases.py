import faiss
import pytest
import torch

from elips_torch.core.errors import ParameterError
from elips_torch.engines.faiss.builds import load_installed
from elips_torch.engines.faiss.search_parameters import parameter_holders, search_parameters

DIM = 8


def test_indexes_side_by_side_have_their_parameters_set_together():
    vectors = torch.randn(400, DIM, generator=torch.Generator().manual_seed(0))
    build = load_installed()
    index = faiss.IndexReplicas(DIM)
    # It owns none of them.
    parts = [faiss.index_factory(DIM, "IVF8,Flat") for _ in range(2)]
    for part in parts:
        part.train(vectors.numpy())
        part.add(vectors.numpy())
        index.add_replica(part)
    holder, attribute = parameter_holders(build, index)["nprobe"]
    setattr(holder, attribute, 5)
    assert getattr(holder, attribute) == 5
    assert [part.nprobe for part in parts] == [5, 5]
    with pytest.raises(
        ParameterError, match=r"takes nprobe for no single call over several GPUs; set index\."
    ):
        search_parameters(build, index, {"nprobe": 3})
    assert search_parameters(build, index, {}) is None
