"""Files that end before the lists that faiss maps from them are refused: reading beyond ends the process."""

import os

import faiss
import pytest
import torch

from elips_torch import FaissIndex, merge_faiss_shards, read_faiss
from elips_torch.core.errors import IndexFileError
from elips_torch.engines.faiss.builds import load_installed
from elips_torch.engines.faiss.lists_on_disk import check_lists_on_disk


def shards(folder, around="", n=600):
    """Write two shards of one training, and return their paths."""
    vectors = torch.randn(2 * n, 16, generator=torch.Generator().manual_seed(0)).numpy()
    trained = faiss.index_factory(16, f"{around}IVF4,Flat")
    trained.train(vectors)
    paths = []
    for number in range(2):
        index = faiss.clone_index(trained)
        index.add(vectors[number * n : (number + 1) * n])
        paths.append(str(folder / f"{number}.faiss"))
        faiss.write_index(index, paths[-1])
    return paths


def cut(path, n_bytes):
    os.truncate(path, max(0, os.path.getsize(path) - n_bytes))


@pytest.mark.parametrize("around", ["", "PCA8,"])
@pytest.mark.parametrize("n_bytes", [8, 100, 5000, 15_000])
@pytest.mark.parametrize("which", [0, 1])
def test_a_shard_that_ends_too_early_is_named(tmp_path, which, n_bytes, around):
    paths = shards(tmp_path, around)
    cut(paths[which], n_bytes)
    with pytest.raises(IndexFileError, match=f"{which}.faiss.*ends too early"):
        merge_faiss_shards(paths, tmp_path / "all.faiss", shift_ids=True)
    assert sorted(os.listdir(tmp_path)) == ["0.faiss", "1.faiss"]


@pytest.mark.parametrize("n_bytes", [8, 100, 5000, 10**9])
@pytest.mark.parametrize("read", [read_faiss, FaissIndex.read])
def test_lists_beside_an_index_that_end_too_early_are_named(tmp_path, read, n_bytes):
    path = tmp_path / "all.faiss"
    assert merge_faiss_shards(shards(tmp_path), path, shift_ids=True) == 1200
    assert read(path).ntotal == 1200
    content = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    cut(f"{path}.ivfdata", n_bytes)
    with pytest.raises(IndexFileError, match=r"all\.faiss\.ivfdata.*ends too early"):
        read(path)
    state = FaissIndex.from_factory(16, "IVF4,Flat").state_dict()
    name = next(name for name, value in state.items() if value.dtype == torch.uint8)
    with pytest.raises((IndexFileError, RuntimeError), match="ends too early"):
        FaissIndex.from_factory(16, "IVF4,Flat").load_state_dict({**state, name: content})


def test_empty_lists_and_lists_in_memory_lie_anywhere(tmp_path):
    build = load_installed()
    paths = shards(tmp_path)
    empty = faiss.read_index(paths[0])
    empty.reset()
    check_lists_on_disk(build, empty)
    faiss.write_index(empty, str(tmp_path / "empty.faiss"))
    mapped = faiss.read_index(str(tmp_path / "empty.faiss"), faiss.IO_FLAG_MMAP)
    check_lists_on_disk(build, mapped, tmp_path / "empty.faiss")
    check_lists_on_disk(build, faiss.read_index(paths[0], faiss.IO_FLAG_MMAP), paths[0])
