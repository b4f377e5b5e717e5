import pytest
import torch

from elips_torch.kernels import ivf_scan_triton as scan
from elips_torch.kernels.group_max_triton import DTYPES
from elips_torch.kernels.ivf_scan_triton import ivf_scan_triton, work_items
from elips_torch.kernels.triton_language import LOWEST_BOUND

ORDERS = [pytest.param(True, id="by list"), pytest.param(False, id="by query")]
SIZES = (0, 1, 63, 127, 200, 0, 5)
GROUP = 16


@pytest.fixture(autouse=True)
def _short_stretches(monkeypatch):
    """So that lists of a few hundred rows are divided."""
    monkeypatch.setattr(scan, "LIST_RANGE", 128)
    monkeypatch.setattr(scan, "QUERY_RANGE", 64)


def codes_of(shape, dtype, generator):
    if dtype == torch.int8:
        return torch.randint(-127, 128, shape, generator=generator).to(torch.int8)
    return torch.randn(shape, generator=generator).to(dtype)


def problem(dtype=torch.int8, n_queries=9, n_probes=3, dim=20, sizes=SIZES):
    """Return queries, probes and lists with slack between them, in another order than their numbers."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor(sizes)
    # Slots that no list owns hold values that would be seen.
    capacities = sizes + torch.randint(1, 9, sizes.shape, generator=generator)
    order = torch.randperm(len(sizes), generator=generator)
    starts = torch.empty_like(sizes)
    starts[order] = capacities[order].cumsum(0) - capacities[order] + 3
    capacity = int(capacities.sum()) + 7
    probes = torch.stack([torch.randperm(len(sizes), generator=generator) for _ in range(n_queries)])
    probes = probes[:, :n_probes].contiguous()
    probes[torch.rand(probes.shape, generator=generator) < 0.1] = -1
    queries = codes_of((n_queries, dim), dtype, generator)
    codes = codes_of((capacity, dim), dtype, generator)
    scales = torch.rand(capacity, generator=generator) + 0.5
    of_slots = [torch.randn(capacity, generator=generator) for _ in range(3)]
    of_queries = [torch.randn(n_queries, generator=generator) for _ in range(3)]
    return queries, probes, codes, starts, sizes, scales, *of_slots, *of_queries


def reference(arguments, group, mask=None, slots=None):
    """One group after the other, in float64, and what float32 may err by."""
    queries, probes, codes, starts, sizes, scales, *terms = arguments
    bounds = queries.double() @ codes.double().T
    error = queries.double().abs() @ codes.double().abs().T
    if scales is not None:
        bounds, error = bounds * scales.double(), error * scales.double()
    for of_slots, of_queries in zip(terms[:3], terms[3:], strict=True):
        if of_slots is not None:
            factor = torch.ones(len(queries)) if of_queries is None else of_queries
            part = factor.double()[:, None] * of_slots.double()
            bounds, error = bounds + part, error + part.abs()
    error *= (5 if codes.dtype == torch.int8 else codes.shape[1] + 5) * 2.0**-24
    if mask is not None:
        keep = mask if slots is None else mask[..., slots]
        bounds = torch.where(keep, bounds, LOWEST_BOUND)
    rows = []
    for query, lists in enumerate(probes.tolist()):
        found = []
        for number in lists:
            start, size = (0, 0) if number < 0 else (int(starts[number]), int(sizes[number]))
            for first in range(start, start + size, group):
                part = slice(first, min(first + group, start + size))
                found.append((bounds[query, part].max(), error[query, part].max()))
        rows.append(found)
    return rows


def check(arguments, group=GROUP, *, list_major=None, **options):
    found = ivf_scan_triton(*arguments, group=group, list_major=list_major, **options)
    expected = reference(arguments, group, **options)
    probes, sizes = arguments[1], arguments[4]
    assert found.maxima.dtype == torch.float32
    assert found.maxima.shape == (len(probes), max(map(len, expected), default=0))
    for query, rows in enumerate(expected):
        values = torch.tensor([float(value) for value, _ in rows], dtype=torch.float64)
        errors = torch.tensor([float(error) for _, error in rows], dtype=torch.float64)
        difference = (found.maxima[query, : len(rows)].double() - values).abs()
        assert bool((difference <= errors + (values.abs() > 1e38) * 1e31).all())
        assert bool((found.maxima[query, len(rows) :] == LOWEST_BOUND).all())
        column = 0
        for probe, number in enumerate(probes[query].tolist()):
            assert found.columns[query, probe] == column
            column += 0 if number < 0 else -(-int(sizes[number]) // group)
    return found


@pytest.mark.parametrize("list_major", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 20, 64, 130])
def test_maxima_are_those_of_the_formula(dim, dtype, list_major):
    check(problem(dtype, dim=dim), list_major=list_major)


@pytest.mark.parametrize("list_major", ORDERS)
@pytest.mark.parametrize(("n_queries", "n_probes"), [(1, 1), (1, 7), (2, 7), (70, 2), (150, 1)])
def test_any_number_of_queries_and_probes(n_queries, n_probes, list_major):
    check(
        problem(n_queries=n_queries, n_probes=n_probes, sizes=(0, 40, 63, 1, 17, 0, 33)),
        list_major=list_major,
    )


@pytest.mark.parametrize("list_major", ORDERS)
@pytest.mark.parametrize("group", [1, 2, 32, 128])
def test_every_size_of_group(group, list_major):
    check(problem(), group, list_major=list_major)


@pytest.mark.parametrize("list_major", ORDERS)
@pytest.mark.parametrize("size", [1, 63, 64, 65, 127, 128, 129, 300])
def test_a_list_of_any_length(size, list_major):
    check(problem(n_queries=3, n_probes=1, sizes=(size,)), list_major=list_major)


@pytest.mark.parametrize("list_major", ORDERS)
def test_integer_products_have_the_bits_of_torch(list_major):
    queries, probes, codes, starts, sizes, *_ = problem()
    found = check((queries, probes, codes, starts, sizes, *[None] * 7), 1, list_major=list_major)
    exact = queries.int() @ codes.int().T
    assert exact.abs().max() < 2**24
    number = int(probes[0, 0])
    part = slice(int(starts[number]), int(starts[number] + sizes[number]))
    assert torch.equal(found.maxima[0, : int(sizes[number])].int(), exact[0, part])


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32], ids=str)
def test_both_orders_of_work_agree(dtype):
    arguments = problem(dtype)
    by_list, by_query = (
        ivf_scan_triton(*arguments, group=GROUP, list_major=list_major) for list_major in (True, False)
    )
    assert torch.equal(by_list.columns, by_query.columns)
    tolerance = 0.0 if dtype == torch.int8 else 1e-4
    assert torch.allclose(by_list.maxima, by_query.maxima, rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("list_major", ORDERS)
@pytest.mark.parametrize("by", ["slot", "row"])
@pytest.mark.parametrize("wide", [False, True], ids=["for all", "of each query"])
def test_a_mask_leaves_rows_out(wide, by, list_major):
    arguments = problem()
    generator = torch.Generator().manual_seed(1)
    capacity = len(arguments[2])
    shape = (len(arguments[0]), capacity) if wide else (capacity,)
    mask = torch.rand(shape, generator=generator) > 0.7
    slots = torch.randperm(capacity, generator=generator) if by == "row" else None
    found = check(arguments, 4, mask=mask, slots=slots, list_major=list_major)
    assert bool((found.maxima == LOWEST_BOUND).any())


@pytest.mark.parametrize("list_major", ORDERS)
@pytest.mark.parametrize("left_out", ["scales", "biases", "residuals", "norms", "factor of biases"])
def test_a_term_may_be_left_out(left_out, list_major):
    arguments = list(problem(torch.float32))
    if left_out == "factor of biases":
        arguments[9] = None
    else:
        place = 5 + ["scales", "biases", "residuals", "norms"].index(left_out)
        arguments[place] = None
        if left_out != "scales":
            arguments[place + 3] = None
    check(arguments, list_major=list_major)


@pytest.mark.parametrize("list_major", ORDERS)
def test_slots_may_have_a_stride(list_major):
    queries, probes, codes, *rest = problem(dim=64)
    check((queries[:, :40], probes, codes[:, :40], *rest), list_major=list_major)


@pytest.mark.parametrize("list_major", ORDERS)
def test_a_list_may_be_probed_twice(list_major):
    arguments = list(problem())
    arguments[1] = torch.tensor([[3, 2, 3]]).repeat(9, 1)
    check(arguments, list_major=list_major)


@pytest.mark.parametrize("list_major", [True, False, None])
def test_nothing_to_scan(list_major):
    arguments = list(problem())
    for probes in (torch.full((9, 3), -1), torch.tensor([[0, 5]]).repeat(9, 1), torch.empty(9, 0).long()):
        arguments[1] = probes
        found = ivf_scan_triton(*arguments, group=GROUP, list_major=list_major)
        assert found.maxima.shape == (9, 0)
        assert found.columns.shape == probes.shape
    empty = [each[:0] if place in (0, 1) else each for place, each in enumerate(problem())]
    empty[9:] = [each[:0] for each in empty[9:]]
    assert ivf_scan_triton(*empty, group=GROUP, list_major=list_major).maxima.shape == (0, 0)


@pytest.mark.parametrize("at_once", [1, 2, 64])
def test_work_covers_every_pair_and_row_once(at_once):
    lists = torch.tensor([-1, 0, 1, 1, 1, 1, 1, 4, 4, 6])
    sizes = torch.tensor([0, 0, 300, 300, 300, 300, 300, 100, 100, 101])
    pairs, rows = work_items(lists, sizes, at_once, 100)
    covered = []
    for pair, row in zip(pairs.tolist(), rows.tolist(), strict=True):
        mine = [p for p in range(pair, min(pair + at_once, len(lists))) if lists[p] == lists[pair]]
        covered += [(p, r) for p in mine for r in range(row, min(row + 100, int(sizes[pair])))]
    assert sorted(covered) == [(p, r) for p in range(len(lists)) for r in range(int(sizes[p]))]


def test_few_pairs_go_by_query_and_many_by_list(monkeypatch):
    used = []
    for name in ("ivf_scan_lists_kernel", "ivf_scan_queries_kernel"):
        kernel = getattr(scan, name)

        class Spy:
            def __getitem__(self, grid, kernel=kernel, name=name):
                used.append(name)
                return kernel[grid]

        monkeypatch.setattr(scan, name, Spy())
    for n_queries in (3, 40):
        check(problem(n_queries=n_queries, n_probes=2, sizes=(30, 0, 7)))
    assert used == ["ivf_scan_queries_kernel", "ivf_scan_lists_kernel"]


def test_what_the_kernels_do_not_take_is_refused():
    queries, probes, codes, *rest = problem()
    with pytest.raises(ValueError, match="power of two"):
        ivf_scan_triton(queries, probes, codes, *rest, group=12)
    with pytest.raises(ValueError, match=r"torch\.float64"):
        ivf_scan_triton(queries.double(), probes, codes.double(), *rest, group=8)
    with pytest.raises(ValueError, match=r"expected int64 \(9, P\)"):
        ivf_scan_triton(queries, probes[:3], codes, *rest, group=8)
    with pytest.raises(ValueError, match="contiguous"):
        ivf_scan_triton(queries, probes, codes.T.contiguous().T, *rest, group=8)
