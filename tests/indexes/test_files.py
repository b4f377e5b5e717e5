"""Index files that are not what they say."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from elips_torch import FlatIndex, IndexFileError, load_index


@pytest.fixture
def saved(tmp_path):
    index = FlatIndex(3, "ip", k=2)
    index.add(torch.rand(5, 3), ids=[4, 3, 2, 1, 0])
    index.save(tmp_path / "index")
    with safe_open(tmp_path / "index", "pt") as file:
        header = file.metadata()
    return tmp_path / "index", load_file(tmp_path / "index"), header


def rewrite(path, tensors, header, **changes):
    save_file(tensors, path, metadata={**header, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "not an elips_torch index"),
        ({"version": "99"}, "version 99"),
        ({"index": "Nonsense"}, "holds Nonsense"),
        ({"config": "{"}, "damaged"),
        ({"config": json.dumps({"dim": 3, "surprise": 1})}, "does not fit"),
        ({"config": json.dumps({"dim": 4, "dtype": "float32"})}, "expected \\(N, 4\\)"),
        ({"config": json.dumps({"dim": 3, "dtype": "float16"})}, "settings say"),
        ({"config": json.dumps({"dim": 3, "metric": "l9"})}, "l9"),
    ],
)
def test_a_foreign_header_is_refused(saved, changes, message):
    path, tensors, header = saved
    rewrite(path, tensors, header, **changes)
    with pytest.raises(IndexFileError, match=message):
        load_index(path)
    with pytest.raises(IndexFileError):
        FlatIndex.load(path)


def test_tampered_tensors_are_refused(saved):
    path, tensors, header = saved
    cases = [
        ({**tensors, "ids": torch.zeros(5, dtype=torch.int64)}, "more than once"),
        ({**tensors, "ids": tensors["ids"][:3].clone()}, "differ in length"),
        ({**tensors, "vectors": tensors["vectors"].to(torch.int32)}, "dtype"),
        ({"vectors": tensors["vectors"]}, "Missing key"),
        ({**tensors, "more": torch.ones(1)}, "Unexpected key"),
    ]
    for changed, message in cases:
        rewrite(path, changed, header)
        with pytest.raises(IndexFileError, match=message):
            load_index(path)


def test_another_safetensors_file_is_refused(tmp_path):
    save_file({"weights": torch.ones(3)}, tmp_path / "weights")
    with pytest.raises(IndexFileError, match="not an elips_torch index"):
        load_index(tmp_path / "weights")


def test_a_failed_save_leaves_the_old_file(saved, monkeypatch):
    path, _, _ = saved
    before = path.read_bytes()

    def fail(*_args, **_options):
        raise OSError("disk full")

    monkeypatch.setattr("elips_torch.indexes.files.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        FlatIndex(3).save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["index"]


def test_saving_holds_the_database_whatever_the_state_dict_does(tmp_path):
    index = FlatIndex(3, index_in_state_dict=False)
    index.add(torch.rand(5, 3))
    index.save(tmp_path / "index")
    other = FlatIndex.load(tmp_path / "index")
    assert len(other) == 5
    assert other.index_in_state_dict is False
    assert not index.state_dict()
