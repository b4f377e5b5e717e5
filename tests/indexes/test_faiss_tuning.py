"""Search parameters of indexes of faiss: set by text, and tuned by faiss's own parameter space."""

import pytest
import torch

from elips_torch import ArgumentError, DtypeError, FaissIndex, FlatIndex, ParameterError

DIM = 16


def data(n, seed=0):
    return torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed))


def test_faiss_tunes_itself():
    index = FaissIndex.from_factory(DIM, "IVF32_HNSW8,Flat").fit(data(2000))
    index.add(data(2000), ids=torch.arange(2000) + 7)
    exact = FlatIndex(DIM)
    exact.add(data(2000), ids=torch.arange(2000) + 7)
    index.set_parameters("nprobe=3,quantizer_efSearch=64")
    assert (index.nprobe, index.quantizer_efSearch) == (3, 64)
    assert index.parameter_ranges()["nprobe"] == [1, 2, 4, 8, 16]
    with pytest.raises(ParameterError, match="does not take the parameters 'speed=9', it has nprobe"):
        index.set_parameters("speed=9")
    with pytest.raises(DtypeError, match="parameters is 3, expected a str"):
        index.set_parameters(3)
    with pytest.raises(DtypeError, match=r"true_ids is .*, expected an int64 tensor"):
        index.explore(data(1), [[1]])
    with pytest.raises(DtypeError, match=r"experiments is 0\.5, expected an int"):
        index.explore(data(1), torch.zeros(1, 1).long(), experiments=0.5)
    queries = data(50, seed=2)
    points = index.explore(queries, exact.search(queries, 5).ids, experiments=12)
    assert index.nprobe == 3
    assert [point.recall for point in points] == sorted(point.recall for point in points)
    best = points[-1]
    index.set_parameters(best.parameters)
    hits = (index.search(queries, 5).ids[:, :, None] == exact.search(queries, 5).ids[:, None]).any(2)
    assert float(hits.float().mean()) == pytest.approx(best.recall)
    assert best.recall > 0.9


def test_parameters_are_set_as_faiss_reads_them():
    index = FaissIndex.from_factory(DIM, "IVF32_HNSW8,PQ4x4np,RFlat").fit(data(1500))
    for text in (
        "nprobe=6,quantizer_efSearch=20",
        "nprobe=6 quantizer_efSearch=20,k_factor_rf=2",
        "nprobe=6.0",
    ):
        index.set_parameters("nprobe=1,quantizer_efSearch=16,k_factor_rf=2")
        index.set_parameters(text)
        assert (index.nprobe, index.k_factor) == (6, 2)
        assert index.quantizer_efSearch == (20 if "=20" in text else 16)


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ("nprobe=0", ArgumentError, "nprobe is 0, expected at least 1"),
        ("quantizer_efSearch=9,nprobe=-5", ArgumentError, "nprobe is -5, expected at least 1"),
        ("quantizer_efSearch=9, nprobe=-5", ArgumentError, "nprobe is -5, expected at least 1"),
        (" nprobe=-3", ArgumentError, "nprobe is -3, expected at least 1"),
        ("nprobe=2.7", ArgumentError, r"nprobe is 2\.7, expected a whole number"),
        ("nprobe=1e10", ArgumentError, "nprobe is 10000000000, expected 1 to 2147483647"),
        ("k_factor_rf=0", ArgumentError, "k_factor_rf is 0, expected at least 1"),
        ("nprobe=inf", ParameterError, "nprobe is 'inf', expected a number"),
        ("nprobe=1_6", ParameterError, "nprobe is '1_6', expected a number"),
        ("k_factor_rf=nan", ParameterError, "k_factor_rf is 'nan', expected a number"),
        ("nprobe=abc", ParameterError, "nprobe is 'abc', expected a number"),
        ("nprobe", ParameterError, "nprobe is '', expected a number"),
    ],
)
def test_values_that_no_search_can_run_with_are_refused(parameters, error, message):
    index = FaissIndex.from_factory(DIM, "IVF32_HNSW8,PQ4x4np,RFlat", nprobe=3, k_factor=2.0)
    with pytest.raises(error, match=message):
        index.set_parameters(parameters)
    with pytest.raises(ArgumentError, match=r"nprobe is 2\.5, expected a whole number"):
        index.nprobe = 2.5
    assert (index.nprobe, index.k_factor, index.quantizer_efSearch) == (3, 2, 16)
