import math

import pytest
import torch

from elips_torch import (
    PCA,
    ArgumentError,
    DeviceError,
    DtypeError,
    DuplicateIdError,
    FlatIndex,
    IVFPQIndex,
    KMeans,
    NonFiniteError,
    RefineIndex,
    ShapeError,
    SQIndex,
    index_factory,
    knn,
    load_index,
    pairwise_distance,
    range_search,
    read_fvecs,
)
from elips_torch.core.metric import resolve_metric
from elips_torch.core.validation import as_ids, as_radius, check_unique, check_usable, check_values

Q, X = torch.zeros(3, 4), torch.zeros(10, 4)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: knn([[0.0]], X, 1), DtypeError, "queries is a list, expected a torch.Tensor"),
        (
            lambda: knn(Q.to_sparse(), X, 1),
            DtypeError,
            r"queries is torch.sparse_coo, expected a dense tensor",
        ),
        (lambda: knn(Q.int(), X, 1), DtypeError, "queries has dtype torch.int32, expected float32"),
        (lambda: knn(Q, X.bool(), 1), DtypeError, "database has dtype torch.bool"),
        (lambda: knn(Q[None], X, 1), ShapeError, r"queries has shape \(1, 3, 4\), expected \(Q, D\) or"),
        (lambda: knn(Q, X[0], 1), ShapeError, r"database has shape \(4,\), expected \(N, D\)"),
        (lambda: knn(Q[:, :3], X, 1), ShapeError, "queries has dim 3, the database has dim 4"),
        (lambda: knn(Q[:, :0], X[:, :0], 1), ShapeError, "database has dim 0, expected at least 1"),
        (lambda: knn(torch.tensor(0.0), X, 1), ShapeError, r"queries has shape \(\)"),
        (lambda: knn(Q, X, 0), ArgumentError, "k is 0, expected at least 1"),
        (lambda: knn(Q, X, True), DtypeError, "k is True, expected an int"),
        (lambda: knn(Q, X, 2.0), DtypeError, r"k is 2\.0, expected an int"),
        (lambda: knn(Q, X, 1, workspace_bytes=1000), ArgumentError, "workspace_bytes is 1000, expected"),
        (lambda: knn(Q, X, 1, workspace_bytes=1e9), DtypeError, "workspace_bytes is 1000000000.0"),
        (lambda: knn(Q, X, 1, mask=torch.ones(10)), DtypeError, "mask is torch.float32, expected a bool"),
        (lambda: knn(Q, X, 1, mask=[True]), DtypeError, "mask is list"),
        (
            lambda: knn(Q, X, 1, mask=torch.ones(3, 9, dtype=torch.bool)),
            ShapeError,
            r"mask has shape \(3, 9\), expected \(10,\) or \(3, 10\)",
        ),
        (lambda: knn(Q, X, 1, exclude=torch.zeros(3, 1)), DtypeError, "exclude is torch.float32"),
        (
            lambda: knn(Q, X, 1, exclude=torch.zeros(2, 1, dtype=torch.int64)),
            ShapeError,
            r"exclude has shape \(2, 1\), expected \(3, M\)",
        ),
        (lambda: range_search(Q, X, "1"), DtypeError, "radius is a str"),
        (lambda: range_search(Q, X, math.nan), ArgumentError, "radius is nan"),
        (lambda: range_search(Q, X, torch.zeros(2)), ShapeError, r"radius has shape \(2,\)"),
        (lambda: pairwise_distance(Q[0], X), ShapeError, r"queries has shape \(4,\), expected \(N, D\)"),
        (
            lambda: knn(Q + math.nan, X, 1),
            NonFiniteError,
            "queries has NaN or infinity in rows 0, 1, 2, expected",
        ),
        (lambda: knn(Q - 1, X, 1, metric="gower"), NonFiniteError, r"expected finite values in \[0, 1\]"),
        (lambda: knn(Q - 1, X, 1, metric="js"), NonFiniteError, "expected finite values >= 0"),
        (lambda: FlatIndex(4, check_finite="no"), DtypeError, "check_finite is 'no', expected True or False"),
        (lambda: FlatIndex(4, learnable=1), DtypeError, "learnable is 1, expected True or False"),
        (
            lambda: SQIndex(4, index_in_state_dict=torch.tensor([True, False])),
            DtypeError,
            "index_in_state_dict is tensor",
        ),
        (
            lambda: IVFPQIndex(4, nlist=2, m=2, by_residual=None),
            DtypeError,
            "by_residual is None, expected True or False",
        ),
        (
            lambda: FlatIndex(4).search(Q, exclude_self="auto"),
            DtypeError,
            "exclude_self is 'auto', expected True or False",
        ),
        (
            lambda: FlatIndex(4).range_search(Q, 1.0, exclude_self=0),
            DtypeError,
            "exclude_self is 0, expected True or False",
        ),
        (
            lambda: FlatIndex(8).to_faiss(binary="false"),
            DtypeError,
            "binary is 'false', expected True or False",
        ),
        (
            lambda: FlatIndex(8).to_faiss(precomputed_tables="a"),
            DtypeError,
            "precomputed_tables is 'a', expected True or False",
        ),
        (
            lambda: FlatIndex(8).to_faiss("cuda", use_float16=2),
            DtypeError,
            "use_float16 is 2, expected True or False",
        ),
        (lambda: read_fvecs("x.fvecs", mmap="r"), DtypeError, "mmap is 'r', expected True or False"),
        (lambda: knn(Q.to("meta"), X, 1), ValueError, "queries is on meta, the database is on cpu"),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_expected(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("device", "n_gpus", "message"),
    [
        ("cuda", 0, "place is 'cuda', this machine has no CUDA device that torch can use"),
        (torch.device("cuda:0"), 0, "place is 'cuda:0', this machine has no CUDA device"),
        ("cuda:1", 1, "place is 'cuda:1', this machine has 1 CUDA device, from 0 on"),
        ("cuda:2", 2, "place is 'cuda:2', this machine has 2 CUDA devices, from 0 on"),
        ("cud", 1, "place is 'cud', expected a device such as 'cpu' or 'cuda:0'"),
        (3.5, 1, r"place is 3\.5, expected a device such as"),
        (b"cpu", 1, "place is b'cpu', expected a device such as"),
        ("xla", 1, "place is 'xla', which torch cannot use here: "),
        ("hpu", 1, "place is 'hpu', which torch cannot use here: "),
    ],
)
def test_a_device_that_is_not_there(monkeypatch, device, n_gpus, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: n_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    with pytest.raises(DeviceError, match=message):
        check_usable("place", device)
    for fine in (None, "cpu", CPU, torch.device("cpu:0"), "meta", *(f"cuda:{i}" for i in range(n_gpus))):
        check_usable("place", fine)


@pytest.mark.parametrize(
    "make",
    [
        lambda: FlatIndex(8, device="cuda"),
        lambda: IVFPQIndex(8, nlist=2, m=2, device="cuda"),
        lambda: SQIndex(8, device="cuda"),
        lambda: index_factory(8, "PCA4,IVF2,Flat", device="cuda"),
        lambda: PCA(8, 4, device="cuda"),
        lambda: KMeans(2, device="cuda"),
        lambda: RefineIndex(FlatIndex(8), refine_device="cuda"),
    ],
)
def test_nothing_is_made_on_a_device_that_is_not_there(monkeypatch, make):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="device is 'cuda', this machine has no CUDA device"):
        make()


def test_no_file_is_read_to_a_device_that_is_not_there(monkeypatch, tmp_path):
    FlatIndex(8).save(tmp_path / "empty")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for load in (load_index, FlatIndex.load):
        with pytest.raises(DeviceError, match="device is 'cuda', this machine has no CUDA device"):
            load(tmp_path / "empty", "cuda")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_bad_rows_are_numbered(value, dtype):
    vectors = torch.zeros(20, 3, dtype=dtype)
    check_values("vectors", vectors, resolve_metric("l2"))
    vectors[3:10, 1] = value
    with pytest.raises(NonFiniteError, match="rows 3, 4, 5, 6, 7 and 2 more"):
        check_values("vectors", vectors, resolve_metric("l2"))


def test_the_largest_number_of_each_dtype_is_finite():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        vectors = torch.full((2, 2), torch.finfo(dtype).max, dtype=dtype)
        check_values("vectors", torch.cat([vectors, -vectors]), resolve_metric("l2"))


def test_ids_are_taken_as_tensors_sequences_and_ints():
    assert as_ids("ids", 7, CPU).tolist() == [7]
    assert as_ids("ids", [], CPU).dtype == torch.int64
    assert as_ids("ids", range(3), CPU).tolist() == [0, 1, 2]
    assert as_ids("ids", torch.tensor([5], dtype=torch.uint8), CPU).dtype == torch.int64
    for wrong in (1.5, [0.5], [True], "a", torch.tensor([1j])):
        with pytest.raises(DtypeError):
            as_ids("ids", wrong, CPU)
    for wrong, kind in (("a", "str"), (["a", "b"], "list of str"), (object(), "object")):
        with pytest.raises(DtypeError, match=f"ids is a {kind}, expected one integer or several"):
            as_ids("ids", wrong, CPU)
    with pytest.raises(ArgumentError, match="negative id -2"):
        as_ids("ids", [4, -2], CPU)
    with pytest.raises(ShapeError):
        as_ids("ids", [[1]], CPU)


def test_a_repeated_id_is_named():
    check_unique("ids", torch.tensor([5, 3, 4]))
    with pytest.raises(DuplicateIdError, match="ids has the id 3 more than once"):
        check_unique("ids", torch.tensor([3, 5, 3]))


@pytest.mark.parametrize("radius", [2, 2.0, torch.tensor(2), torch.tensor([2.0]), torch.full((3,), 2.0)])
def test_a_radius_is_one_number_or_one_per_query(radius):
    assert torch.equal(as_radius(radius, 3, CPU), torch.full((3,), 2.0))
