"""Files of faiss that are damaged, foreign or cannot be written."""

import copy
import functools

import faiss
import numpy as np
import pytest
import torch
from faiss_agreement import uniform
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elips_torch import (
    ConversionError,
    DtypeError,
    ElipsError,
    FaissIndex,
    FlatIndex,
    ImplementationError,
    IndexFileError,
    NonFiniteError,
    SQIndex,
    index_factory,
    load_index,
    read_faiss,
    write_faiss,
)

DIM = 16
TRAINING = uniform(320, seed=9)
DAMAGED = ("Flat", "IVF4,Flat", "PCA8,IVF4,SQ8,RFlat", "OPQ4,IVF4,PQ4x4np", "IDMap,SQ6")


@functools.cache
def written(description):
    """Return the file of a small index of faiss."""
    made = faiss.index_factory(DIM, description)
    made.train(TRAINING.numpy())
    if description.startswith("IDMap"):
        made.add_with_ids(TRAINING[:50].numpy(), np.arange(50) * 2)
    else:
        made.add(TRAINING[:50].numpy())
    return faiss.serialize_index(made).tobytes()


def test_files_that_hold_no_index_are_refused(tmp_path):
    path = tmp_path / "a.faiss"
    with pytest.raises(FileNotFoundError):
        read_faiss(path)
    index = index_factory(DIM, "PCA8,IVF4,SQ8,RFlat").fit(TRAINING)
    index.add(uniform(50))
    write_faiss(index, path)
    whole = path.read_bytes()
    for length in [0, 3, 4, 10, *range(20, len(whole), 997), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(IndexFileError, match=r"no index of faiss or is damaged|is empty") as caught:
            read_faiss(path)
        # What the machine says of other things.
        assert "ioctl" not in str(caught.value)
        assert "Success" not in str(caught.value)
    torch.save({"vectors": TRAINING}, path)
    for foreign in (b"something else, and long enough", path.read_bytes(), b"\x93NUMPY\x01" + bytes(200)):
        path.write_bytes(foreign)
        with pytest.raises(IndexFileError, match="no index of faiss"):
            read_faiss(path)
    index.save(path)
    with pytest.raises(IndexFileError, match="load_index"):
        read_faiss(path)


def test_a_file_of_faiss_given_to_load_index_is_told_apart(tmp_path):
    index = index_factory(DIM, "Flat")
    index.add(uniform(5))
    write_faiss(index, tmp_path / "a.faiss")
    with pytest.raises(IndexFileError, match="read_faiss reads files of faiss"):
        load_index(tmp_path / "a.faiss")
    (tmp_path / "text").write_bytes(b"In the beginning, there was no index here")
    with pytest.raises(IndexFileError, match="is damaged") as refused:
        load_index(tmp_path / "text")
    assert "read_faiss" not in str(refused.value)


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.faiss"
    path.write_bytes(b"before")
    with pytest.raises(ConversionError):
        write_faiss(SQIndex(DIM, metric="cosine"), path)
    assert [each.name for each in tmp_path.iterdir()] == ["a.faiss"]
    assert path.read_bytes() == b"before"
    with pytest.raises(FileNotFoundError):
        write_faiss(FlatIndex(DIM), tmp_path / "nowhere" / "a")
    with pytest.raises(DtypeError, match="faiss writes its own"):
        write_faiss(faiss.IndexFlatL2(DIM), path)


def test_numbers_that_contradict_each_other_are_noticed(tmp_path):
    path = tmp_path / "a.faiss"
    index = FlatIndex(DIM)
    index.add(TRAINING[:50])
    write_faiss(index, path)
    whole = path.read_bytes()
    # After four letters come the dim, in four bytes, and the number of vectors, in eight.
    for start, value in ((4, DIM // 2), (8, 49), (8, -50), (8, 2**40)):
        size = 4 if start == 4 else 8
        path.write_bytes(whole[:start] + value.to_bytes(size, "little", signed=True) + whole[start + size :])
        with pytest.raises(ElipsError, match="damaged"):
            read_faiss(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nprobe": 0}, "its nprobe is 0, expected at least 1"),
        ({"nprobe": 2**63 + 1}, "its nprobe is 9223372036854775809"),
    ],
)
def test_settings_that_no_index_has_are_noticed(change, message, tmp_path):
    made = faiss.deserialize_index(np.frombuffer(written("IVF4,Flat"), np.uint8))
    for name, value in change.items():
        setattr(made, name, value)
    faiss.write_index(made, str(tmp_path / "a.faiss"))
    with pytest.raises(IndexFileError, match=message) as caught:
        read_faiss(tmp_path / "a.faiss")
    assert "a.faiss" in str(caught.value)


def test_what_faiss_may_hold_and_no_index_here_names_the_file(tmp_path):
    path = tmp_path / "a.faiss"
    vectors = TRAINING[:3].clone()
    vectors[1, 1] = torch.nan
    made = faiss.IndexFlatL2(DIM)
    made.add(vectors.numpy())
    faiss.write_index(made, str(path))
    with pytest.raises(NonFiniteError, match=r"a\.faiss.*row 1"):
        read_faiss(path)
    twice = faiss.index_factory(DIM, "IDMap,Flat")
    twice.add_with_ids(TRAINING[:3].numpy(), np.array([1, 2, 1]))
    faiss.write_index(twice, str(path))
    for read in (read_faiss, FaissIndex.read):
        with pytest.raises(IndexFileError, match=r"a\.faiss.*1"):
            read(path)


WHOLE = (
    "HNSW8",
    "LSH",
    "IVF4,PQ4x4fs",
    "PCA8,HNSW8",
    "IDMap,SQ8",
    "IVF4_HNSW8,RaBitQ",
    "SQ8,RFlat",
)


@pytest.mark.parametrize("description", WHOLE)
def test_parts_that_do_not_fit_are_noticed(description, tmp_path):
    path = tmp_path / "a.faiss"
    content = written(description)
    path.write_bytes(content)
    index = FaissIndex.read(path)
    assert index.ntotal == 50
    # After four letters come the dim, in four bytes, and the number of vectors, in eight.
    for start, size, value in ((4, 4, DIM // 2), (4, 4, 0), (4, 4, 2**19), (8, 8, 49), (8, 8, 2**19)):
        path.write_bytes(content[:start] + value.to_bytes(size, "little") + content[start + size :])
        with pytest.raises(IndexFileError, match=r"a\.faiss.*(damaged|expected)"):
            FaissIndex.read(path)


@pytest.mark.parametrize(
    "description",
    ["RQ4x4", "PRQ2x2x4", "IVF4,RQ4x4", "PCA8,RQ4x4", "ITQ8,LSHt", "IMI2x2,Flat", "HNSW8,PQ4x4"],
)
def test_what_has_learned_nothing_comes_back(description, tmp_path):
    index = FaissIndex.from_factory(DIM, description)
    write_faiss(index, tmp_path / "a.faiss")
    index.save(tmp_path / "a.safetensors")
    others = [FaissIndex.read(tmp_path / "a.faiss"), FaissIndex.load(tmp_path / "a.safetensors")]
    others.append(copy.deepcopy(index))
    for each in (index, *others):
        assert not each.is_trained
        each.fit(TRAINING).add(TRAINING[:50])
    wanted = index.search(TRAINING[:9], 3)
    for each in others:
        assert torch.equal(each.search(TRAINING[:9], 3).ids, wanted.ids)
        assert torch.equal(each.search(TRAINING[:9], 3).scores, wanted.scores)


def test_neighbours_at_levels_that_they_do_not_reach_are_noticed(tmp_path):
    index = faiss.IndexHNSWFlat(DIM, 4)
    index.add(uniform(900).numpy())
    graph = index.hnsw
    levels, neighbours = (faiss.vector_to_array(each).copy() for each in (graph.levels, graph.neighbors))
    before = neighbours.tobytes()
    room = faiss.vector_to_array(graph.cum_nneighbor_per_level)
    start = int(graph.offsets.at(graph.entry_point))
    neighbours[start + room[1] : start + room[2]] = np.flatnonzero(levels == 1)[-1]
    path = tmp_path / "a.faiss"
    content = faiss.serialize_index(index).tobytes()
    path.write_bytes(content)
    assert FaissIndex.read(path).ntotal == 900
    path.write_bytes(content.replace(before, neighbours.tobytes()))
    with pytest.raises(IndexFileError, match=r"a\.faiss.*leads at level 1 to nodes that are not there"):
        FaissIndex.read(path)


def test_what_faiss_writes_without_its_vectors_is_not_written(tmp_path):
    index = FaissIndex.from_factory(DIM, "ZnLattice2x3_4").fit(TRAINING)
    write_faiss(index, tmp_path / "a.faiss")
    index.add(TRAINING[:50])
    assert index.search(TRAINING[:3], 1).ids[:, 0].tolist() == [0, 1, 2]
    saves = (
        lambda: write_faiss(index, tmp_path / "b.faiss"),
        index.state_dict,
        lambda: copy.deepcopy(index),
        lambda: index.save(tmp_path / "b.safetensors"),
    )
    for save in saves:
        with pytest.raises(ImplementationError, match="IndexLattice is not saved"):
            save()
    assert [each.name for each in tmp_path.iterdir()] == ["a.faiss"]


@pytest.mark.parametrize(
    "description", ["Residual4x4,PQ4", "RaBitQfs", "PQ4x4fs", "RQ4x4fs_32_Nrq2x4", "IVF4,PQ4x4fsr", "RQ3x5"]
)
def test_codes_of_every_kind_fit_their_index(description, tmp_path):
    if description == "RaBitQfs" and not hasattr(faiss, "IndexRaBitQFastScan"):
        pytest.skip("this faiss has no such index")
    path = tmp_path / "a.faiss"
    path.write_bytes(written(description))
    index = FaissIndex.read(path)
    assert index.ntotal == 50
    # faiss has no search of two layers alone.
    if description != "Residual4x4,PQ4":
        assert index.search(TRAINING[:3], 1).ids.shape == (3, 1)


@pytest.mark.parametrize(
    ("description", "member", "name", "value"),
    [
        ("SQ6", "sq", "qtype", 168),
        ("IVF4,SQ8", "sq", "d", 8),
        ("SQfp16", "sq", "qtype", faiss.ScalarQuantizer.QT_8bit),
        ("RaBitQ", "rabitq", "d", 42),
        ("IVF4,RaBitQ", "rabitq", "d", 42),
        ("PQ4x4fs", None, "bbs", 33),
        ("PQ4x4fs", None, "ntotal2", 32),
        ("IVF4,PQ4x4fs", None, "M2", 6),
        ("PQ4np", "pq", "M", 8),
        ("RQ2x4", None, "code_size", 3),
    ],
)
def test_what_encodes_vectors_fits_the_index(description, member, name, value, tmp_path):
    path = tmp_path / "a.faiss"
    index = faiss.deserialize_index(np.frombuffer(written(description), np.uint8))
    setattr(index if member is None else getattr(index, member), name, value)
    faiss.write_index(index, str(path))
    with pytest.raises(IndexFileError, match=r"a\.faiss.*(damaged|expected)"):
        FaissIndex.read(path)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(place=st.integers(0, 400), bit=st.integers(0, 7), description=st.sampled_from(DAMAGED))
def test_a_wrong_bit_gives_an_index_or_an_error_of_the_library(place, bit, description, tmp_path):
    content = bytearray(written(description))
    content[place % len(content)] ^= 1 << bit
    path = tmp_path / "a.faiss"
    path.write_bytes(content)
    said = None
    try:
        index = read_faiss(path)
    except ElipsError as error:
        said = str(error)
    assert len(index.ids) == index.ntotal if said is None else str(path) in said


@pytest.mark.parametrize("description", ["Flat", "IDMap,Flat", "PCA4,Flat", "HNSW8", "IVF1,SQ8,RFlat"])
def test_vectors_that_are_not_finite_are_refused_where_they_lie_as_they_are(description, tmp_path):
    vectors = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    index = faiss.index_factory(8, description)
    index.train(vectors.numpy())
    vectors[4, 1], vectors[30, 0] = torch.nan, torch.inf
    if description.startswith("IDMap"):
        index.add_with_ids(vectors.numpy(), torch.arange(50).numpy())
    else:
        index.add(vectors.numpy())
    with pytest.raises(NonFiniteError, match=r"^faiss_index has NaN or infinity in rows 4, 30"):
        FaissIndex(index)
    # Faiss 1.15 has no list for such rows.
    stored = 48 if description.startswith("IVF") and faiss.__version__ >= "1.15" else 50
    assert FaissIndex(index, check_finite=False).ntotal == stored
    faiss.write_index(index, str(tmp_path / "bad.faiss"))
    if stored < 50:
        with pytest.raises(IndexFileError, match=r"bad\.faiss': .*the size of the lists is 48, expected 50"):
            FaissIndex.read(tmp_path / "bad.faiss")
        return
    with pytest.raises(NonFiniteError, match=r"bad\.faiss': faiss_index has NaN or infinity in rows 4, 30"):
        FaissIndex.read(tmp_path / "bad.faiss")


@pytest.mark.parametrize("path", [None, 3, b"x", [], torch.zeros(2)])
def test_what_is_no_path_is_refused(path):
    for call in (read_faiss, FaissIndex.read, lambda path: write_faiss(FlatIndex(4), path)):
        with pytest.raises(DtypeError, match=r"path is .*, expected a path"):
            call(path)


def test_centroids_that_are_not_finite_are_refused():
    index = faiss.index_factory(8, "IVF2_HNSW4,SQ8")
    index.train(torch.randn(80, 8, generator=torch.Generator().manual_seed(0)).numpy())
    centroids = faiss.downcast_index(faiss.downcast_index(index.quantizer).storage)
    faiss.rev_swig_ptr(centroids.get_xb(), 16)[9] = np.inf
    with pytest.raises(NonFiniteError, match="the quantizer of faiss_index has NaN or infinity in row 1"):
        FaissIndex(index)
