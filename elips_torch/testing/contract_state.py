"""Contract of an index as a module: checkpoints, copies, files, dtypes, modes."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from elips_torch.core.errors import IndexFileError
from elips_torch.indexes.base import Index
from elips_torch.indexes.catalog import load_index
from elips_torch.testing.contract import Contract, assert_same, snapshot, unchanged


class _Model(nn.Module):
    """A module with an index inside."""

    def __init__(self, index: Index) -> None:
        super().__init__()
        self.encoder = nn.Linear(index.dim, index.dim)
        self.memory = nn.ModuleDict({"index": index})


class StateContract(Contract):
    """The module's state."""

    def assert_equal(self, one: Index, other: Index) -> None:
        """Fail unless two indexes hold and answer the same."""
        assert_state_equal(snapshot(one), snapshot(other))
        queries = self.vectors(5, seed=2)
        assert_same(one.search(queries, k=7), other.search(queries, k=7))
        assert one.add(self.vectors(1)).tolist() == other.add(self.vectors(1)).tolist()

    def test_state_dict_owns_exactly_its_rows(self) -> None:
        index = self.make()
        for _ in range(5):
            index.add(self.vectors(7))
        for name, tensor in index.state_dict().items():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
        for name in index.row_tensors:
            assert index.state_dict()[name].shape[0] == 35

    def test_state_dict_loads_into_another_size(self) -> None:
        for size in (0, 5, 60, 100):
            index, other = self.filled(60), self.filled(size)
            other.load_state_dict(index.state_dict())
            self.assert_equal(index, other)

    def test_state_dict_loads_nested_and_from_a_weights_only_file(self) -> None:
        index = self.filled(60)
        file = io.BytesIO()
        torch.save(_Model(index).state_dict(), file)
        file.seek(0)
        for assign in (False, True):
            other = _Model(self.filled(5))
            file.seek(0)
            other.load_state_dict(torch.load(file, weights_only=True), assign=assign)
            restored = other.memory["index"]
            assert isinstance(restored, Index)
            self.assert_equal(copy.deepcopy(index), restored)

    def test_an_index_made_on_the_meta_device_takes_a_state(self) -> None:
        index = self.filled(60)
        if set(index.state_dict()) != {*index.row_tensors, "next_id"}:
            pytest.skip("what this index has learned cannot be made on the meta device")
        with torch.device("meta"):
            other = self.make()
        other.load_state_dict(index.state_dict(), assign=True)
        self.assert_equal(index, other)

    def test_a_loaded_state_is_a_copy(self) -> None:
        index, other = self.filled(60), self.make()
        state = index.state_dict()
        other.load_state_dict(state)
        with unchanged(index):
            other.upsert(self.vectors(60, seed=8), other.ids.clone())

    def test_a_bad_state_dict_is_refused(self) -> None:
        index, other = self.filled(60), self.filled(5)
        state = index.state_dict()
        # Wrappers keep their ids in the index within.
        ids, next_id = (
            next(key for key in state if key.split(".")[-1] == name) for name in ("ids", "next_id")
        )
        cases: list[tuple[dict[str, Any], str]] = [
            ({key: value for key, value in state.items() if key != ids}, "Missing key"),
            ({**state, "extra": torch.ones(1)}, "Unexpected key"),
            ({**state, ids: state[ids][:-1]}, "differ in length"),
            ({**state, ids: torch.zeros_like(state[ids])}, "more than once"),
            ({**state, next_id: torch.tensor(3)}, "expected 0 <= id < 3"),
            ({**state, ids: state[ids].float()}, "dtype"),
        ]
        for bad, message in cases[2:]:
            with unchanged(other), pytest.raises(RuntimeError, match=message):
                other.load_state_dict(bad)
        for bad, message in cases[:2]:
            with pytest.raises(RuntimeError, match=message):
                other.load_state_dict(bad)
        assert other.load_state_dict({}, strict=False).missing_keys

    def test_the_database_can_stay_out_of_the_state_dict(self) -> None:
        index = self.filled(10, index_in_state_dict=False)
        model = _Model(index)
        assert not [name for name in model.state_dict() if name.startswith("memory")]
        with unchanged(index):
            model.load_state_dict(model.state_dict())
        assert len(index) == 10

    def test_copies_are_independent_and_lean(self) -> None:
        index = self.make()
        for _ in range(4):
            index.add(self.vectors(15))
        clones = [copy.deepcopy(index), pickle.loads(pickle.dumps(index))]
        for clone in clones:
            for name in index.row_tensors:
                tensor = getattr(clone, name)
                assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
            with unchanged(index):
                clone.remove(clone.ids[:10].clone())
                clone.add(self.vectors(3))
            assert_same(
                clone.search(self.vectors(3), 50), self.expected(clone, self.vectors(3), 50)
            ) if clone.is_exact else None

    def test_share_memory(self) -> None:
        index = self.filled(20).share_memory()
        assert all(buffer.is_shared() for buffer in index.buffers())
        index.add(self.vectors(2))
        assert len(index) == 22

    def test_train_and_eval_change_nothing(self) -> None:
        index = self.filled(20)
        with unchanged(index):
            assert index.eval().training is False
            assert index.train().training is True

    def test_half_changes_vectors_and_nothing_else(self) -> None:
        for change in ("half", "bfloat16", "float", "double"):
            index = self.filled(20)
            ids = index.ids.clone()
            index = getattr(index, change)()
            assert index.ids.dtype == torch.int64
            assert torch.equal(index.ids, ids)
            assert index.search(self.vectors(3), k=5).scores.dtype == torch.float32
            index.add(self.vectors(3))
            assert len(index) == 23
            if index.is_exact:
                queries = self.vectors(3, seed=2)
                assert_same(index.search(queries, 5), self.expected(index, queries, 5))

    def test_files_round_trip(self, tmp_path: Path) -> None:
        path = tmp_path / "index.safetensors"
        for metric in ("l2", "cosine"):
            index = self.filled(metric=metric, k=4)
            index.save(path)
            for other in (self.index_class.load(path), load_index(path)):
                assert type(other) is self.index_class
                assert other.config() == index.config()
                self.assert_equal(copy.deepcopy(index), other)
        assert [entry.name for entry in tmp_path.iterdir()] == ["index.safetensors"]

    def test_damaged_files_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "index.safetensors"
        self.filled().save(path)
        whole = path.read_bytes()
        for content in (whole[:-9], whole[:20], b"", b"not an index at all"):
            path.write_bytes(content)
            with pytest.raises(IndexFileError, match="index\\.safetensors"):
                self.index_class.load(path)
        with pytest.raises(FileNotFoundError):
            load_index(tmp_path / "nothing")

    def test_an_index_filled_in_inference_mode_can_be_trained_through(self) -> None:
        index = self.make()
        with torch.inference_mode():
            for _ in range(3):
                index.add(self.vectors(20, seed=index.ntotal))
            index.upsert(self.vectors(5, seed=3), index.ids[:5].clone())
            index.remove(index.ids[5:9].clone())
        queries = self.vectors(4, seed=2).requires_grad_()
        index.search(queries, k=5).scores.sum().backward()
        assert queries.grad is not None
        assert queries.grad.abs().sum() > 0
        index.add(self.vectors(2))
        assert not any(tensor.is_inference() for tensor in index.buffers())

    def test_deterministic_mode(self) -> None:
        index = self.filled()
        queries = self.vectors(4, seed=2).requires_grad_()
        wanted = index.search(queries.detach(), k=5)
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            found = index.search(queries, k=5)
            found.scores.sum().backward()
            index.add(self.vectors(2))
            index.range_search(queries.detach(), 0.5)
        finally:
            torch.use_deterministic_algorithms(before)
        assert_same(found, wanted)


def assert_state_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Fail unless two state dictionaries hold the same."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=0, msg=name)
