import pytest
import torch
from safetensors.torch import save_file

from elips_torch import ArgumentError
from elips_torch.cli.datasets import clustered, read_dataset


def test_clustered_vectors_are_unit_vectors_with_near_neighbours():
    data = clustered(1000, 32, 50)
    assert data.database.shape == (1000, 32)
    assert data.queries.shape == (50, 32)
    assert data.dim == 32
    torch.testing.assert_close(data.database.norm(dim=1), torch.ones(1000))
    nearest = (data.queries @ data.database.T).amax(1)
    noise = torch.nn.functional.normalize(torch.randn(1000, 32, generator=torch.Generator().manual_seed(5)))
    assert nearest.mean() > (data.queries @ noise.T).amax(1).mean() + 0.1


def test_clustered_vectors_are_repeatable():
    first, again, other = clustered(50, 4, 3), clustered(50, 4, 3), clustered(50, 4, 3, seed=1)
    assert torch.equal(first.database, again.database)
    assert torch.equal(first.queries, again.queries)
    assert not torch.equal(first.database, other.database)


def test_sizes_must_be_positive():
    with pytest.raises(ArgumentError, match="0 vectors of dim 4"):
        clustered(0, 4, 3)


def test_a_file_is_read_as_it_is(tmp_path):
    tensors = {"a": torch.randn(3, 4).half(), "b": torch.randn(9, 4).half()}
    save_file(tensors, tmp_path / "some.safetensors")
    data = read_dataset(tmp_path / "some.safetensors", "a", "b")
    assert data.name == "some"
    assert data.description == "9 x 4, 3 queries, stored as float16"
    assert torch.equal(data.queries, tensors["a"])
    assert torch.equal(data.database, tensors["b"])
    assert data.to(torch.device("cpu"), torch.float32).database.dtype == torch.float32
