"""Rows of codes on a grid: what it says of every row holds, and searches that rest on it are exact."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from elips_torch import FlatIndex, IVFPQIndex, IVFSQIndex
from elips_torch.core.hardware import device_facts
from elips_torch.core.metric import resolve_metric
from elips_torch.core.native import native_reasons
from elips_torch.kernels import packed_native
from elips_torch.kernels.code_grid import make_grid
from elips_torch.kernels.coded_rows import PackedRows, PackedTable
from elips_torch.kernels.packed_native import fill_terms, grid_serves, has_grids
from elips_torch.quantizers.packing import pack, unpack
from elips_torch.testing.contract import assert_same

pytestmark = pytest.mark.skipif(
    bool(native_reasons(device_facts("cpu"))) or not device_facts("cpu").vnni,
    reason="grids serve where there are fast int8 products and a C++ compiler",
)
METRICS = ("l2", "ip")


def int8_codes(grid, table, codes):
    """Return u of `code_grid`, ``(N, D)`` float64."""
    if grid.scalars is not None:
        codes = unpack(codes, table.bits, grid.scalars.shape[1])
        counts, shift = grid.scalars.to(torch.int64)
        return ((codes.to(torch.int64) & counts) - shift).double()
    numbers = codes if table.bits == 8 else torch.stack([codes & 15, codes >> 4], 2).flatten(1)
    m = grid.table.shape[0]
    return grid.table[torch.arange(m), numbers[:, :m].long()].flatten(1).double()


def decoded(table, codes, centroid):
    """Return the vectors as the quantizers decode them, with their roundings."""
    if table.low is not None:
        vectors = unpack(codes, table.bits, table.dim).float().mul(table.table).add(table.low)
    else:
        numbers = codes if table.bits == 8 else torch.stack([codes & 15, codes >> 4], 2).flatten(1)
        m = table.table.shape[0]
        vectors = table.table[torch.arange(m), numbers[:, :m].long()].flatten(1)
    return vectors if centroid is None else vectors + centroid


def scalars(dim, generator, size, offset, bits=8):
    steps = size * torch.rand(dim, generator=generator)
    steps[torch.rand(dim, generator=generator) < 0.2] = 0.0
    low = offset + size * torch.randn(dim, generator=generator)
    numbers = torch.randint(0, 2**bits, (40, dim), generator=generator, dtype=torch.uint8)
    return PackedTable(steps, low, bits), pack(numbers, bits)


def parts(dim, generator, size, offset, bits=8):
    m = next(m for m in (8, 4, 3, 2, 1) if dim % m == 0)
    table = offset + size * torch.randn(m, 2**bits, dim // m, generator=generator)
    # A feature that does not vary, and centroids far from the others.
    table[0, :, 0] = offset
    table[-1, :3] *= 100
    width = m if bits == 8 else (m + 1) // 2
    return PackedTable(table, bits=bits), torch.randint(
        0, 256, (40, width), generator=generator, dtype=torch.uint8
    )


@settings(max_examples=60, deadline=None)
@given(
    dim=st.sampled_from([4, 5, 12, 16, 33, 64]),
    kind=st.sampled_from(["scalars", "scalars 6", "scalars 4", "parts", "parts of 4 bits"]),
    metric=st.sampled_from(METRICS),
    size=st.sampled_from([1e-12, 1e-3, 1.0, 1e6]),
    offset=st.sampled_from([0.0, 1.0, -1e4]),
    residual=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_terms_bound_what_they_say_they_bound(dim, kind, metric, size, offset, residual, seed):
    generator = torch.Generator().manual_seed(seed)
    make = scalars if "scalars" in kind else parts
    table, codes = make(
        dim, generator, size, offset, **({"bits": 4} if "4" in kind else {"bits": 6} if "6" in kind else {})
    )
    centroids = 3 * size * torch.randn(5, dim, generator=generator) if residual else None
    lists = torch.randint(0, 5, (40,), generator=generator)
    own = None if centroids is None else centroids[lists]
    grid = make_grid(resolve_metric(metric), table, centroids)
    assert bool((grid.steps > 0).all())
    origin = grid.zero + (0.0 if own is None else own.double())
    centred = decoded(table, codes, own).double() - grid.mean.double()
    y = (centred - origin) / grid.steps.double()
    u = int8_codes(grid, table, codes)
    assert bool((u.abs() <= 128).all())
    assert float(torch.linalg.vector_norm(y - u, dim=1).max()) <= grid.residual
    packed = PackedRows(codes, table, centroids, lists.to(torch.int32) if residual else None, grid=grid)
    terms = torch.full((90, 2), -7.0)
    places = torch.randperm(90, generator=generator)[:40]
    assert fill_terms(resolve_metric(metric), packed, torch.arange(40), places, terms)
    norm = torch.linalg.vector_norm(y, dim=1)
    assert bool((terms[places, 0] >= norm).all())
    # No more than float32, and float64 on the way, may lose.
    sizes = (centred.abs() + 2 * grid.mean.double().abs() + origin.abs()) / grid.steps.double()
    lost = 2**-49 * torch.linalg.vector_norm(sizes, dim=1)
    assert bool((terms[places, 0] <= (norm + lost) * (1 + 1e-6)).all())
    away = centred - origin
    bias = -(origin * away).sum(1) - away.square().sum(1) / 2 if metric == "l2" else torch.zeros(40)
    assert torch.equal(terms[places, 1], bias.float()) or torch.allclose(
        terms[places, 1].double(), bias.double(), rtol=1e-6, atol=float(bias.abs().max()) * 1e-6
    )
    untouched = torch.ones(90, dtype=torch.bool)
    untouched[places] = False
    assert bool((terms[untouched] == -7.0).all())


def test_there_is_no_grid_where_bounds_would_mean_nothing():
    table = PackedTable(torch.ones(4), torch.zeros(4))
    assert make_grid(resolve_metric("cosine"), table, None) is None
    assert make_grid(resolve_metric("l1"), table, None) is None
    assert (
        make_grid(resolve_metric("l2"), PackedTable(torch.ones(4), torch.full((4,), torch.inf)), None) is None
    )
    assert make_grid(resolve_metric("ip"), table, torch.full((2, 4), torch.nan)) is None
    assert make_grid(resolve_metric("ip"), PackedTable(torch.full((2, 256, 2), torch.nan)), None) is None


def shapes():
    """Databases that leave bounds little room, or are extreme in another way."""
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(1500, 24, generator=generator)
    constant = plain.clone()
    constant[:, ::3] = 0.25
    return {
        "plain": plain,
        "far from the origin": plain + 1000,
        "close together": 1 + 1e-3 * plain,
        "equal": plain[:20].repeat(75, 1),
        "constant features": constant,
        "tiny": 1e-18 * plain,
        "huge": 1e15 * plain,
        "one long feature": plain * torch.cat([torch.tensor([1e4]), torch.ones(23)]),
    }


SHAPES = shapes()
MAKERS = {
    "SQ8": lambda metric, residual: IVFSQIndex(
        24, 12, "int8", metric, by_residual=residual, niter=4, nprobe=5
    ),
    "SQ4": lambda metric, residual: IVFSQIndex(
        24, 12, "int4", metric, by_residual=residual, niter=4, nprobe=5
    ),
    "SQ6": lambda metric, residual: IVFSQIndex(
        24, 12, "int6", metric, by_residual=residual, niter=4, nprobe=5
    ),
    "PQ12": lambda metric, residual: pq(12, 8, metric, residual),
    "PQ6": lambda metric, residual: pq(6, 8, metric, residual),
    "PQ3": lambda metric, residual: pq(3, 8, metric, residual),
    "PQ8x4": lambda metric, residual: pq(8, 4, metric, residual),
}


def pq(m, nbits, metric, residual):
    return IVFPQIndex(
        24, 12, m, nbits, metric, by_residual=residual, niter=4, nprobe=5, min_points_per_centroid=1
    )


@pytest.mark.filterwarnings("ignore:vectors has")
@pytest.mark.filterwarnings("ignore:the lists")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("metric", METRICS)
def test_searches_on_a_grid_are_exact(shape, maker, metric):
    vectors = SHAPES[shape]
    for residual in (True, False):
        index = MAKERS[maker](metric, residual).fit(vectors)
        index.add(vectors)
        queries = vectors[::3] + 0.01 * vectors.std() * torch.randn(
            500, 24, generator=torch.Generator().manual_seed(1)
        )
        expected = index.search(queries, 7, implementation="eager")
        for n in (1, 6, 70, 500):
            for k in (1, 7):
                found = index.search(queries[:n], k, implementation="native")
                assert_same(found, type(found)(expected.scores[:n, :k], expected.ids[:n, :k]))
        assert index._decoder().packed.grid is not None


def coded(metric, m=6, n=3000, dim=24, nlist=10):
    """Return an index of lists of random lengths, with random queries."""
    generator = torch.Generator().manual_seed(m)
    vectors = torch.randn(n, dim, generator=generator)
    index = IVFPQIndex(dim, nlist, m, 8, metric, niter=3, nprobe=3, min_points_per_centroid=1).fit(vectors)
    index.add(vectors[torch.randint(0, n, (n,), generator=generator)])
    return index, torch.randn(200, dim, generator=generator)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("dim", "m"), [(24, 24), (34, 17), (36, 12), (40, 8), (40, 5), (72, 6), (66, 33), (260, 260), (300, 300)]
)
def test_tables_of_any_number_and_size_of_parts(metric, dim, m):
    index, queries = coded(metric, m, 700, dim)
    expected = index.search(queries, 5, implementation="eager")
    # From one query per list to more than look anything up.
    for n in (1, 2, 9, 40, 200):
        found = index.search(queries[:n], 5, implementation="native")
        assert_same(found, type(found)(expected.scores[:n], expected.ids[:n]))


@pytest.mark.parametrize("maker", ["SQ4", "SQ6", "SQ8", "PQ6"])
def test_masks_exclusions_and_few_rows(maker):
    vectors = SHAPES["plain"]
    index = MAKERS[maker]("ip", True).fit(vectors)
    index.add(vectors[:90])
    generator = torch.Generator().manual_seed(3)
    queries = vectors[:20]
    mask = torch.rand(90, generator=generator) < 0.4
    own = torch.rand(20, 90, generator=generator) < 0.4
    exclude = torch.randint(-1, 90, (20, 6), generator=generator)
    for options in ({"mask": mask}, {"mask": own}, {"exclude": exclude}, {"mask": own, "exclude": exclude}):
        for n in (2, 20):
            some = {name: each[:n] if each.ndim == 2 else each for name, each in options.items()}
            found = index.search(queries[:n], 40, implementation="native", **some)
            assert_same(found, index.search(queries[:n], 40, implementation="eager", **some))


def test_codes_of_features_that_do_not_vary_do_not_count():
    vectors = SHAPES["constant features"]
    index = MAKERS["SQ8"]("ip", False).fit(vectors)
    index.add(vectors)
    # No quantizer writes them, but a file may hold them.
    index.listed_codes[:, ::3] = torch.arange(1500, dtype=torch.int64).remainder(256).to(torch.uint8)[:, None]
    queries = vectors[:50]
    assert_same(
        index.search(queries, 5, implementation="native"), index.search(queries, 5, implementation="eager")
    )


# What follows changes.


def changes(index, generator):
    """Yield the index after each of many changes of its rows."""
    for _ in range(25):
        n, size = index.ntotal, int(torch.randint(1, 60, (), generator=generator))
        vectors = torch.randn(size, 24, generator=generator)
        change = int(torch.randint(0, 6, (), generator=generator))
        chosen = torch.randperm(n, generator=generator)[: min(size, n)]
        if change == 0 and n > 100:
            index.remove(index.ids[chosen])
        elif change == 1 and n:
            index.upsert(vectors[: len(chosen)], index.ids[chosen])
        elif change == 2 and n:
            # Behind the back of the index.
            index.listed_codes[chosen] = index.listed_codes[chosen.flip(0)].clone()
        elif change == 3 and n:
            index.load_state_dict({name: tensor.clone() for name, tensor in index.state_dict().items()})
        else:
            index.add(vectors)
        yield index


@pytest.mark.filterwarnings("ignore:the lists")
@pytest.mark.parametrize("maker", ["SQ4", "SQ6", "SQ8", "PQ6"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("seed", range(3))
def test_terms_follow_every_change(maker, metric, seed):
    generator = torch.Generator().manual_seed(seed)
    index = MAKERS[maker](metric, True).fit(SHAPES["plain"])
    for changed in changes(index, generator):
        if not changed.ntotal:
            continue
        packed = changed._decoder().packed
        fresh = torch.zeros_like(packed.terms)
        places = changed.lists.places
        assert fill_terms(changed._metric, packed, torch.arange(changed.ntotal), places, fresh)
        assert torch.equal(packed.terms[places], fresh[places])
        assert len(packed.terms) == changed.lists.capacity


def test_changes_that_are_known_do_not_make_all_terms_anew(monkeypatch):
    index = MAKERS["PQ6"]("l2", True).fit(SHAPES["plain"])
    index.add(SHAPES["plain"])
    index.search(SHAPES["plain"][:3])
    filled = []
    unhurt = packed_native.fill_terms

    def counted(metric, packed, rows, places, terms):
        filled.append(len(rows))
        return unhurt(metric, packed, rows, places, terms)

    monkeypatch.setattr("elips_torch.indexes.code_screen.fill_terms", counted)
    index.add(SHAPES["plain"][:7])
    index.search(SHAPES["plain"][:3])
    index.upsert(SHAPES["plain"][:2], index.ids[:2])
    index.remove(index.ids[:5])
    index.search(SHAPES["plain"][:3])
    assert sum(filled) <= 9
    index.quantizer.codebooks.mul_(1.5)
    index.search(SHAPES["plain"][:3])
    assert filled[-1] == index.ntotal
    expected = index.search(SHAPES["plain"][:40], 5, implementation="eager")
    assert_same(index.search(SHAPES["plain"][:40], 5, implementation="native"), expected)


def test_terms_are_no_state():
    index = MAKERS["SQ8"]("l2", True).fit(SHAPES["plain"])
    index.add(SHAPES["plain"])
    before = set(index.state_dict())
    index.search(SHAPES["plain"][:3])
    assert set(index.state_dict()) == before
    assert "_terms" not in index.__getstate__()


def test_the_grid_waits_for_int8_products(monkeypatch):
    monkeypatch.setattr("elips_torch.kernels.packed_native.device_facts", lambda _: device_facts("meta"))
    assert not grid_serves(24)
    index = MAKERS["PQ6"]("ip", True).fit(SHAPES["plain"])
    index.add(SHAPES["plain"])
    assert index._decoder().packed.grid is None
    queries = SHAPES["plain"][:30]
    assert_same(
        index.search(queries, 5, implementation="native"), index.search(queries, 5, implementation="eager")
    )


def test_a_search_of_all_lists_is_that_of_the_decoded_vectors():
    index = MAKERS["PQ6"]("l2", True).fit(SHAPES["plain"])
    index.add(SHAPES["plain"])
    flat = FlatIndex(24)
    flat.add(index.reconstruct(index.ids))
    queries = SHAPES["plain"][:100]
    assert_same(index.search(queries, 9, nprobe=12), flat.search(queries, 9))


def test_sums_of_products_fit_int32():
    most = (2**31 - 1) // 128**2
    assert has_grids(most, torch.device("cpu"))
    assert not has_grids(most + 1, torch.device("cpu"))
