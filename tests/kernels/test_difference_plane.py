"""Codes whose differences are summed bound every distance, and drop what is far away."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elips_torch.core.hardware import device_facts
from elips_torch.core.metric import resolve_metric
from elips_torch.core.native import native_reasons
from elips_torch.kernels import search_native
from elips_torch.kernels.difference_plane import (
    METRICS,
    DifferenceCodes,
    choose_codes,
    encode_differences,
    lost_share,
    step_for,
    tells_apart,
)
from elips_torch.kernels.distance_native import DifferenceSearch
from elips_torch.kernels.plane import LARGEST_NORM, RESIDUAL
from elips_torch.kernels.selection import Selection

pytestmark = pytest.mark.skipif(
    bool(native_reasons(device_facts("cpu"))), reason="; ".join(native_reasons(device_facts("cpu")))
)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def made(vectors, kind="int8", metric="l1", order=None):
    """Return a plane of rows, or None."""
    codes = choose_codes(resolve_metric(metric), vectors, kind, order)
    return None if codes is None else codes.encode(vectors)


def code(metric, queries, plane):
    """Return codes, terms, rounding and usable of queries, as a search makes them."""
    n_queries, dim = queries.shape
    codes = torch.empty(n_queries, dim, dtype=torch.int8 if plane.kind == "int8" else torch.float32)
    terms = torch.empty(3, n_queries)
    rounding, offsets = torch.empty(2, n_queries, dtype=torch.float64)
    usable = torch.empty(n_queries, dtype=torch.bool)
    assert search_native.native_code(
        queries=queries.double(),
        mean=plane.mean,
        codes=codes,
        terms=terms,
        rounding=rounding,
        offsets=offsets,
        usable=usable,
        rounded=lost_share(plane.kind, dim),
        largest=LARGEST_NORM / dim,
        step=plane.step,
        dim=dim,
        n_queries=n_queries,
        metric=search_native.METRICS[metric],
        code_type=search_native.CODE_TYPES[codes.dtype],
        n_threads=1,
    )
    assert torch.equal(rounding[usable], offsets[usable])
    return codes, terms.double(), rounding, usable


def slack(metric, queries, vectors, plane):
    """Return how far distances ``(Q, N)`` are from their bounds, in units of the errors said."""
    codes, (scale, residual_factor, norm_factor), offsets, usable = code(metric, queries, plane)
    assert bool(usable.all())
    if plane.kind == "int8":
        differences = (codes[:, None].double() - plane.codes[None].double()).abs().sum(2)
    else:
        differences = torch.zeros(len(codes), plane.n_rows)
        # As badly as may be: one after the other, in float32.
        for feature in (codes[:, None] - plane.codes[None].float()).abs().unbind(2):
            differences += feature
        differences = differences.double()
    error = residual_factor[:, None] * plane.terms[:, RESIDUAL].double() + norm_factor[:, None]
    distances = resolve_metric(metric).score(queries[:, None].double(), vectors[None].double())
    # What adds the same to every row of a query is not rounded alike here.
    rounded = 2.0**-50 * queries.shape[1] * (distances + offsets[:, None])
    return ((distances + scale[:, None] * differences - offsets[:, None]).abs() - rounded) / error


@st.composite
def problems(draw):
    dim = draw(st.sampled_from([1, 2, 5, 16, 63, 64, 65, 200]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    vectors = torch.randn(draw(st.integers(1, 60)), dim, generator=generator)
    queries = torch.randn(7, dim, generator=generator)
    scale = 10.0 ** draw(st.integers(-30, 10))
    shape = draw(
        st.sampled_from(["plain", "far queries", "long rows", "constant", "whole", "offset", "heavy"])
    )
    if shape == "far queries":
        queries = queries * 10.0 ** torch.arange(-2, 5)[:, None]
    elif shape == "long rows":
        vectors[::5] *= 1000
    elif shape == "constant":
        vectors = vectors[:1].expand_as(vectors).contiguous()
    elif shape == "whole":
        vectors, scale = (20 * vectors).round(), 1.0
    elif shape == "offset":
        vectors, queries = vectors + 1000, queries + 1000
    elif shape == "heavy":
        vectors = vectors.exp().square()
    return queries * scale, vectors * scale


@settings(deadline=None, max_examples=200)
@given(problems(), st.sampled_from(METRICS), st.sampled_from(DTYPES), st.sampled_from(["int8", "bf16"]))
def test_no_distance_leaves_its_bounds(problem, metric, dtype, kind):
    queries, vectors = (each.to(dtype) for each in problem)
    if not bool(vectors.isfinite().all() and queries.isfinite().all()):
        return
    plane = made(vectors, kind, metric)
    if plane is None:
        # Codes would say little of such rows, but nothing wrong.
        step = float(vectors.float().abs().max()) / 127 if kind == "int8" else 1.0
        plane = encode_differences(vectors, vectors.float().mean(0), kind, step)
    assert plane.kind == kind
    assert float(slack(metric, queries, vectors, plane).max()) <= 1.0


@pytest.mark.parametrize("edge", [-128, 127])
def test_queries_at_the_ends_of_the_codes(edge):
    step = float(torch.tensor(0.037))
    vectors = (torch.randn(200, 8, generator=torch.Generator().manual_seed(0)) * 60).round() * step
    plane = encode_differences(vectors, torch.zeros(8), "int8", step)
    queries = (edge + torch.linspace(-0.9, 0.9, 37))[:, None].expand(-1, 8).contiguous() * step
    assert float(slack("l1", queries, vectors, plane).max()) <= 1.0


def test_what_rows_lose_by_rounding_counts():
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        mean, step = torch.randn(1, generator=generator), float(torch.tensor(0.01 + seed * 0.0137))
        vectors = mean + step * torch.randint(-128, 128, (3000, 1), generator=generator)
        plane = encode_differences(vectors, mean, "int8", step)
        # A query that is the mean loses nothing itself.
        assert float(slack("l1", mean[None], vectors, plane).max()) <= 1.0


def test_bounds_are_not_wider_than_codes_leave():
    generator = torch.Generator().manual_seed(0)
    vectors, queries = torch.randn(500, 256, generator=generator), torch.randn(20, 256, generator=generator)
    plane = made(vectors)
    _, (_, _, norm_factor), _, _ = code("l1", queries, plane)
    factors = code("gower", queries, plane)[1]
    assert float(factors[1].mean()) == pytest.approx(1 / 256, rel=1e-5)
    assert float(factors[2].mean()) == pytest.approx(float(norm_factor.mean()) / 256, rel=1e-5)
    # A feature that lies anywhere in its step is a quarter of it away from its code, on average.
    quarter = 256 * plane.step / 4
    assert float(plane.terms[:, RESIDUAL].mean()) < 1.1 * quarter
    assert float(norm_factor.mean()) < 1.1 * quarter


def test_whole_numbers_are_their_codes():
    vectors = torch.randint(0, 256, (300, 40), generator=torch.Generator().manual_seed(0)).float()
    plane = made(vectors)
    assert plane.step == 1.0
    assert torch.equal(plane.codes.float() + plane.mean, vectors)
    assert float(plane.terms[:, RESIDUAL].max()) < 0.02


def test_queries_far_from_all_rows_are_bounded_as_closely():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(500, 64, generator=generator)
    plane = made(vectors)
    near, far = vectors[:20], vectors[:20] + 1e5
    factors = [code("l1", each, plane)[1][2].mean() for each in (near, far)]
    assert float(factors[1]) < 1.1 * float(factors[0])


def test_a_step_is_as_short_as_the_rows():
    vectors = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    step = step_for(vectors, torch.zeros(64))
    assert step_for(vectors * 2.0**-70, torch.zeros(64)) == step * 2.0**-70
    assert step_for(vectors[:20] * 0.0, torch.zeros(64)) > 0.0


def test_a_few_long_rows_do_not_make_the_others_coarse():
    vectors = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    mean = torch.zeros(64)
    step = step_for(vectors, mean)
    vectors[7] *= 1e4
    assert step_for(vectors, mean) < 4 * step


@pytest.mark.parametrize(
    "lengthen",
    [
        lambda vectors: vectors[::17].mul_(1e4),
        lambda vectors: vectors[:, 3].mul_(1000),
        lambda vectors: vectors.mul_(3).exp_(),
        # Most queries would find their neighbours, those near these rows none by codes.
        lambda vectors: vectors[::100].mul_(1000),
    ],
    ids=["rows", "feature", "all", "few rows"],
)
def test_rows_of_all_sizes_have_short_floats(lengthen):
    vectors = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    assert made(vectors).kind == "int8"
    lengthen(vectors)
    plane = made(vectors, order=vectors[:, 3].argsort())
    assert plane.kind == "bf16"
    assert plane.step == 1.0
    # Half a unit of 8 bits, of each feature.
    sizes = (vectors - plane.mean).abs().sum(1)
    assert bool((plane.terms[:, RESIDUAL] < sizes / 256).all())


@pytest.mark.parametrize("kind", ["int8", "bf16"])
def test_codes_must_tell_rows_apart_that_are_near_each_other(kind):
    generator = torch.Generator().manual_seed(0)
    cluster = torch.randint(0, 100, (20_000,), generator=generator)
    spread = torch.randn(20_000, 128, generator=generator)
    vectors = torch.randn(100, 128, generator=generator)[cluster] + 1e-3 * spread
    order = cluster.argsort()
    codes = choose_codes(resolve_metric("l1"), vectors, kind)
    # Any rows lie far from each other.
    assert codes is not None
    assert not tells_apart(vectors, codes, order)
    assert choose_codes(resolve_metric("l1"), vectors, kind, order) is None
    usual = vectors + 0.5 * spread
    assert choose_codes(resolve_metric("l1"), usual, kind, order).kind == kind


def test_a_sample_is_taken_of_rows_that_are_as_many_as_it_takes():
    vectors = torch.randn(1023, 128, generator=torch.Generator().manual_seed(0)).exp().square()
    codes = DifferenceCodes("int8", torch.zeros(128), 1.0)
    assert tells_apart(vectors, codes)
    assert not tells_apart(vectors[torch.arange(1024) % 1023], codes)


def test_what_sums_of_floats_lose_counts():
    # Every addition is rounded to the same side.
    queries, vectors = torch.full((1, 20_000), 0.1), torch.tensor([[0.0], [0.5], [-3.0]]).expand(-1, 20_000)
    plane = encode_differences(vectors, torch.zeros(20_000), "bf16", 1.0)
    assert float(slack("l1", queries, vectors, plane).max()) <= 1.0


def test_what_sums_of_floats_lose_counts_in_searches():
    dim = 16384
    selection = Selection()
    noise = 2.0**-16 * torch.where(torch.arange(dim) % 2 == 0, 1.0, -1.0)
    rows = torch.stack([0 * noise, noise, -noise, noise.roll(dim // 2), 2 * noise, noise / 2])
    # What float32 sums lose is more than the differences of these distances.
    rows[:, -1] = torch.arange(6) * 2.0**-11
    plane = encode_differences(rows, torch.zeros(dim), "bf16", 1.0)
    for number in range(40):
        query = torch.full((1, dim), 0.1 + 0.013 * number)
        search = DifferenceSearch(rows, resolve_metric("l1"), plane, 1, 0)
        _, found, certified = search.run(query, 1, None, selection, 2**26)
        distances = (query.double() - rows.double()).abs().sum(1).float()
        assert bool(certified.all())
        assert int(found) == int((distances == distances.min()).nonzero()[0])


def test_of_too_many_features_no_sample_says_that_int8_codes_serve():
    vectors = torch.randn(1100, 20_000, generator=torch.Generator().manual_seed(0))
    assert made(vectors).kind == "bf16"


def test_sums_of_too_many_floats_say_nothing():
    vectors = torch.randn(3, 2**17, generator=torch.Generator().manual_seed(0))
    mean = torch.zeros(2**17)
    assert float(encode_differences(vectors, mean, "bf16", 1.0).terms[:, RESIDUAL].min()) > 1000
    assert encode_differences(vectors[:, :1].expand(-1, 2**23), mean[:1].expand(2**23), "bf16", 1.0) is None


def test_rows_that_are_their_codes_do_not_choose_the_step():
    vectors = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    step = step_for(vectors, torch.zeros(64))
    vectors[::100], vectors[7] = 0.0, 1e4
    assert step_for(vectors, torch.zeros(64)) == pytest.approx(step, rel=0.5)


@pytest.mark.parametrize("kind", ["int8", "bf16"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e38])
def test_what_cannot_be_bounded(value, kind):
    vectors = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    plane = made(vectors, kind)
    queries = vectors[:3].clone()
    queries[1, 4] = value
    assert code("l1", queries, plane)[3].tolist() == [True, False, True]
    vectors[3, 2] = value
    assert made(vectors, kind) is None
    assert encode_differences(vectors, plane.mean, kind, plane.step) is None


@pytest.mark.parametrize("kind", ["int8", "bf16"])
def test_no_rows(kind):
    plane = encode_differences(torch.empty(0, 8), torch.zeros(8), kind, 1.0)
    assert plane.codes.shape == (0, 8)
    assert plane.terms.shape == (0, 4)
