"""SQIndex keeps the contract of every index and agrees with faiss."""

from typing import ClassVar

import faiss
import pytest
import torch
from coded_contract import CodedContract, clustered, recall

from elips_torch import ArgumentError, SearchResult, SQIndex, knn
from elips_torch.core.hardware import device_facts
from elips_torch.core.native import native_reasons
from elips_torch.quantizers.scalar import QTYPES
from elips_torch.reference.knn import knn as reference_knn
from elips_torch.testing.contract import assert_same

NO_NATIVE = native_reasons(device_facts("cpu"))


class TestSQIndex(CodedContract):
    index_class = SQIndex


class TestFourBitSQIndex(CodedContract):
    index_class = SQIndex
    dim: ClassVar = 13
    options: ClassVar = {"qtype": "int4"}


class TestShortFloatSQIndex(CodedContract):
    index_class = SQIndex
    options: ClassVar = {"qtype": "bf16"}
    needs_fit = False

    def screen_bytes(self):
        # An int8 copy, and four float32 numbers.
        return self.dim + 16


FAISS = {
    "int8": faiss.ScalarQuantizer.QT_8bit,
    "int6": faiss.ScalarQuantizer.QT_6bit,
    "int4": faiss.ScalarQuantizer.QT_4bit,
    "fp16": faiss.ScalarQuantizer.QT_fp16,
    "bf16": faiss.ScalarQuantizer.QT_bf16,
}
METRICS = {"l2": faiss.METRIC_L2, "ip": faiss.METRIC_INNER_PRODUCT}


@pytest.mark.parametrize("qtype", QTYPES)
@pytest.mark.parametrize("metric", METRICS)
def test_recall_and_scores_are_those_of_faiss(qtype, metric):
    database, queries = clustered(3000, 24, 0), clustered(150, 24, 1)
    theirs = faiss.IndexScalarQuantizer(24, FAISS[qtype], METRICS[metric])
    theirs.train(database.numpy())
    theirs.add(database.numpy())
    their_scores, their_ids = map(torch.from_numpy, theirs.search(queries.numpy(), 10))
    ours = SQIndex(24, qtype, metric).fit(database)
    ours.add(database)
    scores, ids = ours.search(queries, 10)
    # Faiss rounds some halves up when it makes a bfloat16.
    atol = 1e-3 if qtype != "bf16" else 0.1
    torch.testing.assert_close(scores, their_scores, rtol=1e-4, atol=atol)
    truth = knn(queries, database, 10, metric=metric).ids

    assert recall(ids, truth) >= recall(their_ids, truth) - 0.005
    assert recall(ids, truth) > 0.5


def test_bad_construction_is_refused():
    with pytest.raises(ArgumentError, match="'int7', expected one of 'int8'"):
        SQIndex(4, "int7")


def test_repr_shows_what_matters():
    index = SQIndex(5, "int6", "ip")
    assert repr(index) == (
        "SQIndex(dim=5, metric='ip', ntotal=0, k=10, dtype=float32, code_size=4, not fitted, qtype='int6')"
    )


@pytest.mark.parametrize("metric", ["l2", "cosine", "braycurtis", "canberra"])
def test_few_and_many_queries_find_the_same(metric, monkeypatch):
    database, queries = clustered(800, 13, 0).abs(), clustered(20, 13, 1).abs()
    index = SQIndex(13, "int6", metric).fit(database)
    index.add(database)
    mask = torch.rand(20, 800, generator=torch.Generator().manual_seed(3)) < 0.2
    few = index.search(queries, 10, mask=mask)
    assert_same(few, reference_knn(queries, index.reconstruct(index.ids), 10, metric, mask=mask))
    # Tiles of a few rows.
    monkeypatch.setattr("elips_torch.kernels.knn_decoded._PREFERRED_FEATURES", 700)
    assert_same(index.search(queries, 10, mask=mask, implementation="decoded"), few)
    monkeypatch.setattr("elips_torch.ops.coded_search.MANY_QUERIES", 1)
    assert_same(index.search(queries, 10, mask=mask, implementation="decoded"), few)


@pytest.mark.skipif(bool(NO_NATIVE), reason="; ".join(NO_NATIVE))
@pytest.mark.parametrize("qtype", QTYPES)
@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_native_and_decoded_search_are_the_same(qtype, metric):
    for dim in (5, 13, 31, 67):
        database, queries = clustered(700, dim, 0), clustered(40, dim, 1)
        # Features that do not vary, and rows that tie.
        database[:, 1::4] = 0.5
        database[300:350] = database[:50]
        index = SQIndex(dim, qtype, metric).fit(database)
        index.add(database, ids=torch.randperm(700, generator=torch.Generator().manual_seed(2)))
        assert index.explain(queries, implementation="native").chosen == "native"
        mask = torch.rand(40, 700, generator=torch.Generator().manual_seed(3)) < 0.3
        exclude = index.search(queries, 6).ids
        for n in (1, 6, 40):
            for options in ({}, {"mask": mask[:n]}, {"exclude": exclude[:n]}):
                found = index.search(queries[:n], 20, implementation="native", **options)
                assert_same(found, index.search(queries[:n], 20, implementation="decoded", **options))


@pytest.mark.parametrize("qtype", ["fp16", "bf16"])
def test_rows_that_hold_nan_come_last(qtype):
    index = SQIndex(13, qtype, check_finite=False)
    database = clustered(200, 13, 0)
    database[5, 3] = torch.nan
    database[9, 1] = torch.inf
    index.add(database)
    queries = clustered(6, 13, 1)
    scores, ids = index.search(queries, 200)
    assert (ids[:, -1] == 5).all()
    assert (ids[:, -2] == 9).all()
    for implementation in ("auto", "decoded"):
        found = index.search(queries, 10, implementation=implementation)
        assert_same(found, SearchResult(scores[:, :10], ids[:, :10]))
