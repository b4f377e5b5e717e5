"""The certificate: every similarity lies within the bounds that the passes give it."""

import pytest
import torch

from elips_torch.core.metric import resolve_metric
from elips_torch.kernels.plane import UNIT, encode, make_plane
from elips_torch.kernels.screen import code_queries, group_terms, threshold
from elips_torch.kernels.screen_passes import EAGER, NO_ROW

METRICS = ["l2", "ip", "cosine"]
KINDS = ["int8", "bf16"]
N_QUERIES, N_ROWS, DIM = 7, 320, 40
FINE_ROWS = 8
PER_COARSE = 2


def pairs(name):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(N_QUERIES, DIM, generator=generator)
    x = torch.randn(N_ROWS, DIM, generator=generator)
    steps = torch.arange(N_ROWS)[:, None]
    sets = {
        "random": (q, x),
        "own rows": (x[:N_QUERIES], x),
        "offset": (q + 1e4, x + 1e4),
        "far offset": (q + 1e6, x + 1e6),
        "sizes": (q * torch.logspace(-3, 6, N_QUERIES)[:, None], x * torch.logspace(-3, 6, N_ROWS)[:, None]),
        "opposite": (q, -q[:1] * (1.0 + steps * 2.0**-23)),
        "parallel": (q, q[:1] * (1.0 + steps * 2.0**-23)),
        "all equal": (q, x[:1].expand(N_ROWS, DIM)),
        "zeros": (q * (torch.arange(N_QUERIES) > 2)[:, None], x * (steps % 3 > 0)),
        "integers": ((q * 30).round().clamp(-127, 127), (x * 30).round().clamp(-128, 127)),
        "integers, others asked": (q * 30, (x * 30).round().clamp(-128, 127)),
        "bytes": ((q * 40 + 128).round().clamp(0, 255), (x * 40 + 128).round().clamp(0, 255)),
        "one large feature": (q, x * torch.where(torch.arange(DIM) == 3, 1e5, 1e-5)),
        "tiny rows, large queries": (q * 2.0**50, x * 2.0**-77),
        "large rows, tiny queries": (q * 2.0**-100, x * 2.0**50),
        "large": (q * 2.0**50, x * 2.0**54),
        "float16": (q.half(), x.half()),
        "float64 queries": (q.double() + 1e-9, x.bfloat16()),
    }
    return sets[name]


NAMES = [
    *("random", "own rows", "offset", "far offset", "sizes", "opposite", "parallel", "all equal", "zeros"),
    *("integers", "integers, others asked", "bytes", "one large feature", "tiny rows, large queries"),
    *("large rows, tiny queries", "large", "float16", "float64 queries"),
]


def similarities(metric, queries, vectors, mean):
    """Return what is bounded, (Q, N) float64: see the head of the module."""
    q, x = queries.double(), vectors.double()
    if metric == "cosine":
        q, x = (each / torch.linalg.vector_norm(each, dim=1, keepdim=True) for each in (q, x))
        q, x = q.nan_to_num(0.0), x.nan_to_num(0.0)
    x = x - mean.double()
    if metric == "l2":
        return (q - mean.double()) @ x.t() - x.square().sum(1) / 2
    return q @ x.t()


def roundoff(queries, vectors, plane):
    """Return what the float64 similarities above may themselves have lost, (Q, N)."""
    q = torch.linalg.vector_norm(queries.double(), dim=1) + torch.linalg.vector_norm(plane.mean.double())
    norm = plane.terms[:, 2].double()
    return 4 * vectors.shape[1] * 2.0**-53 * (q[:, None] * norm + norm.square())


def grouped(metric, passes, coded, plane, hidden=None):
    """Return bounds from the passes over groups: fine (Q, groups) and coarse (2, Q, groups)."""
    products = (plane.codes.double() @ coded.codes.double().t()).float()
    shape = (-1, PER_COARSE, FINE_ROWS)
    fine = torch.full((N_ROWS // FINE_ROWS // PER_COARSE, PER_COARSE, N_QUERIES), torch.nan)
    coarse = torch.full((2, len(fine), N_QUERIES), torch.nan)
    products = products.view(*shape[:1], PER_COARSE, FINE_ROWS, N_QUERIES)
    widths, query_terms = group_terms(metric, coded, plane.terms)
    row_terms = plane.terms.view(*shape, 1, 4)
    arguments = (row_terms, widths.view(*shape, 1), query_terms, fine, coarse)
    if hidden is None:
        passes.group_bounds(products, *arguments)
    else:
        passes.masked_group_bounds(products, hidden.t().reshape(products.shape), *arguments)
    return fine.permute(2, 0, 1).flatten(1), coarse.permute(0, 2, 1)


def by_row(passes, coded, plane):
    """Return bounds (Q, N) below and above, from the pass over rows."""
    upper, lower = torch.full((2, len(coded.codes), plane.n_rows), torch.nan)
    for query in range(len(coded.codes)):
        passes.row_bounds(
            plane.codes,
            plane.terms,
            coded.codes[query].float(),
            coded.terms[:, query],
            coded.slack,
            upper[query],
            lower[query],
        )
    return lower, upper


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", NAMES)
def test_similarities_lie_within_the_bounds(name, metric, kind):
    queries, vectors = pairs(name)
    plane = make_plane(resolve_metric(metric), vectors, kind)
    coded = code_queries(resolve_metric(metric), queries, plane)
    assert bool(coded.usable.all())
    exact = similarities(metric, queries, vectors, plane.mean)
    lost = roundoff(queries, vectors, plane)
    # What is no more than an ulp of a bound is the business of `threshold`.
    lower, upper = by_row(EAGER, coded, plane)
    lost = lost + (exact.abs() + lower.double().abs()) * (UNIT if coded.is_exact else 0.0)
    assert bool((lower.double() <= exact + lost).all())
    assert bool((upper.double() >= exact - lost).all())

    fine, coarse = grouped(resolve_metric(metric), EAGER, coded, plane)
    best = (exact - lost).unflatten(1, (-1, FINE_ROWS)).amax(2)
    assert bool((fine.double() >= best).all())
    best = (exact - lost).unflatten(1, (-1, FINE_ROWS * PER_COARSE)).amax(2)
    assert bool((coarse[0].double() >= best).all())
    best = (exact + lost).unflatten(1, (-1, FINE_ROWS * PER_COARSE)).amax(2)
    assert bool((coarse[1].double() <= best).all())

    owners = torch.arange(N_QUERIES).repeat_interleave(N_ROWS // FINE_ROWS)
    rows = torch.arange(N_ROWS).view(-1, FINE_ROWS).repeat(N_QUERIES, 1)
    upper = EAGER.pair_bounds(
        plane.codes, plane.terms, coded.codes.float(), coded.terms, coded.slack, owners, rows
    )
    assert bool((upper.view(N_QUERIES, N_ROWS).double() >= exact - lost).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
def test_the_bounds_are_close_on_ordinary_data(metric, kind):
    """Bounds that hold because they are huge would certify nothing."""
    queries, vectors = pairs("random")
    plane = make_plane(resolve_metric(metric), vectors, kind)
    lower, upper = by_row(EAGER, code_queries(resolve_metric(metric), queries, plane), plane)
    exact = similarities(metric, queries, vectors, plane.mean)
    assert float((upper - lower).mean()) < 0.25 * float(exact.std())


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_integers_have_no_error(metric):
    queries, vectors = pairs("integers")
    plane = make_plane(resolve_metric(metric), vectors, "int8")
    coded = code_queries(resolve_metric(metric), queries, plane)
    assert coded.is_exact
    lower, upper = by_row(EAGER, coded, plane)
    exact = similarities(metric, queries, vectors, plane.mean).float()
    assert torch.equal(lower, exact)
    assert torch.equal(upper, exact)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
def test_hidden_rows_bound_nothing(metric, kind):
    queries, vectors = pairs("sizes")
    plane = make_plane(resolve_metric(metric), vectors, kind)
    coded = code_queries(resolve_metric(metric), queries, plane)
    hidden = torch.rand(N_QUERIES, N_ROWS, generator=torch.Generator().manual_seed(1)) < 0.9
    hidden[:, :64] = True
    lower, upper = by_row(EAGER, coded, plane)
    fine, coarse = grouped(resolve_metric(metric), EAGER, coded, plane, hidden)
    upper, lower = upper.masked_fill(hidden, NO_ROW), lower.masked_fill(hidden, NO_ROW)
    slack = 1e-5 * float(upper[~hidden].abs().max())
    # Of what is seen the groups' bounds are those of rows or wider; of what is hidden, no row.
    for found, size in ((fine, 8), (coarse[0], 16)):
        best, none = upper.unflatten(1, (-1, size)).amax(2), hidden.unflatten(1, (-1, size)).all(2)
        assert bool((found >= best - slack).all())
        assert bool((found[none] == NO_ROW).all())
    assert bool((coarse[1] <= lower.unflatten(1, (-1, 16)).amax(2) + slack).all())
    assert bool((coarse[:, :, :4] == NO_ROW).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
def test_queries_that_cannot_be_bounded_are_not_usable(metric, kind):
    queries, vectors = pairs("random")
    queries = queries.clone()
    queries[0, 3], queries[1, 3], queries[2, 3] = torch.nan, torch.inf, -torch.inf
    queries[3], queries[4] = 2.0**62, 2.0**-130
    if metric == "cosine":
        # NaN has no direction; it is screened as zero, which no row differs by.
        queries[0] = queries[1]
    coded = code_queries(resolve_metric(metric), queries, make_plane(resolve_metric(metric), vectors, kind))
    # The directions of long queries are bounded as well as any.
    assert coded.usable.tolist() == [False, False, False, metric == "cosine", True, True, True]
    assert bool(coded.terms.isfinite().all())


def test_a_threshold_leaves_out_only_what_scores_worse():
    """Rows below it differ from the k-th by more than rounding to float32 can hide."""
    lowest = torch.tensor([-5.0, -1e-6, 0.0, 1e-6, 1.0, 3e7, -3e7])
    for rounding in (0.0, 1.0, 1e8):
        offsets = torch.full((7,), rounding, dtype=torch.float64)
        limit = threshold(offsets, lowest)
        assert limit.dtype == torch.float32
        assert bool((limit < lowest).all())
        # The worst case of "l2", whose score is the offset minus twice the similarity.
        kth = (offsets - 2 * lowest.double()).float()
        dropped = (offsets - 2 * limit.nextafter(torch.tensor(-torch.inf)).double()).float()
        assert bool((dropped > kth).all())
        kth, dropped = (offsets + lowest.double()).float(), (offsets + limit.double()).float()
        assert bool((dropped < kth).all())


def test_without_enough_rows_every_row_matters():
    lowest = torch.tensor([NO_ROW, 2 * NO_ROW / 3, -torch.inf, torch.nan])
    limit = threshold(torch.zeros(4, dtype=torch.float64), lowest)
    assert limit.tolist() == [-torch.inf] * 4


@pytest.mark.parametrize("kind", KINDS)
def test_factors_below_the_normal_numbers_are_not_rounded_down(kind):
    generator = torch.Generator().manual_seed(0)
    # Parallel to what the queries lose, so that the bound of Cauchy and Schwarz is reached.
    vectors = torch.full((8, 15), 2.0**57)
    queries = (torch.rand(200, 1, generator=generator) * 2.0**-138).expand(200, 15)
    plane = encode(resolve_metric("ip"), vectors, torch.zeros(15), kind)
    coded = code_queries(resolve_metric("ip"), queries, plane)
    exact = queries.double() @ vectors.double().t()
    lower, upper = by_row(EAGER, coded, plane)
    assert bool((lower.double() <= exact).all())
    assert bool((upper.double() >= exact).all())
