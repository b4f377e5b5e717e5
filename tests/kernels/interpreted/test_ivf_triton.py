import pytest
import torch

from elips_torch.core.metric import resolve_metric
from elips_torch.indexes.inverted_lists import InvertedLists
from elips_torch.kernels import ivf_scan_triton as scan
from elips_torch.kernels.ivf_decoded import DecodedLists
from elips_torch.kernels.ivf_search_eager import ivf_search_eager
from elips_torch.kernels.ivf_triton import ScannedLists, triton_lists
from elips_torch.kernels.list_layout import DecodedRows, StoredRows
from elips_torch.kernels.plane import Plane, make_plane, plain_plane
from elips_torch.kernels.selection import Selection
from elips_torch.reference.ivf_search import ivf_search

METRICS = ["l2", "ip", "cosine"]
KINDS = ["int8", "bf16", "fp32", "decoded"]
WORKSPACE = 2**24
DIM, NLIST = 20, 5


@pytest.fixture(autouse=True)
def _short_stretches(monkeypatch):
    monkeypatch.setattr(scan, "LIST_RANGE", 64)
    monkeypatch.setattr(scan, "QUERY_RANGE", 32)


def problem(n_queries=3, n=70, n_probes=3, dtype=torch.float32):
    """Return vectors with duplicates, lists of which some are empty, and probes."""
    generator = torch.Generator().manual_seed(n_queries)
    database = torch.randn(n, DIM, generator=generator)
    database[n // 2 : n // 2 + 20] = database[:20]
    assignments = torch.randint(0, NLIST - 2, (n,), generator=generator)
    probes = torch.stack([torch.randperm(NLIST, generator=generator) for _ in range(n_queries)])
    lists = InvertedLists()
    lists.rebuild(assignments, NLIST)
    queries = torch.randn(n_queries, DIM, generator=generator)
    return queries, database.to(dtype), assignments, probes[:, :n_probes].contiguous(), lists.layout


def decoder(kind, metric, database, layout):
    if kind == "decoded":
        return DecodedRows(lambda rows: database[rows], database.dtype, DIM)
    plane = plain_plane(metric, database) if kind == "fp32" else make_plane(metric, database, kind)
    # What lies in slots without rows would win.
    spread = [rows.new_full((len(layout.slots), rows.shape[1]), 100) for rows in (plane.codes, plane.terms)]
    for slots, rows in zip(spread, (plane.codes, plane.terms), strict=True):
        slots[layout.places] = rows
    return StoredRows(database, Plane(*spread, plane.mean, plane.is_integer), in_slots=True)


def search(kind, metric, arguments, k, ranks=None, selection=Selection(), workspace=WORKSPACE, some=False):
    queries, database, _, probes, layout = arguments
    metric = resolve_metric(metric)
    decode = decoder(kind, metric, database, layout)
    step = triton_lists(layout, decode, metric, k, probes.shape[1], selection.n_excluded, workspace)
    assert isinstance(step, DecodedLists if kind == "decoded" else ScannedLists)
    found = step.run(queries, probes, k, ranks, selection, workspace)
    assert bool(found[2].any() if some else found[2].all())
    return found


def check(kind, metric, arguments, k, ranks=None, mask=None, exclude=None, **options):
    queries, database, assignments, probes, _ = arguments
    scores, rows, certified = search(kind, metric, arguments, k, ranks, Selection(mask, exclude), **options)
    ids = rows if ranks is None else torch.where(rows < 0, -1, ranks[rows.clamp_min(0)])
    excluded = exclude
    if ranks is not None and exclude is not None:
        excluded = torch.where(exclude < 0, -1, ranks[exclude.clamp_min(0)])
    wanted = ivf_search(
        queries, database, assignments, probes, k, metric, ids=ranks, mask=mask, exclude=excluded
    )
    assert torch.equal(ids[certified], wanted[1][certified])
    assert torch.equal(scores[certified], wanted[0][certified])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
def test_equals_the_reference(metric, kind):
    for n_queries, k in ((1, 3), (4, 10)):
        check(kind, metric, problem(n_queries), k)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_vectors(dtype, kind):
    if kind == "fp32":
        kind = "decoded"
    check(kind, "l2", problem(dtype=dtype), 6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_masks_exclusions_ranks_and_probes_of_nothing(metric, kind):
    arguments = problem(6)
    probes = arguments[3]
    probes[3] = -1
    probes[4, 1:] = -1
    generator = torch.Generator().manual_seed(0)
    ranks = torch.randperm(70, generator=generator)
    exclude = torch.randint(-1, 70, (6, 10), generator=generator)
    shared, own = torch.rand(70, generator=generator) < 0.5, torch.rand(6, 70, generator=generator) < 0.1
    for mask in (None, shared, own):
        check(kind, metric, arguments, 12, ranks, mask, exclude)


@pytest.mark.parametrize("kind", ["int8", "decoded"])
def test_no_query_finds_anything(kind):
    arguments = problem(4)
    arguments[3].fill_(-1)
    scores, rows, certified = search(kind, "ip", arguments, 5)
    assert bool((rows == -1).all())
    assert bool((scores == -torch.inf).all())
    assert bool(certified.all())


@pytest.mark.parametrize("kind", ["int8", "decoded"])
def test_a_small_workspace_takes_parts(kind):
    arguments = problem(6)
    whole, parts = search(kind, "l2", arguments, 4), search(kind, "l2", arguments, 4, workspace=2**17)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_what_survives_in_masses_is_left_to_another_search(monkeypatch):
    monkeypatch.setattr("elips_torch.kernels.group_search_triton._MOST_GROUPS", 2)
    monkeypatch.setattr("elips_torch.kernels.group_search_triton._GROUPS_PER_NEIGHBOUR", 0)
    queries, database, assignments, probes, layout = problem(n_probes=NLIST)
    database[:] = database[:1]
    metric = resolve_metric("l2")
    decode = decoder("int8", metric, database, layout)
    step = triton_lists(layout, decode, metric, 3, NLIST, 0, WORKSPACE)
    assert not bool(step.run(queries, probes, 3, None, Selection(), WORKSPACE)[2].any())
    found = ivf_search_eager(
        queries, probes, layout, decode, 3, metric, None, Selection(), WORKSPACE, triton_lists
    )
    wanted = ivf_search(queries, database, assignments, probes, 3, "l2")
    assert torch.equal(found[1], wanted[1])


def test_what_it_cannot_serve():
    _, database, _, _, layout = problem()
    l1, l2 = resolve_metric("l1"), resolve_metric("l2")
    assert triton_lists(layout, StoredRows(database), l1, 3, 4, 0, WORKSPACE) is None
    assert triton_lists(layout, StoredRows(database.double()), l2, 3, 4, 0, WORKSPACE) is None
    decode = decoder("int8", l2, database, layout)
    assert triton_lists(layout, decode, l2, 3, 4, 0, 1000) is None
