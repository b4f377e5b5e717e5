"""Indexes of bits come from faiss as vectors of zeros and ones, and go back."""

import tempfile
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from elips_torch import (
    ConversionError,
    DeviceError,
    DtypeError,
    ElipsError,
    FaissIndex,
    FlatIndex,
    IndexFileError,
    SQIndex,
    from_faiss,
    load_index,
    merge_faiss_shards,
    pack_bits,
    read_faiss,
    search_preassigned,
    unpack_bits,
    write_faiss,
)
from elips_torch.engines.faiss.builds import load_installed
from elips_torch.engines.faiss.index_files import read_index
from elips_torch.engines.faiss.search import search_index

IN_FOLDER = [HealthCheck.function_scoped_fixture]


def random_codes(n, size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size), dtype=np.uint8)


def flat(codes):
    index = faiss.IndexBinaryFlat(8 * codes.shape[1])
    index.add(codes)
    return index


def mapped(codes, ids, kind=faiss.IndexBinaryIDMap2):
    inner = faiss.IndexBinaryFlat(8 * codes.shape[1])
    index = kind(inner)
    index.add_with_ids(codes, ids)
    return index


@st.composite
def indexes(draw):
    """An index of bits of faiss, in all layouts that come over, with what it holds."""
    n, size = draw(st.sampled_from((0, 1, 7, 300))), draw(st.sampled_from((1, 2, 4, 9, 16, 33)))
    seed = draw(st.integers(0, 1000))
    codes = random_codes(n, size, seed)
    kind = draw(st.sampled_from((None, faiss.IndexBinaryIDMap, faiss.IndexBinaryIDMap2)))
    if kind is None:
        return flat(codes), codes, np.arange(n)
    ids = np.random.default_rng(seed).permutation(n) * 5 + 3
    return mapped(codes, ids, kind), codes, ids


def assert_finds_the_same(index, there, codes, k):
    """Fail unless distances are equal, and ids where no distance occurs twice."""
    distances, ids = there.search(codes, k)
    found = index.search(unpack_bits(torch.from_numpy(codes)), k)
    some = ids >= 0
    assert np.array_equal(found.ids.numpy() >= 0, some)
    assert np.array_equal(found.scores.numpy()[some], distances[some])
    for mine, theirs, row in zip(found.ids.numpy(), ids, distances, strict=True):
        _, place, count = np.unique(row, return_inverse=True, return_counts=True)
        distinct = count[place] == 1
        # Others may be as far away as the last one.
        distinct[-1] &= k > index.ntotal
        assert np.array_equal(mine[distinct], theirs[distinct])


@settings(deadline=None, max_examples=60)
@given(made=indexes(), k=st.sampled_from((1, 10, 400)), through_files=st.booleans())
def test_indexes_come_over_and_go_back(made, k, through_files):
    there, codes, ids = made
    queries = random_codes(5, codes.shape[1], seed=2000)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "bits.faiss")
        if through_files:
            faiss.write_index_binary(there, path)
            index = read_faiss(path)
        else:
            index = from_faiss(there)
        assert type(index) is FlatIndex
        assert index.metric == "l2"
        assert index.vectors.dtype == torch.float16
        assert np.array_equal(index.ids.numpy(), ids)
        assert np.array_equal(index.vectors.numpy(), np.unpackbits(codes, axis=1, bitorder="little"))
        assert_finds_the_same(index, there, queries, k)
        if through_files:
            write_faiss(index, path, binary=True)
            back = faiss.read_index_binary(path)
        else:
            back = index.to_faiss(binary=True)
    numbered = np.array_equal(ids, np.arange(len(ids)))
    assert type(faiss.downcast_IndexBinary(back)) is (
        faiss.IndexBinaryFlat if numbered else faiss.IndexBinaryIDMap2
    )
    for mine, theirs in zip(back.search(queries, k), there.search(queries, k), strict=True):
        # The same bits in the same order, which faiss searches the same.
        assert np.array_equal(mine, theirs)


def test_distances_that_differ_come_in_one_order():
    # Row i has its first i bits set.
    vectors = torch.ones(64, 64).tril_()
    codes = pack_bits(vectors)
    ids = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    there = mapped(codes.numpy(), ids.numpy())
    distances, labels = there.search(np.zeros((1, 8), np.uint8), 64)
    scores, found = from_faiss(there).search(torch.zeros(64), 64)
    assert np.array_equal(scores.numpy(), distances[0])
    assert np.array_equal(found.numpy(), labels[0])
    assert torch.equal(found, ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_queries_of_any_dtype_and_values_of_any_dtype(dtype):
    codes = random_codes(500, 16)
    queries = random_codes(4, 16, seed=1)
    there = flat(codes)
    distances, _ = there.search(queries, 9)
    index = from_faiss(there)
    scores, _ = index.search(unpack_bits(torch.from_numpy(queries), dtype), 9)
    assert np.array_equal(scores.double().numpy(), distances)
    other = FlatIndex(128, dtype=dtype, learnable=dtype == torch.float32)
    other.add(index.vectors)
    assert np.array_equal(other.to_faiss(binary=True).search(queries, 9)[0], distances)


def test_codes_longer_than_float16_counts():
    # Beyond 2,048 not every number is one of float16.
    codes = np.zeros((3, 1024), np.uint8)
    codes[1, :300], codes[2] = 255, 255
    codes[1, 300] = 1
    index = from_faiss(flat(codes))
    assert index.search(torch.zeros(8192), 3).scores.tolist() == [0, 2401, 8192]
    assert index.search(torch.zeros(8192).half(), 3).ids.tolist() == [0, 1, 2]


def test_changes_go_back():
    codes = random_codes(40, 4)
    index = from_faiss(mapped(codes, np.arange(40) + 100))
    index.remove(torch.arange(100, 120))
    index.upsert(unpack_bits(torch.from_numpy(codes[:3])), ids=[130, 7, 135])
    there = index.to_faiss(binary=True)
    assert there.ntotal == 21
    kept = {i + 100: codes[i] for i in range(20, 40)} | {130: codes[0], 7: codes[1], 135: codes[2]}
    for label, code in kept.items():
        assert np.array_equal(there.reconstruct(label), code)
    # Faiss goes on with it.
    there.add_with_ids(codes[5:6], np.array([999]))
    there.remove_ids(np.array([7]))
    again = from_faiss(there)
    assert 999 in again
    assert 7 not in again
    assert torch.equal(pack_bits(again.reconstruct(999)), torch.from_numpy(codes[5]))


def test_nothing_is_shared():
    codes = random_codes(10, 2)
    there = flat(codes)
    index = from_faiss(there)
    there.reset()
    there.add(random_codes(10, 2, seed=1))
    assert np.array_equal(pack_bits(index.vectors).numpy(), codes)
    back = index.to_faiss(binary=True)
    index.vectors.zero_()
    assert np.array_equal(faiss.vector_to_array(back.xb).reshape(10, 2), codes)


def test_own_files_keep_it_too(tmp_path):
    index = from_faiss(mapped(random_codes(10, 2), np.arange(10) * 3))
    index.save(tmp_path / "bits.safetensors")
    same = load_index(tmp_path / "bits.safetensors")
    assert torch.equal(same.vectors, index.vectors)
    assert torch.equal(same.ids, index.ids)
    assert same.to_faiss(binary=True).ntotal == 10


def families():
    quantizer = faiss.IndexBinaryFlat(64)
    ivf = faiss.IndexBinaryIVF(quantizer, 64, 4)
    return [
        ivf,
        faiss.IndexBinaryHNSW(64, 8),
        faiss.IndexBinaryHash(64, 8),
        faiss.IndexBinaryMultiHash(64, 2, 8),
        faiss.IndexBinaryFromFloat(faiss.IndexFlatL2(64)),
        faiss.IndexBinaryIDMap(faiss.IndexBinaryHNSW(64, 8)),
    ]


@pytest.mark.parametrize("number", range(6))
def test_other_families_are_named_and_offered_as_they_are(number, tmp_path):
    there = families()[number]
    name = ("IVF", "HNSW", "Hash", "MultiHash", "FromFloat", "HNSW")[number]
    message = f"index is IndexBinary{name}, whose vectors are bits; IndexBinaryFlat.*; FaissIndex"
    with pytest.raises(ConversionError, match=message):
        from_faiss(there)
    path = tmp_path / "bits.faiss"
    faiss.write_index_binary(there, str(path))
    with pytest.raises(ConversionError, match=message):
        read_faiss(path)


def test_where_floats_are_expected_bits_are_refused(tmp_path):
    lists = faiss.IndexBinaryIVF(faiss.IndexBinaryFlat(64), 64, 4)
    codes, path = random_codes(300, 8), tmp_path / "bits.faiss"
    lists.train(codes)
    lists.add(codes)
    with pytest.raises(
        DtypeError, match="index is of type IndexBinaryIVF, expected an inverted file of faiss"
    ):
        search_preassigned(lists, torch.zeros(2, 64), 1, torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(DtypeError, match="index is IndexBinaryIVF, expected an index of float vectors"):
        search_index(load_installed(), lists, torch.zeros(2, 64), 1)
    faiss.write_index_binary(lists, str(path))
    message = "holds an index whose vectors are bits, expected an index of float"
    with pytest.raises(DtypeError, match=message):
        merge_faiss_shards([path], tmp_path / "all.faiss")
    with pytest.raises(DtypeError, match=message):
        read_index(load_installed(), path)
    assert [each.name for each in tmp_path.iterdir()] == ["bits.faiss"]
    index = from_faiss(flat(codes))
    for queries in (torch.from_numpy(codes), torch.zeros(2, 8)):
        with pytest.raises(ElipsError, match="queries has d"):
            index.search(queries, 1)


def test_what_is_no_index_of_bits_is_refused(tmp_path):
    path = tmp_path / "bits.faiss"
    path.write_bytes(b"before")
    values = FlatIndex(16)
    values.add(torch.tensor([[0.0] * 16, [1.0] * 15 + [0.5]]))
    for index, message in (
        (values, "binary=True is for vectors of bits: vectors has values other than 0 and 1 in row 1"),
        (FlatIndex(12), "dim 12, expected a multiple of 8"),
        (FlatIndex(16, "ip"), "Hamming distance, which is 'l2', not 'ip'"),
        (SQIndex(16), "SQIndex holds no bits, binary=True is for a FlatIndex"),
        (FaissIndex(faiss.IndexFlatL2(16)), "FaissIndex holds no bits"),
    ):
        with pytest.raises(ConversionError, match=message):
            index.to_faiss(binary=True)
        with pytest.raises(ConversionError, match=message):
            write_faiss(index, path, binary=True)
    with pytest.raises(DeviceError, match="binary=True makes indexes on the CPU"):
        values.to_faiss("cuda:0", binary=True)
    assert path.read_bytes() == b"before"
    assert [each.name for each in tmp_path.iterdir()] == ["bits.faiss"]


def test_ids_that_this_library_does_not_take_are_refused():
    for ids in ([1, 1, 2], [-4, 1, 2]):
        with pytest.raises(ConversionError, match="ids"):
            from_faiss(mapped(random_codes(3, 2), np.array(ids)))


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "bits.faiss"
    write_faiss(from_faiss(mapped(random_codes(30, 4), np.arange(30) + 5)), path, binary=True)
    whole = path.read_bytes()
    for length in (4, 8, 30, 60, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(IndexFileError, match="no index of faiss or is damaged"):
            read_faiss(path)


# Where files say how many numbers follow. Faiss takes the memory before it reads them: a bit in these
# bytes asks for gigabytes, one further up is refused.
GIGABYTES = {
    labelled: {start + byte for start in starts for byte in (3, 4)}
    for labelled, starts in ((False, (25,)), (True, (50, 98)))
}


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=IN_FOLDER)
@given(place=st.integers(0, 185), bit=st.integers(0, 7), labelled=st.booleans())
def test_a_wrong_bit_gives_an_index_or_an_error_of_the_library(place, bit, labelled, tmp_path):
    path = tmp_path / "bits.faiss"
    codes = random_codes(10, 4)
    # ``IndexBinaryIDMap2`` believes the number of its rows, and reads behind the ids that there are.
    there = mapped(codes, np.arange(10) * 2, faiss.IndexBinaryIDMap) if labelled else flat(codes)
    faiss.write_index_binary(there, str(path))
    content = bytearray(path.read_bytes())
    place %= len(content)
    assume(place not in GIGABYTES[labelled])
    content[place] ^= 1 << bit
    path.write_bytes(content)
    try:
        index = read_faiss(path)
    except ElipsError:
        return
    assert len(index.ids) == index.ntotal


def test_one_on_a_gpu_is_copied_first(monkeypatch):
    """A stand-in takes the place of an index on a GPU; what the copy gives is what comes over."""

    class GpuIndexBinaryFlat(faiss.IndexBinaryFlat):
        def __init__(self):
            super().__init__(16)
            # What tells faiss's classes for GPUs from others.
            self.getDevice = lambda: 0

    codes = random_codes(5, 2)
    copied = []

    def copy(index):
        copied.append(index)
        return flat(codes)

    monkeypatch.setattr(faiss, "index_binary_gpu_to_cpu", copy, raising=False)
    there = GpuIndexBinaryFlat()
    assert np.array_equal(pack_bits(from_faiss(there).vectors).numpy(), codes)
    assert copied == [there]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_indexes_on_gpus_come_over():
    codes = random_codes(200, 8)
    there = faiss.index_binary_cpu_to_gpu(faiss.StandardGpuResources(), 0, flat(codes))
    index = from_faiss(there, "cuda")
    assert index.vectors.is_cuda
    assert torch.equal(pack_bits(index.vectors).cpu(), torch.from_numpy(codes))
    queries = random_codes(5, 8, seed=1)
    scores, _ = index.search(unpack_bits(torch.from_numpy(queries)).cuda(), 9)
    assert np.array_equal(scores.cpu().numpy(), flat(codes).search(queries, 9)[0])
