import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elips_torch import (
    DtypeError,
    IndexFileError,
    ShapeError,
    read_bvecs,
    read_fvecs,
    read_ivecs,
    write_bvecs,
    write_fvecs,
    write_ivecs,
)

KINDS = [
    (write_fvecs, read_fvecs, torch.float32),
    (write_ivecs, read_ivecs, torch.int32),
    (write_bvecs, read_bvecs, torch.uint8),
]


def numbers(n, dim, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.float32:
        return torch.randn(n, dim, generator=generator)
    return torch.randint(0, 256, (n, dim), generator=generator, dtype=dtype)


@pytest.mark.parametrize(("write", "read", "dtype"), KINDS)
@pytest.mark.parametrize("mmap", [False, True])
@given(n=st.integers(1, 40), dim=st.integers(1, 9))
def test_what_was_written_is_read(tmp_path_factory, write, read, dtype, mmap, n, dim):
    path = tmp_path_factory.mktemp("vectors") / "file"
    wanted = numbers(n, dim, dtype)
    write(wanted, path)
    found = read(path, mmap=mmap)
    assert found.dtype == dtype
    assert torch.equal(found, wanted)
    assert mmap or found.is_contiguous()


def test_numpy_reads_the_same(tmp_path):
    """The usual two lines of numpy that read such files."""
    vectors = numbers(7, 5, torch.float32)
    write_fvecs(vectors.T.contiguous().T, tmp_path / "a.fvecs")
    plain = np.fromfile(tmp_path / "a.fvecs", dtype="<i4")
    assert np.array_equal(plain.reshape(-1, plain[0] + 1)[:, 1:].view("<f4"), vectors.numpy())
    write_bvecs(numbers(7, 5, torch.uint8), tmp_path / "a.bvecs")
    assert (tmp_path / "a.bvecs").stat().st_size == 7 * (4 + 5)


def test_writing_into_a_mapping_does_not_change_the_file(tmp_path):
    path = tmp_path / "a.fvecs"
    write_fvecs(numbers(7, 5, torch.float32), path)
    before = path.read_bytes()
    read_fvecs(path, mmap=True).zero_()
    assert path.read_bytes() == before


def test_a_mapping_serves_rows_only_where_they_are_used(tmp_path):
    path = tmp_path / "a.fvecs"
    write_fvecs(numbers(3000, 5, torch.float32), path)
    rows = np.fromfile(path, dtype="<i4").reshape(3000, 6)
    rows[7, 0] = 4
    path.write_bytes(rows.tobytes())
    assert read_fvecs(path, mmap=True).shape == (3000, 5)
    with pytest.raises(IndexFileError, match="a row of 4 numbers at place 7, expected 5"):
        read_fvecs(path)


def test_files_that_hold_no_such_vectors_are_refused(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError):
        read_fvecs(path)
    path.write_bytes(b"")
    with pytest.raises(IndexFileError, match="has 0 bytes"):
        read_fvecs(path)
    write_fvecs(numbers(3, 5, torch.float32), path)
    whole = path.read_bytes()
    for broken in (whole[:-1], whole[:20], whole + b"\0" * 4, b"\xff\xff\xff\xff" + whole[4:]):
        path.write_bytes(broken)
        with pytest.raises(IndexFileError, match="expected rows of"):
            read_fvecs(path)
    path.write_bytes(whole[:24] + b"\x04" + whole[25:])
    for mmap in (False, True):
        with pytest.raises(IndexFileError, match="a row of 4 numbers at place 1, expected 5"):
            read_fvecs(path, mmap=mmap)


def test_what_the_format_cannot_hold_is_refused_and_nothing_is_left(tmp_path):
    cases = [
        (torch.zeros(2, 3, dtype=torch.float64), DtypeError),
        (torch.zeros(2, 3, dtype=torch.int32), DtypeError),
        ([[1.0]], DtypeError),
        (torch.zeros(3), ShapeError),
        (torch.zeros(0, 3), ShapeError),
    ]
    for vectors, error in cases:
        with pytest.raises(error, match="vectors"):
            write_fvecs(vectors, tmp_path / "file")
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError):
        write_fvecs(torch.zeros(1, 1), tmp_path / "nowhere" / "file")
