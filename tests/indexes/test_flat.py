"""FlatIndex keeps the contract of every index, and some promises of its own."""

from typing import ClassVar

import pytest
import torch

from elips_torch import METRICS, FlatIndex
from elips_torch.testing import IndexContract
from elips_torch.testing.contract import Contract, assert_same


class TestFlatIndex(IndexContract):
    index_class = FlatIndex


class TestHalfFlatIndex(IndexContract):
    index_class = FlatIndex
    options: ClassVar = {"dtype": torch.float16}


class TestLearnableFlatIndex(IndexContract):
    index_class = FlatIndex
    options: ClassVar = {"learnable": True}


class TestEveryMetric(Contract):
    """Exactness and files of the remaining metrics."""

    index_class = FlatIndex

    @pytest.mark.parametrize("metric", [metric.name for metric in METRICS])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_every_metric_and_dtype_is_exact(self, metric, dtype, tmp_path):
        p = 3.0 if metric == "lp" else None
        index = self.filled(metric=metric, dtype=dtype, p=p)
        queries = self.vectors(6, seed=2)
        for k in (1, 7, 70):
            assert_same(index.search(queries, k), self.expected(index, queries, k))
        index.save(tmp_path / "index")
        assert_same(FlatIndex.load(tmp_path / "index").search(queries, 5), index.search(queries, 5))
