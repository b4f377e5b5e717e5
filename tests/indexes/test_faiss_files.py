"""Files of faiss that are damaged, foreign or cannot be written."""

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
    FlatIndex,
    IndexFileError,
    SQIndex,
    index_factory,
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
        with pytest.raises(IndexFileError, match="no index of faiss or is damaged"):
            read_faiss(path)
    torch.save({"vectors": TRAINING}, path)
    for foreign in (b"something else, and long enough", path.read_bytes(), b"\x93NUMPY\x01" + bytes(200)):
        path.write_bytes(foreign)
        with pytest.raises(IndexFileError, match="no index of faiss"):
            read_faiss(path)
    index.save(path)
    with pytest.raises(IndexFileError, match="load_index"):
        read_faiss(path)


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
    try:
        index = read_faiss(path)
    except ElipsError:
        return
    assert len(index.ids) == index.ntotal
