"""Search of inverted lists in C++ equals its reference, by planes and by decoded rows."""

import pytest
import torch

from elips_torch import FlatIndex, IVFFlatIndex, IVFPQIndex, IVFSQIndex
from elips_torch.core.hardware import DeviceFacts, device_facts
from elips_torch.core.metric import resolve_metric
from elips_torch.core.native import native_reasons
from elips_torch.indexes.inverted_lists import InvertedLists
from elips_torch.kernels import difference_plane, ivf_decoded, knn_native, search_native
from elips_torch.kernels.ivf_native import native_lists
from elips_torch.kernels.list_layout import DecodedRows, StoredRows
from elips_torch.kernels.plane import Plane, make_plane, plain_plane
from elips_torch.kernels.selection import Selection
from elips_torch.quantizers.scalar import QTYPES
from elips_torch.reference.ivf_search import ivf_search

pytestmark = pytest.mark.skipif(
    bool(native_reasons(device_facts("cpu"))), reason="; ".join(native_reasons(device_facts("cpu")))
)
METRICS = ["l2", "ip", "cosine"]
WORKSPACE = 64 * 2**20
DECODERS = ["fp32", "in slots", "decoded", *(["int8", "int8 in slots"] if device_facts("cpu").vnni else [])]
SHORT = ["bf16", "bf16 in slots"]
STEPS = ["steps", "steps in slots"] if device_facts("cpu").vnni else []
DIFFERENCES = ["decoded", "stored", *SHORT, *STEPS]
WAYS = [
    *((metric, kind) for metric in METRICS for kind in DECODERS),
    *((metric, kind) for metric in difference_plane.METRICS for kind in DIFFERENCES),
]


def decoder(kind, metric, database, layout):
    if kind == "decoded":
        return DecodedRows(lambda rows: database[rows], torch.float32, database.shape[1])
    if kind == "stored":
        return StoredRows(database)
    metric = resolve_metric(metric)
    if "steps" in kind:
        plane = difference_plane.encode_differences(database, database[1::8].mean(0), "int8", 0.04)
    elif "bf16" in kind:
        plane = difference_plane.encode_differences(database, database[1::8].mean(0), "bf16", 1.0)
    else:
        plane = make_plane(metric, database, "int8") if "int8" in kind else plain_plane(metric, database)
    if "in slots" not in kind:
        return StoredRows(database, plane)
    # What lies in slots without rows would win.
    spread = [
        torch.full((len(layout.slots), each.shape[1]), 100, dtype=each.dtype)
        for each in (plane.codes, plane.terms)
    ]
    for slots, rows in zip(spread, (plane.codes, plane.terms), strict=True):
        slots[layout.places] = rows
    return StoredRows(database, Plane(*spread, plane.mean, plane.is_integer, plane.step), in_slots=True)


def problem(n_queries, n=700, nlist=17, n_probes=9, dim=24):
    generator = torch.Generator().manual_seed(n_queries)
    database = torch.randn(n, dim, generator=generator)
    database[n // 2 : n // 2 + 50] = database[:50]
    queries = torch.randn(n_queries, dim, generator=generator)
    # Some lists stay empty.
    assignments = torch.randint(0, nlist - 3, (n,), generator=generator)
    probes = torch.stack([torch.randperm(nlist, generator=generator) for _ in range(n_queries)])[:, :n_probes]
    lists = InvertedLists()
    lists.rebuild(assignments, nlist)
    return queries, database, assignments, probes, lists.layout


def search(kind, metric, queries, database, probes, layout, k, ranks=None, selection=Selection(), **options):
    workspace = options.get("workspace", WORKSPACE)
    step = native_lists(
        layout,
        decoder(kind, metric, database, layout),
        resolve_metric(metric),
        k,
        probes.shape[1],
        selection.n_excluded,
        workspace,
    )
    scores, rows, certified = step.run(queries, probes, k, ranks, selection, workspace)
    assert bool(certified.all())
    return scores, rows


def assert_same(found, expected):
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("n_queries", [1, 5, 70])
@pytest.mark.parametrize(("metric", "kind"), WAYS)
def test_equals_the_reference(metric, kind, n_queries, threads, monkeypatch):
    monkeypatch.setattr(knn_native, "native_threads", lambda: threads)
    monkeypatch.setattr(knn_native, "_WORTH_THREADS", 0)
    queries, database, assignments, probes, layout = problem(n_queries)
    for k in (1, 10, 400) if n_queries <= 5 else (10,):
        found = search(kind, metric, queries, database, probes, layout, k)
        assert_same(found, ivf_search(queries, database, assignments, probes, k, metric))


@pytest.mark.parametrize("dim", [1, 4, 7, 8, 15, 17, 63, 64, 65, 128, 200])
@pytest.mark.parametrize("kind", DIFFERENCES)
def test_differences_of_any_number_of_features(dim, kind):
    if "steps" in kind and dim < knn_native.LEAST_INT8_DIM:
        pytest.skip("an index of so few features has no int8 codes")
    for n_queries in (1, 20):
        queries, database, assignments, probes, layout = problem(n_queries, dim=dim)
        found = search(kind, "l1", queries, database, probes, layout, 5)
        assert_same(found, ivf_search(queries, database, assignments, probes, 5, "l1"))


@pytest.mark.parametrize(("metric", "kind"), [way for way in WAYS if way[0] in ("l2", "l1")])
def test_selections_ranks_and_probes_of_nothing(metric, kind):
    queries, database, assignments, probes, layout = problem(20)
    probes[3] = -1
    probes[4, 2:] = -1
    generator = torch.Generator().manual_seed(0)
    ids = torch.randperm(700, generator=generator)
    exclude = torch.randint(-1, 700, (20, 30), generator=generator)
    excluded_ids = torch.where(exclude < 0, -1, ids[exclude.clamp_min(0)])
    shared, own = torch.rand(700, generator=generator) < 0.5, torch.rand(20, 700, generator=generator) < 0.2
    for mask in (None, shared, own):
        found = search(
            kind,
            metric,
            queries,
            database,
            probes,
            layout,
            12,
            ids.argsort().argsort(),
            Selection(mask, exclude),
        )
        wanted = ivf_search(
            queries, database, assignments, probes, 12, metric, ids=ids, mask=mask, exclude=excluded_ids
        )
        known = torch.where(found[1] < 0, -1, ids[found[1].clamp_min(0)])
        assert_same((found[0], known), wanted)


@pytest.mark.parametrize("kind", STEPS)
def test_distances_answer_where_codes_say_nothing(kind):
    queries, database, assignments, probes, layout = problem(40, n=9000)
    # Rows that no code fits are kept for every query, and there are more of them than is worth while.
    database[torch.arange(9000) % 8 > 0] *= 1e4
    exclude = torch.arange(40 * 30).reshape(40, 30)
    selection = Selection(None, exclude)
    step = native_lists(
        layout, decoder(kind, "l1", database, layout), resolve_metric("l1"), 10, 9, 30, WORKSPACE
    )
    alone = step.search.run(queries, 10, None, selection, WORKSPACE, step.lists(probes))[2]
    assert not bool(alone.any())
    scores, rows, certified = step.run(queries, probes, 10, None, selection, WORKSPACE)
    assert bool(certified.all())
    wanted = ivf_search(queries, database, assignments, probes, 10, "l1", exclude=exclude)
    assert_same((scores, rows), wanted)


@pytest.mark.parametrize("kind", STEPS)
def test_some_queries_are_left_to_distances_with_what_is_theirs(kind):
    queries, database, assignments, probes, _ = problem(40, n=9000)
    # No code fits most rows of one long list: they survive for the queries that probe it.
    assignments[:6000] = 3
    lists = InvertedLists()
    lists.rebuild(assignments, 17)
    layout = lists.layout
    database[(torch.arange(9000) % 8 != 1) & (assignments == 3)] *= 1e4
    generator = torch.Generator().manual_seed(1)
    exclude = torch.randint(0, 9000, (40, 600), generator=generator)
    mask = torch.rand(40, 9000, generator=generator) < 0.5
    selection = Selection(mask, exclude)
    decode = decoder(kind, "l1", database, layout)
    step = native_lists(layout, decode, resolve_metric("l1"), 10, 9, 600, WORKSPACE)
    alone = step.search.run(queries, 10, None, selection, WORKSPACE, step.lists(probes))[2]
    assert 0 < int(alone.sum()) < 40
    scores, rows, certified = step.run(queries, probes, 10, None, selection, WORKSPACE)
    assert bool(certified.all())
    wanted = ivf_search(queries, database, assignments, probes, 10, "l1", mask=mask, exclude=exclude)
    assert_same((scores, rows), wanted)


@pytest.mark.parametrize("kind", SHORT)
@pytest.mark.parametrize("dim", [1, 5, 8, 13, 16, 24, 67])
def test_short_floats_need_no_int8_instructions(dim, kind, monkeypatch):
    for capability in {"AVX2", device_facts("cpu").capability}:
        facts = DeviceFacts("cpu", "2 cores", capability)
        for module in (knn_native, search_native):
            monkeypatch.setattr(module, "device_facts", lambda device, facts=facts: facts)
        for n_queries in (1, 70):
            queries, database, assignments, probes, layout = problem(n_queries, dim=dim)
            # Rows of all sizes, for which int8 codes have no step.
            database *= 10.0 ** (torch.arange(700) % 9)[:, None]
            found = search(kind, "l1", queries, database, probes, layout, 10)
            assert_same(found, ivf_search(queries, database, assignments, probes, 10, "l1"))


@pytest.mark.parametrize("kind", [kind for kind in DECODERS if "int8" in kind])
def test_distances_answer_where_int8_codes_say_nothing(kind, monkeypatch):
    queries, database, assignments, probes, layout = problem(40, n=9000, nlist=5)
    # Codes cannot tell most rows of a list from each other.
    database = database[assignments] + 1e-3 * database
    selection = Selection(torch.rand(40, 9000, generator=torch.Generator().manual_seed(1)) < 0.5)
    arguments = layout, decoder(kind, "l2", database, layout), resolve_metric("l2")
    step = native_lists(*arguments, 10, 5, 0, WORKSPACE)
    alone = step.search.run(queries, 10, None, selection, WORKSPACE, step.lists(probes))[2]
    assert int(alone.sum()) < 20
    scores, rows, certified = step.run(queries, probes, 10, None, selection, WORKSPACE)
    assert bool(certified.all())
    wanted = ivf_search(queries, database, assignments, probes, 10, "l2", mask=selection.mask)
    assert_same((scores, rows), wanted)
    # However many of them are searched at a time.
    monkeypatch.setattr(type(step.otherwise()), "queries_at_once", lambda *sizes: 7)
    again = step.run(queries, probes, 10, None, selection, WORKSPACE)
    assert bool(again[2].all())
    assert_same(again[:2], wanted)


@pytest.mark.parametrize("metric", ["ip", "cosine"])
@pytest.mark.parametrize("kind", [kind for kind in DECODERS if "int8" in kind])
def test_the_definition_decides_where_int8_codes_say_nothing(metric, kind):
    queries, database, assignments, probes, layout = problem(12, n=3000, nlist=5)
    database = database[assignments] + 1e-3 * database
    # All queries find what is theirs among near ties, more than a reservoir holds.
    selection = Selection(torch.rand(12, 3000, generator=torch.Generator().manual_seed(1)) < 0.5)
    found = search(kind, metric, queries, database, probes, layout, 10, selection=selection)
    assert_same(found, ivf_search(queries, database, assignments, probes, 10, metric, mask=selection.mask))


def test_distances_of_rows_that_lie_close_together_far_from_the_origin():
    queries, database, assignments, probes, layout = problem(40, n=9000)
    database, queries = 100 + 1e-3 * database, 100 + 1e-3 * queries
    step = native_lists(
        layout,
        StoredRows(database, plain_plane(resolve_metric("l2"), database)),
        resolve_metric("l2"),
        10,
        9,
        0,
        WORKSPACE,
    )
    assert not bool(step.search.run(queries, 10, None, Selection(), WORKSPACE, step.lists(probes))[2].any())
    scores, rows, certified = step.run(queries, probes, 10, None, Selection(), WORKSPACE)
    assert bool(certified.all())
    assert_same((scores, rows), ivf_search(queries, database, assignments, probes, 10, "l2"))


@pytest.mark.parametrize("kind", [kind for kind in DIFFERENCES if kind in ("bf16", "steps")])
@pytest.mark.parametrize("dim", [63, 65, 100, 127])
def test_the_last_feature_counts(dim, kind):
    queries, database, assignments, probes, layout = problem(20, n=3000, dim=dim)
    database[:, :-1] = queries[:, :-1] = 0.5
    database[:, -1] = torch.randperm(3000, generator=torch.Generator().manual_seed(dim)) / 700 - 2.1
    decode = decoder(kind, "l1", database, layout)
    step = native_lists(layout, decode, resolve_metric("l1"), 3, 9, 0, WORKSPACE)
    scores, rows, certified = step.search.run(queries, 3, None, Selection(), WORKSPACE, step.lists(probes))
    assert bool(certified.all())
    assert_same((scores, rows), ivf_search(queries, database, assignments, probes, 3, "l1"))


def test_what_does_not_fit_is_decoded_in_parts(monkeypatch):
    queries, database, assignments, probes, _ = problem(40, n=20_000, dim=64)
    # One list is longer than the workspace has room for.
    assignments = torch.where(torch.arange(20_000) % 3 > 0, 5, assignments)
    lists = InvertedLists()
    lists.rebuild(assignments, 17)
    layout = lists.layout
    decoded = []
    parts = ivf_decoded.list_parts

    def spy(*args):
        for lists, part in parts(*args):
            decoded.append(part.n_rows)
            yield lists, part

    monkeypatch.setattr(ivf_decoded, "list_parts", spy)
    found = search("decoded", "l2", queries, database, probes, layout, 10, workspace=4 * 2**20)
    assert len(decoded) > 3
    assert max(decoded) * 64 * 4 < 2 * 2**20
    assert_same(found, search("fp32", "l2", queries, database, probes, layout, 10))


def test_an_index_keeps_a_plane_and_searches_by_it(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    vectors, queries = torch.randn(6000, 32, generator=generator), torch.randn(50, 32, generator=generator)
    index = IVFFlatIndex(32, 24, nprobe=5).fit(vectors)
    index.add(vectors[:4000])
    index.search(queries[:1])
    index.add(vectors[4000:])
    index.remove(index.ids[::3])
    index.upsert(vectors[:10] + 1.0, index.ids[:10])
    assert index.plane.kind in ("int8", "fp32")
    assert index.explain(queries, implementation="native").chosen == "native"
    for k in (1, 10):
        for n_queries in (1, 50):
            found = index.search(queries[:n_queries], k, implementation="native")
            assert_same(found, index.search(queries[:n_queries], k, implementation="eager"))
    flat = FlatIndex(32)
    flat.add(index.reconstruct(index.ids), index.ids)
    every = index.search(queries, 10, nprobe=24, implementation="native")
    assert_same(every, flat.search(queries, 10))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "make",
    [
        lambda metric: IVFSQIndex(36, 32, "int8", metric, nprobe=6),
        lambda metric: IVFSQIndex(37, 32, "int8", metric, nprobe=6, by_residual=False),
        lambda metric: IVFPQIndex(36, 32, 12, 8, metric, nprobe=6, min_points_per_centroid=0),
        lambda metric: IVFPQIndex(36, 32, 9, 4, metric, nprobe=6, by_residual=False),
        lambda metric: IVFPQIndex(35, 32, 7, 4, metric, nprobe=6),
        lambda metric: IVFSQIndex(36, 32, "int4", metric, nprobe=6),
    ],
    ids=["SQ8", "SQ8 plain", "PQ8", "PQ4 plain", "PQ4", "SQ4"],
)
def test_codes_are_decoded_to_the_last_bit(make, metric):
    """Scores are those of the vectors that the quantizer decodes."""
    generator = torch.Generator().manual_seed(0)
    index = make(metric)
    vectors = torch.randn(3000, index.dim, generator=generator)
    queries = torch.randn(60, index.dim, generator=generator)
    index.fit(vectors)
    index.add(vectors)
    index.remove(index.ids[5::7])
    for n_queries in (1, 60):
        found = index.search(queries[:n_queries], 10, implementation="native")
        assert_same(found, index.search(queries[:n_queries], 10, implementation="eager"))
    mask = torch.rand(60, index.ntotal, generator=generator) < 0.3
    found = index.search(queries, 10, mask=mask, implementation="native")
    assert_same(found, index.search(queries, 10, mask=mask, implementation="eager"))


@pytest.mark.parametrize("qtype", QTYPES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("by_residual", [True, False])
@pytest.mark.parametrize("screen", ["auto", "none"])
def test_scalars_of_any_size_are_searched_as_they_are_decoded(qtype, metric, by_residual, screen):
    generator = torch.Generator().manual_seed(0)
    for dim in (5, 13, 31, 67):
        vectors = torch.randn(600, dim, generator=generator)
        # Features that do not vary, and rows that tie.
        vectors[:, 1::4] = 0.5
        vectors[300:350] = vectors[:50]
        queries = torch.randn(70, dim, generator=generator)
        options = {"by_residual": by_residual, "nprobe": 4, "niter": 2, "screen": screen}
        index = IVFSQIndex(dim, 9, qtype, metric, **options).fit(vectors)
        index.add(vectors)
        index.remove(index.ids[5::7])
        index.search(queries[:1], implementation="native")
        packed = index._decoder().packed
        may_be = screen == "auto" and device_facts("cpu").vnni
        is_on_grid = may_be and qtype.startswith("int") and metric != "cosine"
        has_plane = may_be and not qtype.startswith("int")
        assert (packed.grid is not None, packed.plane is not None) == (is_on_grid, has_plane)
        assert index.is_screened == (is_on_grid or has_plane)
        for n_queries in (1, 6, 70):
            found = index.search(queries[:n_queries], 10, implementation="native")
            assert_same(found, index.search(queries[:n_queries], 10, implementation="eager"))
        exclude = index.search(queries, 3).ids
        found = index.search(queries, 10, exclude=exclude, implementation="native")
        assert_same(found, index.search(queries, 10, exclude=exclude, implementation="eager"))
        if qtype.startswith("int"):
            # No quantizer writes just any bits, but a file may hold them.
            index.listed_codes.random_(generator=generator)
            found = index.search(queries, 10, implementation="native")
            assert_same(found, index.search(queries, 10, implementation="eager"))


@pytest.mark.parametrize("qtype", ["fp16", "bf16"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("screen", ["auto", "none"])
def test_short_floats_that_are_not_finite(qtype, metric, screen):
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(600, 13, generator=generator)
    options = {"nprobe": 4, "niter": 2, "check_finite": False, "screen": screen}
    index = IVFSQIndex(13, 4, qtype, metric, **options).fit(vectors)
    vectors[7, 3], vectors[9, 1] = torch.nan, torch.inf
    index.add(vectors)
    queries = torch.randn(20, 13, generator=generator)
    for k in (5, 600):
        found, wanted = (index.search(queries, k, implementation=name) for name in ("native", "eager"))
        assert torch.equal(found.ids, wanted.ids)
        torch.testing.assert_close(found.scores, wanted.scores, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scales", [(1e-30, 1e-22, 1.0), (1e-30, 1e-30, 1e-30), (1e17, 1e22, 1e30)])
@pytest.mark.parametrize("screen", ["auto", "none"])
def test_vectors_whose_squares_leave_float32(metric, scales, screen):
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(600, 21, generator=generator)
    vectors *= torch.tensor(scales).repeat(200)[:, None]
    vectors[5::50] = 0.0
    options = {"nprobe": 3, "niter": 2, "by_residual": False, "screen": screen}
    index = IVFSQIndex(21, 4, "bf16", metric, **options).fit(vectors)
    index.add(vectors)
    queries = vectors[::29] + 0.1 * vectors[1::29]
    for k in (5, 600):
        found, wanted = (index.search(queries, k, implementation=name) for name in ("native", "eager"))
        assert_same(found, wanted)


def test_lists_that_another_thread_is_changing_are_not_read_outside():
    queries, database, _, probes, layout = problem(5)
    layout.slots[int(layout.starts[0])] = 10**9
    layout.sizes[1] = 10**9
    layout.starts[2] = -5
    _, rows = search("fp32", "l2", queries, database, probes, layout, 10)
    assert int(rows.max()) < 700
