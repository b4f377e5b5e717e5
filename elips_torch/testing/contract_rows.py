"""Contract of the verbs that change an index: ids, order, failure without effect."""

from typing import Any

import numpy as np
import pytest
import torch

from elips_torch.core.errors import (
    ArgumentError,
    DeviceError,
    DtypeError,
    DuplicateIdError,
    ElipsError,
    NonFiniteError,
    ShapeError,
    UnknownIdError,
)
from elips_torch.testing.contract import Contract, unchanged


class RowContract(Contract):
    """Adding, replacing and removing vectors."""

    def test_automatic_ids_ascend_from_zero(self) -> None:
        index = self.make()
        assert index.add(self.vectors(3)).tolist() == [0, 1, 2]
        assert index.add(self.vectors(2)).tolist() == [3, 4]
        assert index.ids.tolist() == [0, 1, 2, 3, 4]
        assert len(index) == index.ntotal == 5

    def test_automatic_ids_follow_the_largest_ever_used(self) -> None:
        index = self.make()
        index.add(self.vectors(2), ids=torch.tensor([100, 7]))
        index.remove(100)
        assert index.add(self.vectors(1)).tolist() == [101]
        index.reset()
        assert index.add(self.vectors(1)).tolist() == [102]

    def test_ids_keep_the_order_of_insertion(self) -> None:
        index = self.make()
        index.add(self.vectors(4), ids=[9, 3, 5, 1])
        index.remove([3])
        index.upsert(self.vectors(2, seed=5), [1, 2])
        assert index.ids.tolist() == [9, 5, 1, 2]
        assert index.ids.dtype == torch.int64

    def test_membership(self) -> None:
        index = self.filled()
        assert 3 in index
        assert torch.tensor(3) in index
        assert 1 not in index
        assert -1 not in index
        assert "3" not in index

    def test_upsert_replaces_and_adds(self) -> None:
        index = self.filled(20)
        fresh = self.vectors(3, seed=9)
        returned = index.upsert(fresh, [6, 1000, 0])
        assert returned.tolist() == [6, 1000, 0]
        assert len(index) == 21
        again = self.make()
        again.add(fresh, ids=[6, 1000, 0])
        torch.testing.assert_close(index.reconstruct([6, 1000, 0]), again.reconstruct([6, 1000, 0]))

    def test_remove_returns_the_number_and_forgets(self) -> None:
        index = self.filled(20)
        kept = index.reconstruct([3, 9])
        assert index.remove(torch.tensor([0, 6, 12])) == 3
        assert index.remove([]) == 0
        assert len(index) == 17
        assert 6 not in index
        torch.testing.assert_close(index.reconstruct([3, 9]), kept, rtol=0, atol=0)
        found = index.search(self.vectors(5, seed=3), k=20).ids
        assert not torch.isin(found, torch.tensor([0, 6, 12])).any()

    def test_removed_ids_can_come_back(self) -> None:
        index = self.filled(30)
        queries = self.vectors(4, seed=3)
        before = index.search(queries, k=5)
        gone = index.ids[::2].clone()
        vectors = index.reconstruct(gone).float()
        index.remove(gone)
        index.add(vectors, ids=gone)
        after = index.search(queries, k=5)
        if index.is_exact:
            torch.testing.assert_close(after.ids, before.ids, rtol=0, atol=0)
        assert len(index) == 30

    def test_reset_empties(self) -> None:
        index = self.filled()
        index.reset()
        assert len(index) == 0
        assert index.search(self.vectors(2), k=3).ids.tolist() == [[-1] * 3] * 2

    def test_an_empty_batch_is_no_error(self) -> None:
        index = self.filled()
        with unchanged(index):
            assert index.add(self.vectors(0)).tolist() == []
            assert index.upsert(self.vectors(0), []).tolist() == []

    def test_added_vectors_are_copied(self) -> None:
        index = self.make()
        vectors = self.vectors(4)
        index.add(vectors)
        stored = index.reconstruct([0, 1, 2, 3]).clone()
        vectors.zero_()
        torch.testing.assert_close(index.reconstruct([0, 1, 2, 3]), stored, rtol=0, atol=0)

    def test_reconstruct_takes_one_id(self) -> None:
        index = self.filled()
        assert index.reconstruct(3).shape == (self.dim,)
        assert index.reconstruct(torch.tensor(3)).shape == (self.dim,)
        assert index.reconstruct([3, 6]).shape == (2, self.dim)
        assert index.reconstruct([]).shape == (0, self.dim)

    @pytest.mark.parametrize("verb", ["add", "upsert"])
    def test_bad_vectors_are_refused(self, verb: str) -> None:
        index = self.filled()
        good = self.vectors(2)
        poor = good.clone()
        poor[1, 0] = float("nan")
        huge = good.clone()
        huge[0, 0] = float("inf")
        cases = [
            (torch.rand(2, self.dim + 1), ShapeError, f"vectors has dim {self.dim + 1}"),
            (torch.rand(self.dim), ShapeError, "expected"),
            (torch.ones(2, self.dim, dtype=torch.int32), DtypeError, "int32"),
            (np.zeros((2, self.dim), dtype=np.float32), DtypeError, "ndarray"),
            (good.to("meta"), DeviceError, "vectors is on meta, the index is on cpu"),
            (poor, NonFiniteError, "row 1"),
            (huge, NonFiniteError, "row 0"),
        ]
        for vectors, error, message in cases:
            with unchanged(index), pytest.raises(error, match=message):
                getattr(index, verb)(vectors, ids=[1, 2])

    def test_bad_ids_are_refused(self) -> None:
        index = self.filled()
        vectors = self.vectors(2)
        cases: list[tuple[Any, type[ElipsError], str]] = [
            ([1, 1], DuplicateIdError, "1 more than once"),
            ([1, 3], DuplicateIdError, "3, which the index holds already"),
            ([1, -2], ArgumentError, "negative id -2"),
            ([1], ShapeError, "1 entries, expected 2"),
            (torch.tensor([1.0, 2.0]), DtypeError, "float32"),
            ("ab", DtypeError, "str"),
            (torch.tensor([[1, 2]]), ShapeError, "expected"),
            ([1, 2**63 - 1], ArgumentError, "9223372036854775807"),
        ]
        for ids, error, message in cases:
            with unchanged(index), pytest.raises(error, match=message):
                index.add(vectors, ids=ids)

    def test_unknown_ids_are_refused(self) -> None:
        index = self.filled()
        for verb in (index.remove, index.reconstruct):
            with unchanged(index), pytest.raises(UnknownIdError, match="ids has 1, 2, expected"):
                verb([3, 1, 2])
        with unchanged(index), pytest.raises(DuplicateIdError, match="3 more than once"):
            index.remove([3, 3])
        with unchanged(index), pytest.raises(KeyError):
            index.remove(1)

    def test_the_finite_check_can_be_switched_off(self) -> None:
        index = self.make(check_finite=False)
        vectors = self.vectors(3)
        vectors[1, 0] = float("nan")
        index.add(vectors)
        assert len(index) == 3
