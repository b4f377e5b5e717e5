import copy
from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
import pytest
import torch
from faiss_agreement import assert_finds_the_same, uniform

from elips_torch import (
    ITQ,
    OPQ,
    PCA,
    AffineMap,
    ConversionError,
    DeviceError,
    DtypeError,
    FlatIndex,
    ImplementationError,
    Index,
    IVFFlatIndex,
    IVFPQIndex,
    IVFSQIndex,
    NonFiniteError,
    PQIndex,
    PreTransformIndex,
    RefineIndex,
    SQIndex,
    from_faiss,
    index_factory,
    read_faiss,
    write_faiss,
)
from elips_torch.testing.contract import assert_same

DIM = 16
TRAINING = uniform(320, seed=9)
METRICS = ("l2", "ip", "cosine", "l1", "linf", "lp", "canberra", "braycurtis", "jensenshannon", "gower")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("family", ["flat", "ivf"])
def test_every_metric_of_vectors(metric, family):
    p = 2.5 if metric == "lp" else None
    made = FlatIndex(DIM, metric, p=p) if family == "flat" else IVFFlatIndex(DIM, 5, metric, p=p, nprobe=3)
    index = made.fit(TRAINING)
    index.add(uniform(100), ids=torch.arange(100).flip(0))
    there = index.to_faiss()
    assert_finds_the_same(index, there, uniform(20, seed=2))
    back = from_faiss(there)
    assert type(back) is type(index)
    assert back.metric == metric
    assert back.p == index.p
    assert_finds_the_same(back, there, uniform(20, seed=2))


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize(
    "description",
    [
        "Flat", "SQ8", "SQ6", "SQ4", "SQfp16", "SQbf16", "PQ4x4np", "IVF8,Flat", "IVF8,SQ8", "IVF8,SQfp16",
        "IVF8,PQ4x4np", "PCA8,Flat", "PCAR8,Flat", "PCAWR8,Flat", "PCAW8,SQ8", "OPQ4_8,IVF8,PQ4x4np",
        "RR8,Flat", "L2norm,Flat", "L2norm,IVF8,Flat", "ITQ8,Flat", "IDMap,Flat", "IDMap2,PCA8,IVF8,Flat",
        "IVF8,PQ4x4np,RFlat", "PCA8,IVF8,SQ8,Refine(SQfp16)", "L2norm,PCA8,IVF8,Flat", "PCA8,L2norm,Flat",
        "IVF8(Flat),Flat", "IVF8(SQ8),Flat",
    ],
)  # fmt: skip
def test_what_faiss_makes_is_an_index_like_any_other(description, metric, tmp_path):
    kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    made = faiss.index_factory(DIM, description, kind)
    made.train(TRAINING.numpy())
    # Where codes are bf16, faiss 1.15 rounds queries to that.
    vectors, queries = uniform(200, seed=1), uniform(30, seed=2).bfloat16().float()
    if description.startswith("IDMap"):
        made.add_with_ids(vectors.numpy(), np.arange(200)[::-1] * 3)
    else:
        made.add(vectors.numpy())
    inner = faiss.try_extract_index_ivf(made)
    if inner is not None:
        inner.nprobe = 3
    here = from_faiss(made)
    assert_finds_the_same(here, made, queries)
    write_faiss(here, tmp_path / "a.faiss")
    assert_finds_the_same(here, faiss.read_index(str(tmp_path / "a.faiss")), queries)
    faiss.write_index(made, str(tmp_path / "b.faiss"))
    assert_same(read_faiss(tmp_path / "b.faiss").search(queries, 10), here.search(queries, 10))
    # It grows, loses rows, is copied and saved.
    here.add(uniform(3, seed=5))
    here.remove(here.ids[:2].clone())
    here.save(tmp_path / "c")
    assert_same(type(here).load(tmp_path / "c").search(queries, 10), here.search(queries, 10))
    assert len(here.reconstruct(here.ids)) == 201


def test_ids_are_numbered_by_faiss_where_it_would_give_the_same():
    index = FlatIndex(DIM)
    index.add(uniform(10))
    assert isinstance(index.to_faiss(), faiss.IndexFlat)
    index.remove(4)
    assert isinstance(index.to_faiss(), faiss.IndexIDMap2)
    there = index.to_faiss()
    assert faiss.vector_to_array(there.id_map).tolist() == index.ids.tolist()
    assert np.array_equal(there.reconstruct(7), index.reconstruct(7).numpy())
    lists = IVFFlatIndex(DIM, 4).fit(TRAINING)
    lists.add(uniform(5), ids=[9, 3, 7, 5, 8])
    assert isinstance(lists.to_faiss(), faiss.IndexIVFFlat)
    assert from_faiss(lists.to_faiss()).ids.tolist() == [3, 5, 7, 8, 9]
    # Where faiss keeps the order, it comes back.
    refined = RefineIndex(IVFFlatIndex(DIM, 4)).fit(TRAINING)
    refined.add(uniform(5), ids=[9, 3, 7, 5, 8])
    assert from_faiss(refined.to_faiss()).ids.tolist() == [9, 3, 7, 5, 8]


def test_faiss_goes_on_with_what_went_there():
    index = IVFPQIndex(DIM, 5, 4, 4, nprobe=5, min_points_per_centroid=1).fit(TRAINING)
    index.add(uniform(50), ids=torch.arange(50) * 2)
    there = index.to_faiss()
    more = uniform(5, seed=7)
    there.add_with_ids(more.numpy(), np.arange(1000, 1005))
    assert there.remove_ids(np.array([0, 4])) == 2
    index.add(more, ids=torch.arange(1000, 1005))
    index.remove([0, 4])
    assert_finds_the_same(index, there, uniform(20, seed=2))
    there.set_direct_map_type(faiss.DirectMap.Hashtable)
    assert np.allclose(there.reconstruct(6), index.reconstruct(6).numpy(), atol=1e-6)


def test_precomputed_tables_are_made_where_asked_for():
    index = IVFPQIndex(DIM, 5, 4, 4, nprobe=3, min_points_per_centroid=1).fit(TRAINING)
    index.add(uniform(50))
    with_tables, without = index.to_faiss(precomputed_tables=True), index.to_faiss(precomputed_tables=False)
    assert with_tables.precomputed_table.size() == 5 * 4 * 16
    assert without.precomputed_table.size() == 0
    for there in (with_tables, without):
        assert_finds_the_same(index, there, uniform(20, seed=2))


def test_what_is_not_trained_goes_untrained():
    cases = [
        SQIndex(DIM),
        PQIndex(DIM, 4),
        IVFFlatIndex(DIM, 4, nprobe=2),
        IVFSQIndex(DIM, 4, "int4", by_residual=False),
        IVFPQIndex(DIM, 4, 2, 4),
        PreTransformIndex(PCA(DIM, 8), IVFFlatIndex(8, 4)),
        PreTransformIndex(OPQ(DIM, 2), PQIndex(DIM, 2, 4)),
        RefineIndex(IVFFlatIndex(DIM, 4, "cosine")),
    ]
    for index in cases:
        there = index.to_faiss()
        assert not there.is_trained
        back = from_faiss(there)
        assert type(back) is type(index)
        assert not back.is_trained
        assert "not fitted" not in repr(back) or "not fitted" in repr(index)
    there = cases[5].to_faiss()
    there.train(TRAINING.numpy())
    there.add(uniform(50).numpy())
    assert_finds_the_same(from_faiss(there), there, uniform(20, seed=2))


def test_a_coarse_index_of_ones_own_comes_along():
    index = IVFFlatIndex(DIM, 6, nprobe=2, coarse=SQIndex(DIM, "fp16")).fit(TRAINING)
    index.add(uniform(100))
    there = index.to_faiss()
    assert isinstance(faiss.downcast_index(there.quantizer), faiss.IndexScalarQuantizer)
    back = from_faiss(there)
    assert isinstance(back.coarse, SQIndex)
    assert back.nprobe == 2
    assert_same(back.search(uniform(20, seed=2)), index.search(uniform(20, seed=2)))


def test_nothing_is_shared():
    index = FlatIndex(DIM)
    index.add(uniform(10))
    there = index.to_faiss()
    back = from_faiss(there)
    before = back.vectors.clone()
    index.vectors.zero_()
    there.reset()
    del there
    assert torch.equal(back.vectors, before)
    back.vectors.zero_()
    assert copy.deepcopy(back).vectors.sum() == 0


def test_what_has_no_counterpart_there_is_refused():
    class Strange(FlatIndex):
        pass

    class Stranger(Index):
        _search = _range_search = config = _encode = _decode = None

    own = PreTransformIndex(AffineMap(DIM).give(torch.eye(DIM)), FlatIndex(DIM))
    assert own.to_faiss().is_trained
    assert Strange(DIM).to_faiss().ntotal == 0
    l2_lists = IVFFlatIndex(DIM, 4, "cosine", coarse=FlatIndex(DIM, "l2"))
    residuals = IVFSQIndex(DIM, 4, metric="ip", coarse=FlatIndex(DIM, "l2"))
    cases = [
        (Stranger(DIM), "Stranger has no counterpart"),
        (SQIndex(DIM, metric="cosine"), r"PreTransformIndex\(L2Normalize"),
        (IVFPQIndex(DIM, 4, 2, metric="cosine"), r"PreTransformIndex\(L2Normalize"),
        (SQIndex(DIM, metric="l1"), "codes under 'l2' and 'ip', the metric is 'l1'"),
        (IVFSQIndex(DIM, 4, metric="l1"), "codes under 'l2' and 'ip', the metric is 'l1'"),
        (PreTransformIndex(ITQ(DIM, 8), FlatIndex(8)), "an untrained ITQ"),
        (l2_lists, "a coarse index under 'l2' does not fit the metric 'cosine'"),
        (residuals, "a coarse index under 'l2' does not fit the metric 'ip'"),
    ]
    for index, message in cases:
        with pytest.raises(ConversionError, match=message):
            index.to_faiss()


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("HNSW8", "IndexHNSWFlat, which has no counterpart.*FaissIndex"),
        ("LSH", "IndexLSH"),
        ("IDMap,HNSW8", "index is IndexIDMap, its index is IndexHNSWFlat, which"),
        (
            "IVF4_HNSW8,Flat",
            "index is IndexIVFFlat, its quantizer is IndexHNSWFlat, which.* serves the index",
        ),
        ("PCA8,IVF4_HNSW8,PQ4x4", "PreTransform, its index is IndexIVFPQ, its quantizer is IndexHNSWFlat"),
        ("HNSW8,RFlat", "index is IndexRefineFlat, its base_index is IndexHNSWFlat, which"),
        ("PQ4x4fs", "IndexPQFastScan"),
        ("PQ4x5", "pq.nbits=5"),
        ("SQ8bit_uniform", ""),
        ("Pad32,Flat", "RemapDimensionsTransform"),
        ("RQ2x4", "IndexResidualQuantizer"),
        ("Flat,Refine(PQ4x4np)", "refines by other than"),
    ],
)
def test_what_has_no_counterpart_here_is_named(description, message):
    if description == "SQ8bit_uniform":
        made, message = faiss.IndexScalarQuantizer(DIM, faiss.ScalarQuantizer.QT_8bit_uniform), "sq.qtype=2"
    else:
        made = faiss.index_factory(DIM, description)
    with pytest.raises(ConversionError, match=message):
        from_faiss(made)


def test_settings_that_change_results_are_named():
    lists = IVFPQIndex(DIM, 4, 2, 4).to_faiss()
    lists.max_codes = 100
    with pytest.raises(ConversionError, match="max_codes=100"):
        from_faiss(lists)
    lists.max_codes, lists.polysemous_ht = 0, 3
    with pytest.raises(ConversionError, match="polysemous_ht=3"):
        from_faiss(lists)
    parts = PQIndex(DIM, 2, 4).to_faiss()
    parts.search_type = faiss.IndexPQ.ST_SDC
    with pytest.raises(ConversionError, match="search_type=3"):
        from_faiss(parts)


def test_what_no_index_may_hold_is_refused():
    bad = faiss.IndexFlatL2(DIM)
    vectors = uniform(4)
    vectors[2, 1] = torch.nan
    bad.add(vectors.numpy())
    with pytest.raises(NonFiniteError, match="row 2"):
        from_faiss(bad)
    for ids, message in (([1, 1, 2], "1"), ([-4, 1, 2], "-4 to 2")):
        twice = faiss.index_factory(DIM, "IDMap,Flat")
        twice.add_with_ids(uniform(3).numpy(), np.array(ids))
        with pytest.raises(ConversionError, match=f"ids.*{message}"):
            from_faiss(twice)
    with pytest.raises(DtypeError, match=r"index is of type str, .*; read_faiss and .* read files"):
        from_faiss("a.faiss")
    with pytest.raises(DtypeError, match="index is of type list, expected an index of faiss"):
        from_faiss([1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to ask for")
def test_a_gpu_where_there_is_none_is_refused():
    index = FlatIndex(DIM)
    # A build without code for GPUs says that.
    with pytest.raises((DeviceError, ImplementationError), match=r"GPU 0|has no GPU code"):
        index.to_faiss("cuda")
    with pytest.raises(DeviceError, match="no CUDA device"):
        from_faiss(index.to_faiss(), device="cuda")
    with pytest.raises(DeviceError, match="device is mps"):
        index.to_faiss("mps")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_indexes_on_gpus_come_and_go():
    index = IVFFlatIndex(DIM, 4, nprobe=4).fit(TRAINING)
    index.add(uniform(100))
    there = index.cuda().to_faiss("cuda")
    assert type(there).__name__ == "GpuIndexIVFFlat"
    back = from_faiss(there, "cuda")
    assert back.vectors.is_cuda
    assert_same(back.search(uniform(9).cuda()), index.search(uniform(9).cuda()))


@pytest.mark.parametrize("description", ["Flat", "SQ8", "IVF4,Flat", "PCA8,IVF4,SQ8"])
def test_a_name_that_nothing_has_gets_all_that_there_are(description):
    index = index_factory(DIM, description)
    index = index if index.is_trained else index.fit(TRAINING)
    index.add(uniform(50))
    with pytest.raises(ImplementationError, match=r"implementation is 'fais', \w+ has 'auto', .*'faiss'"):
        index.search(uniform(3), 2, implementation="fais")


def test_threads_search_one_index_through_faiss():
    index = IVFFlatIndex(DIM, 8, nprobe=8).fit(TRAINING)
    index.add(TRAINING)
    queries = uniform(64, seed=2)
    wanted = index.search(queries, 5)
    fresh = copy.deepcopy(index)

    def search(_):
        return fresh.search(queries, 5, implementation="faiss")

    # The first searches meet where the mirror is made.
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(search, range(12)):
            assert torch.equal(found.ids, wanted.ids)


def test_an_index_without_features_is_named():
    with pytest.raises(ConversionError, match="IndexFlatL2 of dim 0, expected at least 1"):
        from_faiss(faiss.IndexFlatL2(0))
