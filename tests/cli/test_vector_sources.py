import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from elips_torch import ElipsError, write_bvecs, write_fvecs
from elips_torch.cli import arrow_columns
from elips_torch.cli.id_sources import read_id_lists, read_ids
from elips_torch.cli.vector_sources import open_vectors, parse_place

N, D = 53, 6


def vectors(dtype=torch.float32):
    return torch.randn(N, D, generator=torch.Generator().manual_seed(0)).to(dtype)


def as_npy(folder, rows):
    np.save(folder / "v.npy", rows.numpy())
    return str(folder / "v.npy")


def as_safetensors(folder, rows):
    save_file({"other": torch.zeros(3), "v": rows}, folder / "v.safetensors")
    return f"{folder / 'v.safetensors'}:v"


def as_fvecs(folder, rows):
    write_fvecs(rows.float(), folder / "v.fvecs")
    return str(folder / "v.fvecs")


def table(rows, kind=None):
    kind = kind or pa.list_(pa.float32(), rows.shape[1])
    return pa.table({"name": ["x"] * len(rows), "v": pa.array(list(rows.numpy()), kind)})


def as_parquet(folder, rows):
    pq.write_table(table(rows), folder / "v.parquet", row_group_size=20)
    return f"{folder / 'v.parquet'}:v"


def as_ragged_parquet(folder, rows):
    pq.write_table(table(rows, pa.large_list(pa.float64())), folder / "v.parquet")
    return f"{folder / 'v.parquet'}:v"


def as_arrow_file(folder, rows):
    with pa.OSFile(str(folder / "v.feather"), "wb") as file, pa.ipc.new_file(file, table(rows).schema) as out:
        out.write_table(table(rows), max_chunksize=20)
    return f"{folder / 'v.feather'}:v"


def as_arrow_stream(folder, rows):
    with pa.OSFile(str(folder / "v.arrow"), "wb") as file, pa.ipc.new_stream(file, table(rows).schema) as out:
        out.write_table(table(rows, pa.list_(pa.float32(), D)), max_chunksize=20)
    return f"{folder / 'v.arrow'}:v"


def as_tensor_column(folder, rows):
    kind = pa.fixed_shape_tensor(pa.float32(), [D])
    stored = pa.array(list(rows.numpy()), pa.list_(pa.float32(), D))
    pq.write_table(pa.table({"v": pa.ExtensionArray.from_storage(kind, stored)}), folder / "v.parquet")
    return f"{folder / 'v.parquet'}"


FORMATS = [
    as_npy,
    as_safetensors,
    as_fvecs,
    as_parquet,
    as_ragged_parquet,
    as_arrow_file,
    as_arrow_stream,
    as_tensor_column,
]


@pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__)
@pytest.mark.parametrize("rows", [1, 7, N, 1000, None])
def test_every_format_yields_the_vectors_in_order_in_parts(tmp_path, write, rows):
    source = open_vectors(write(tmp_path, vectors()))
    assert (source.n, source.dim) == (N, D)
    batches = list(source.batches(rows))
    assert all(len(batch) <= (rows or N) for batch in batches)
    assert torch.equal(torch.cat(batches).float(), vectors())


@pytest.mark.parametrize("write", [as_npy, as_safetensors, as_parquet], ids=lambda write: write.__name__)
def test_half_precision_is_kept(tmp_path, write):
    rows = vectors(torch.float16)
    if write is as_parquet:
        pq.write_table(table(rows, pa.list_(pa.float16(), D)), tmp_path / "v.parquet")
        text = f"{tmp_path / 'v.parquet'}:v"
    else:
        text = write(tmp_path, rows)
    (batch,) = open_vectors(text).batches()
    assert batch.dtype == torch.float16
    assert torch.equal(batch, rows)


def test_whole_numbers_become_vectors(tmp_path):
    bytes_ = torch.arange(N * D).remainder(251).to(torch.uint8).view(N, D)
    write_bvecs(bytes_, tmp_path / "v.bvecs")
    (batch,) = open_vectors(str(tmp_path / "v.bvecs")).batches()
    assert batch.dtype == torch.float32
    assert torch.equal(batch, bytes_.float())


@pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__)
def test_a_sample_has_rows_of_the_file_in_their_order(tmp_path, write):
    source = open_vectors(write(tmp_path, vectors()))
    sample = source.sample(20, seed=3).float()
    places = (sample[:, None] == vectors()).all(2).nonzero()[:, 1]
    assert len(places) == 20
    assert (places.diff() > 0).all()
    assert torch.equal(sample, source.sample(20, seed=3).float())
    assert not torch.equal(sample, source.sample(20, seed=4).float())
    assert torch.equal(source.sample(1000, seed=0).float(), vectors())


@pytest.mark.parametrize("write", [as_npy, as_safetensors, as_fvecs, as_parquet], ids=lambda f: f.__name__)
def test_a_part_does_not_keep_the_rest_of_the_file(tmp_path, write):
    source = open_vectors(write(tmp_path, vectors()))
    assert max(batch.untyped_storage().nbytes() for batch in source.batches(10)) == 10 * D * 4


def test_a_name_may_be_left_out_where_only_one_fits(tmp_path):
    as_parquet(tmp_path, vectors())
    assert open_vectors(str(tmp_path / "v.parquet")).n == N
    save_file({"only": vectors()}, tmp_path / "one.safetensors")
    assert open_vectors(str(tmp_path / "one.safetensors")).n == N


def test_a_colon_may_be_part_of_a_name(tmp_path):
    folder = tmp_path / "a:b.npy"
    folder.mkdir()
    assert parse_place(as_npy(folder, vectors())).name is None


def bad_file(folder, name, content=b"nonsense"):
    (folder / name).write_bytes(content)
    return str(folder / name)


def bad_array(folder, array):
    np.save(folder / "v.npy", array)
    return str(folder / "v.npy")


def bad_column(folder, array):
    pq.write_table(pa.table({"v": array}), folder / "v.parquet")
    return f"{folder / 'v.parquet'}:v"


BAD = {
    "no file": (lambda folder: str(folder / "nix.npy"), "no file at"),
    "another ending": (lambda folder: bad_file(folder, "v.txt"), "ends in '.txt', expected .npy"),
    "damaged npy": (lambda folder: bad_file(folder, "v.npy"), "cannot be read as an npy file"),
    "damaged safetensors": (
        lambda folder: bad_file(folder, "v.safetensors"),
        "cannot be read as a safetensors",
    ),
    "damaged parquet": (lambda folder: bad_file(folder, "v.parquet"), "cannot be read as parquet"),
    "damaged arrow": (lambda folder: bad_file(folder, "v.arrow"), "cannot be read as arrow"),
    "damaged fvecs": (lambda folder: bad_file(folder, "v.fvecs"), "expected rows of"),
    "empty npy": (lambda folder: bad_array(folder, np.zeros((0, 3), "f4")), "expected at least one vector"),
    "one axis": (lambda folder: bad_array(folder, np.zeros(3, "f4")), r"has shape \(3,\), expected \(N, D\)"),
    "three axes": (lambda folder: bad_array(folder, np.zeros((2, 3, 4))), r"expected \(N, D\)"),
    "text": (lambda folder: bad_array(folder, np.array([["a"]])), "expected numbers that torch has"),
    "objects": (lambda folder: bad_array(folder, np.array([None])), "cannot be read as an npy file"),
    "complex": (lambda folder: bad_array(folder, np.zeros((2, 2), "c8")), "holds torch.complex64"),
    "other bytes": (lambda folder: bad_array(folder, np.zeros((2, 2), ">f4")), "bytes are in another order"),
    "a name in npy": (lambda folder: as_npy(folder, vectors()) + ":v", "hold one array without a name"),
    "no such tensor": (
        lambda folder: as_safetensors(folder, vectors())[:-1] + "nix",
        "names no tensor of the file, it has 'other', 'v'",
    ),
    "which tensor": (lambda folder: as_safetensors(folder, vectors())[:-2], "write .*v.safetensors:other"),
    "no such column": (
        lambda folder: as_parquet(folder, vectors())[:-1] + "nix",
        "names no column of the file, it has 'name', 'v'",
    ),
    "no column of vectors": (
        lambda folder: bad_column(folder, pa.array(["a"]))[:-2],
        "does not say which column",
    ),
    "a column of text": (lambda folder: bad_column(folder, pa.array(["a"])), "rows of type string"),
    "a column of lists of text": (lambda folder: bad_column(folder, pa.array([["a"]])), "lists of string"),
    "an empty column": (
        lambda folder: bad_column(folder, pa.array([], pa.list_(pa.float32()))),
        "expected at least one vector",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_holds_no_vectors_is_refused(tmp_path, name):
    make, message = BAD[name]
    with pytest.raises(ElipsError, match=message):
        open_vectors(make(tmp_path))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1.0, 2.0], [3.0]], "has 1 numbers in row 1, expected 2"),
        ([[1.0, 2.0], None, [3.0, 4.0]], "has no vector in row 1"),
        ([[1.0, 2.0], [3.0, None]], "lacks a number in row 1"),
        ([[1.0, 2.0], [3.0, float("nan")]], "NaN, infinity or values .* in row 1"),
    ],
)
@pytest.mark.parametrize("size", [1, 10])
def test_bad_rows_of_a_column_are_named_by_their_place_in_the_file(tmp_path, rows, message, size):
    source = open_vectors(bad_column(tmp_path, pa.array(rows, pa.list_(pa.float32()))))
    with pytest.raises(ElipsError, match=message):
        list(source.batches(size))


def test_a_first_row_that_is_missing_is_named(tmp_path):
    text = bad_column(tmp_path, pa.array([None, [1.0, 2.0]], pa.list_(pa.float32())))
    with pytest.raises(ElipsError, match="has no vector in row 0"):
        open_vectors(text)


def test_bad_values_are_named_by_their_place_in_the_file(tmp_path):
    rows = vectors()
    rows[41, 2] = torch.inf
    source = open_vectors(as_npy(tmp_path, rows))
    with pytest.raises(ElipsError, match="in row 41, expected finite values"):
        list(source.batches(8))


def test_values_outside_a_metric_are_refused(tmp_path):
    source = open_vectors(as_npy(tmp_path, vectors()))
    with pytest.raises(ElipsError, match="outside what 'gower' takes"):
        list(source.batches(metric="gower"))


def test_without_pyarrow_columns_say_how_to_install_it(tmp_path, monkeypatch):
    text = as_parquet(tmp_path, vectors())
    monkeypatch.setattr(arrow_columns.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "elips-torch\[arrow\]"'):
        open_vectors(text)
    assert open_vectors(as_npy(tmp_path, vectors())).n == N


LISTS = [[5, 7], [], [1]]


def test_id_lists_come_from_padded_arrays_and_from_columns(tmp_path):
    np.save(tmp_path / "r.npy", np.array([[5, 7], [-1, -1], [1, -1]]))
    padded = read_id_lists(str(tmp_path / "r.npy"))
    assert padded.table().tolist() == [[5, 7], [-1, -1], [1, -1]]
    assert padded.rows(1, 3)[0].tolist() == [-1, -1, 1, -1]
    columns = {
        "lists": pa.array(LISTS, pa.list_(pa.int32())),
        "holes": pa.array([[5, 7], None, [1]], pa.list_(pa.int64())),
    }
    pq.write_table(pa.table(columns), tmp_path / "r.parquet", row_group_size=2)
    for name in columns:
        lists = read_id_lists(f"{tmp_path / 'r.parquet'}:{name}")
        assert [lists.rows(i, i + 1)[0].tolist() for i in range(3)] == LISTS
        assert lists.rows(1, 3)[1].tolist() == [0, 0, 1]


def test_single_ids_come_from_arrays_and_columns(tmp_path):
    np.save(tmp_path / "ids.npy", np.array([4, 2, 9], "i4"))
    pq.write_table(pa.table({"id": [4, 2, 9], "hole": [4, None, 9]}), tmp_path / "ids.parquet")
    assert read_ids(str(tmp_path / "ids.npy"), 3).tolist() == [4, 2, 9]
    assert read_ids(f"{tmp_path / 'ids.parquet'}:id", 3).tolist() == [4, 2, 9]
    with pytest.raises(ElipsError, match="has 2 ids in 3 rows, expected one for each of the 3 vectors"):
        read_ids(f"{tmp_path / 'ids.parquet'}:hole", 3)
    with pytest.raises(ElipsError, match="has 3 ids in 3 rows, expected one for each of the 4 vectors"):
        read_ids(str(tmp_path / "ids.npy"), 4)


def test_what_holds_no_ids_is_refused(tmp_path):
    with pytest.raises(ElipsError, match=r"holds torch\.float32, expected whole numbers"):
        read_id_lists(as_npy(tmp_path, vectors()))
    with pytest.raises(ElipsError, match=r"rows of type .*float.*, expected whole numbers"):
        read_id_lists(as_parquet(tmp_path, vectors()))
    np.save(tmp_path / "r.npy", np.zeros((2, 2, 2), int))
    with pytest.raises(ElipsError, match=r"expected \(N,\) or \(N, R\)"):
        read_id_lists(str(tmp_path / "r.npy"))
    with pytest.raises(ElipsError, match="lists with missing numbers"):
        read_id_lists(bad_column(tmp_path, pa.array([[1, None]], pa.list_(pa.int64()))))
    with pytest.raises(ElipsError, match="between 0 and 2 ids per row"):
        read_id_lists(bad_column(tmp_path, pa.array(LISTS, pa.list_(pa.int64())))).table()
