"""SQIndex keeps the contract of every index and agrees with faiss."""

from typing import ClassVar

import faiss
import pytest
import torch
from coded_contract import CodedContract, clustered, recall

from elips_torch import ArgumentError, SQIndex, knn
from elips_torch.quantizers.scalar import QTYPES


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
