"""Memory of a search of lists in Triton: torch's part of it, with stand-ins for the kernels."""

import importlib.util

import pytest
import torch
from memory_meter import MemoryMeter
from torch.utils._python_dispatch import _disable_current_modes
from triton_stand_ins import AFTER_SCANS

from elips_torch.core.metric import resolve_metric
from elips_torch.indexes.inverted_lists import InvertedLists
from elips_torch.kernels.ivf_search_eager import ivf_search_eager
from elips_torch.kernels.list_layout import DecodedRows, StoredRows
from elips_torch.kernels.plane import Plane, make_plane
from elips_torch.kernels.selection import Selection

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
from elips_torch.kernels import group_search_triton, ivf_triton
from elips_torch.kernels.ivf_scan_triton import ListBounds

N_ROWS, N_QUERIES, DIM, NLIST = 6000, 80, 16, 12
WORKSPACE = 2**21


def scan(queries, probes, codes, starts, sizes, *, group, mask, slots, scales, biases, residuals, **terms):
    """Bound group after group, and allocate what the kernel's launcher does."""
    width = int(torch.where(probes < 0, 0, (sizes[probes.clamp_min(0)] + group - 1) // group).sum(1).max())
    with _disable_current_modes():
        bounds = (queries.double() @ codes.double().T) * scales
        bounds += residuals * terms["q_residual"][:, None]
        if biases is not None:
            bounds += biases * terms["q_bias"][:, None]
        if mask is not None:
            bounds = torch.where(mask[..., slots.clamp_min(0)], bounds, -3e38)
        maxima, columns = torch.full((len(queries), width), -3e38), torch.zeros_like(probes)
        for query, lists in enumerate(probes.tolist()):
            column = 0
            for place, number in enumerate(lists):
                columns[query, place] = column
                start, size = (int(starts[number]), int(sizes[number])) if number >= 0 else (0, 0)
                for first in range(start, start + size, group):
                    maxima[query, column] = bounds[query, first : min(first + group, start + size)].max()
                    column += 1
    # Pairs of query and list, unsorted and sorted.
    pairs = torch.empty(9, probes.numel(), dtype=torch.int64)
    found = torch.empty(len(queries), width)
    with _disable_current_modes():
        found.copy_(maxima)
    del pairs
    return ListBounds(found, columns)


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch):
    monkeypatch.setattr(ivf_triton, "ivf_scan_triton", scan)
    for name, function in AFTER_SCANS.items():
        monkeypatch.setattr(group_search_triton, name, function)


def problem(name):
    generator = torch.Generator().manual_seed(0)
    database, queries = (torch.randn(n, DIM, generator=generator) for n in (N_ROWS, N_QUERIES))
    match name:
        case "duplicates":
            database[:] = database[0].clone()
        case "one large row":
            database[100] *= 1e6
    lists = InvertedLists()
    lists.rebuild(torch.randint(0, NLIST, (N_ROWS,), generator=generator), NLIST)
    probes = torch.stack([torch.randperm(NLIST, generator=generator)[:5] for _ in range(N_QUERIES)])
    return queries, database, probes, lists.layout


@pytest.mark.parametrize("decoded", [False, True], ids=["plane", "decoded"])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("name", ["random", "duplicates", "one large row"])
def test_a_search_stays_within_the_workspace(name, metric, decoded):
    queries, database, probes, layout = problem(name)
    kind = resolve_metric(metric)
    plane = make_plane(kind, database, "int8")
    codes, terms = (rows.new_zeros(len(layout.slots), rows.shape[1]) for rows in (plane.codes, plane.terms))
    codes[layout.places], terms[layout.places] = plane.codes, plane.terms
    decode = StoredRows(database, Plane(codes, terms, plane.mean), in_slots=True)
    if decoded:
        decode = DecodedRows(database.__getitem__, torch.float32, DIM)
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(N_QUERIES, N_ROWS, generator=generator) < 0.8
    exclude = torch.randint(-1, N_ROWS, (N_QUERIES, 20), generator=generator)
    for selection in (Selection(), Selection(mask, exclude)):
        with MemoryMeter() as meter:
            step = ivf_triton.triton_lists(layout, decode, kind, 10, 5, selection.n_excluded, WORKSPACE)
            scores, rows, certified = step.run(queries, probes, 10, None, selection, WORKSPACE)
        assert meter.peak <= WORKSPACE
        if name == "random":
            assert bool(certified.all())
        wanted = ivf_search_eager(queries, probes, layout, decode, 10, kind, None, selection, 2**26)
        assert torch.equal(rows[certified], wanted[1][certified])
        assert torch.equal(scores[certified], wanted[0][certified])


def test_many_probes_stay_within_the_workspace():
    n_probes, k, workspace = 400, 100, 2 * WORKSPACE
    generator = torch.Generator().manual_seed(0)
    database = torch.randn(N_ROWS, DIM, generator=generator)
    # Alike enough for many groups to survive.
    database = database[:1] + 1e-3 * database
    queries = database[:N_QUERIES] + 1e-3
    lists = InvertedLists()
    lists.rebuild(torch.randint(0, n_probes, (N_ROWS,), generator=generator), n_probes)
    probes = torch.arange(n_probes).expand(N_QUERIES, -1).contiguous()
    kind = resolve_metric("l2")
    plane = make_plane(kind, database, "int8")
    codes, terms = (
        rows.new_zeros(len(lists.layout.slots), rows.shape[1]) for rows in (plane.codes, plane.terms)
    )
    codes[lists.places], terms[lists.places] = plane.codes, plane.terms
    decode = StoredRows(database, Plane(codes, terms, plane.mean), in_slots=True)
    with MemoryMeter() as meter:
        step = ivf_triton.triton_lists(lists.layout, decode, kind, k, n_probes, 0, workspace)
        scores, rows, certified = step.run(queries, probes, k, None, Selection(), workspace)
    assert bool(certified.any())
    assert meter.peak <= workspace
    wanted = ivf_search_eager(queries, probes, lists.layout, decode, k, kind, None, Selection(), 2**26)
    assert torch.equal(rows[certified], wanted[1][certified])
    assert torch.equal(scores[certified], wanted[0][certified])
