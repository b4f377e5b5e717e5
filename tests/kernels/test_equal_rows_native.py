"""Search in C++ where more rows tie than a reservoir holds: the reference's answers, in one search."""

import pytest
import torch
from screened_cases import WORKSPACE, assert_reference

from elips_torch import IVFFlatIndex, IVFPQIndex, IVFSQIndex, PQIndex, SQIndex
from elips_torch.core.hardware import device_facts
from elips_torch.core.metric import resolve_metric
from elips_torch.core.native import native_reasons
from elips_torch.kernels import knn_native
from elips_torch.kernels.distance_native import distance_first
from elips_torch.kernels.knn_exact import knn_exact
from elips_torch.kernels.knn_native import NativeSearch, native_first
from elips_torch.kernels.plane import make_plane, plain_plane
from elips_torch.kernels.selection import Selection

pytestmark = pytest.mark.skipif(
    bool(native_reasons(device_facts("cpu"))), reason="; ".join(native_reasons(device_facts("cpu")))
)
N, DIM = 3000, 16
PLANES = ["fp32", *(["int8"] if device_facts("cpu").vnni else [])]
PRODUCTS = ["l2", "ip", "cosine"]
DISTANCES = ["l1", "linf", "lp", "canberra", "braycurtis", "jensenshannon", "gower"]
DATA = ["one row", "seven rows", "a fifth is one row", "equal scores"]


def data(name, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(N, DIM, generator=generator)
    if name == "one row":
        x[:] = x[0].clone()
    elif name == "seven rows":
        x = x[torch.randint(0, 7, (N,), generator=generator)]
    elif name == "a fifth is one row":
        x[torch.rand(N, generator=generator) < 0.2] = x[0].clone()
    else:
        # Rows of other features that are as far from every query, and as long.
        x[:] = x[0].clone()
        x[:, :2] = torch.tensor([[0.25, 0.75], [0.75, 0.25]])[torch.randint(0, 2, (N,), generator=generator)]
    q = x[::500] + 0.01 * torch.rand(6, DIM, generator=generator)
    q[:, 1] = q[:, 0]
    return q.to(dtype), x.to(dtype)


def native(x, metric, kind, k, n_excluded=0):
    metric = resolve_metric(metric, 1.5 if metric == "lp" else None)
    if kind == "distances":
        return distance_first(x, metric, k, n_excluded, WORKSPACE)
    plane = plain_plane(metric, x) if kind == "fp32" else make_plane(metric, x, kind)
    return native_first(x, metric, plane, k, n_excluded, WORKSPACE)


def assert_certified(metric, kind, q, x, k, ids=None, mask=None, exclude=None):
    search = native(x, metric, kind, k, 0 if exclude is None else exclude.shape[1])
    ranks = None if ids is None else ids.argsort().argsort()
    scores, rows, certified = search.run(q, k, ranks, Selection(mask, exclude), WORKSPACE)
    assert bool(certified.all())
    p = 1.5 if metric == "lp" else None
    assert_reference(metric, (scores, rows), q, x, k, ids, mask, exclude, p)


WAYS = [
    *((metric, kind) for metric in PRODUCTS for kind in PLANES),
    *((metric, "distances") for metric in ("l2", *DISTANCES)),
]


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize(("metric", "kind"), WAYS)
def test_ids_decide(metric, kind, name):
    q, x = data(name)
    generator = torch.Generator().manual_seed(1)
    # In order, in reverse order and in none.
    for ids in (None, torch.arange(N).flip(0), torch.randperm(N, generator=generator)):
        for k in (1, 10, 100):
            assert_certified(metric, kind, q, x, k, ids)


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize(("metric", "kind"), WAYS)
def test_rows_that_nobody_sees_push_none_out(metric, kind, name):
    q, x = data(name)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randperm(N, generator=generator)
    exclude = ids.argsort()[:40].expand(6, -1).contiguous()
    for mask in (None, torch.rand(N, generator=generator) < 0.6, torch.rand(6, N, generator=generator) < 0.6):
        assert_certified(metric, kind, q, x, 10, ids, mask, exclude)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("metric", "kind"), [way for way in WAYS if way[1] != "fp32"])
def test_short_floats(metric, kind, dtype):
    for name in DATA:
        q, x = data(name, dtype)
        assert_certified(metric, kind, q, x, 10, torch.arange(N).flip(0))


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_codes_that_are_the_vectors(metric):
    if "int8" not in PLANES:
        pytest.skip("this machine has no int8 products")
    for name in DATA:
        q, x = data(name)
        q, x = (q * 100).round(), (x * 100).round()
        assert make_plane(resolve_metric(metric), x, "int8").is_integer
        assert_certified(metric, "int8", q, x, 10, torch.arange(N).flip(0))


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize(("metric", "kind"), WAYS)
def test_threads_that_share_the_rows(metric, kind, name, monkeypatch):
    """Together they keep more rows than one of them may."""
    monkeypatch.setattr(knn_native, "native_threads", lambda: 3)
    monkeypatch.setattr(knn_native, "_WORTH_THREADS", 0)
    q, x = data(name)
    # Every thread gets more than it has room for.
    x = x.repeat(20, 1)
    assert native(x, metric, kind, 10).plan(1, WORKSPACE).parts == 3
    for each in q[:2].split(1):
        assert_certified(metric, kind, each, x, 10, torch.arange(20 * N).flip(0))


@pytest.mark.parametrize("metric", PRODUCTS)
@pytest.mark.parametrize(
    "make",
    [
        lambda metric: IVFFlatIndex(DIM, 4, metric, nprobe=3),
        lambda metric: IVFSQIndex(DIM, 4, "int8", metric, nprobe=3),
        lambda metric: IVFSQIndex(DIM, 4, "int6", metric, nprobe=3, by_residual=False),
        lambda metric: IVFSQIndex(DIM, 4, "fp16", metric, nprobe=3),
        lambda metric: IVFPQIndex(DIM, 4, 4, 4, metric, nprobe=3),
        lambda metric: IVFPQIndex(DIM, 4, 4, 4, metric, nprobe=3, by_residual=False),
        lambda metric: SQIndex(DIM, "int8", metric),
        lambda metric: PQIndex(DIM, 4, 4, metric),
    ],
    ids=["vectors", "SQ8", "SQ6 plain", "SQfp16", "PQ4", "PQ4 plain", "flat SQ8", "flat PQ4"],
)
def test_indexes_of_rows_that_are_equal(make, metric, monkeypatch):
    opened = []
    run = NativeSearch.run

    def spy(self, *args):
        result = run(self, *args)
        opened.append(int((~result[2]).sum()))
        return result

    monkeypatch.setattr(NativeSearch, "run", spy)
    generator = torch.Generator().manual_seed(0)
    for name in DATA:
        q, x = data(name)
        index = make(metric)
        reference = "decoded" if isinstance(index, (SQIndex, PQIndex)) else "eager"
        index.fit(torch.rand(N, DIM, generator=generator))
        # In an order of their own, and some are gone.
        index.add(x, torch.randperm(N, generator=generator) * 2)
        index.remove(index.ids[::7])
        mask = torch.rand(index.ntotal, generator=generator) < 0.9
        for k in (1, 10, 50):
            found = index.search(q, k, mask=mask, implementation="native")
            wanted = index.search(q, k, mask=mask, implementation=reference)
            assert torch.equal(found.ids, wanted.ids)
            assert torch.equal(found.scores, wanted.scores)
    assert opened
    assert not any(opened)


@pytest.mark.parametrize(("metric", "kind"), [way for way in WAYS if way[0] in ("l2", "ip", "l1")])
def test_exact_sums_between_two_numbers(metric, kind):
    """All sums are exact, and so is what the definition rounds: to the even one of its neighbours."""
    x = torch.zeros(N, 4)
    x[:, 0], x[:, 1] = 8192.0, 2.0
    x[::3, 1], x[1::3, 2] = 6.0, 1.0
    if metric == "l1":
        x[:, 0], x[:, 1] = 2.0**24, 1.0
    q = x[1:3] if metric == "ip" else torch.zeros(2, 4)
    assert_certified(metric, kind, q, x, 10, torch.arange(N).flip(0))
    assert_certified(metric, kind, q, -x, 10, torch.arange(N).flip(0))


# What is still left open, and answered all the same.


@pytest.mark.parametrize("kind", ["fp32", "distances"])
def test_ties_whose_last_bits_are_open(kind):
    """Sums that lie between two float32 numbers, but for a last feature that float64 has no room for."""
    q, x = torch.zeros(5, 4), torch.zeros(N, 4)
    # Beyond 2**26 every eighth number is a float32, and these sums lie 4 above one.
    x[:, 0], x[:, 1], x[:, 2] = 8192.0, 2.0, 2.0**-30
    search = native(x, "l2", kind, 10)
    assert not bool(search.run(q, 10, None, Selection(), WORKSPACE)[2].any())
    found = knn_exact(q, x, 10, resolve_metric("l2"), None, Selection(), WORKSPACE, None, lambda *_: search)
    assert_reference("l2", found, q, x, 10)


@pytest.mark.parametrize("metric", ["linf", "l1"])
def test_many_rows_that_are_not_numbers(metric):
    q, x = data("seven rows")
    x[::2, 3] = torch.nan
    search = native(x, metric, "distances", 10)
    assert not bool(search.run(q, 10, None, Selection(), WORKSPACE)[2].any())
    found = knn_exact(q, x, 10, resolve_metric(metric), None, Selection(), WORKSPACE, None, lambda *_: search)
    assert not bool(found[1].remainder(2).eq(0).any())
    wanted = knn_exact(q, x[1::2].contiguous(), 10, resolve_metric(metric), None, Selection(), WORKSPACE)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], 2 * wanted[1] + 1)


def test_a_hasty_search_leaves_near_ties_open_but_not_equal_rows():
    generator = torch.Generator().manual_seed(0)
    q = torch.rand(6, DIM, generator=generator)
    metric = resolve_metric("l2")
    for x, is_open in (
        (100 + 1e-4 * torch.rand(N, DIM, generator=generator), True),
        (torch.full((N, DIM), 100.0), False),
    ):
        search = native_first(x, metric, plain_plane(metric, x), 10, 0, WORKSPACE)
        assert bool(search.run(q, 10, None, Selection(), WORKSPACE)[2].all())
        search.is_hasty = True
        scores, rows, certified = search.run(q, 10, None, Selection(), WORKSPACE)
        assert bool((certified != is_open).all())
        if not is_open:
            assert_reference("l2", (scores, rows), q, x, 10)
