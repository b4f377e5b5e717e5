"""A plane bounds what its codes lose, recognises integers, and refuses what it cannot bound."""

import pytest
import torch

from elips_torch.core.metric import resolve_metric
from elips_torch.kernels.plane import (
    BIAS,
    NORM,
    RESIDUAL,
    SCALE,
    encode,
    integer_offset,
    make_plane,
    norm_slack,
    plain_plane,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
METRICS = ["l2", "ip", "cosine"]
KINDS = ["int8", "bf16"]


def rows(name, n=300, dim=48):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, dim, generator=generator)
    sets = {
        "random": x,
        "offset": x + 1e4,
        "far offset": x * 1e-3 + 1e6,
        "sizes": x * torch.logspace(-3, 6, n)[:, None],
        "one large feature": x * torch.where(torch.arange(dim) == 3, 1e5, 1e-5),
        "one large row": torch.cat([x[:-1], x[-1:] * 1e6]),
        "near ties": x[:1] * (1.0 + torch.arange(n)[:, None] * 2.0**-23),
        "all equal": x[:1].expand(n, dim),
        "zeros": x * (torch.arange(n) % 3 > 0)[:, None],
        "all zero": x * 0.0,
        "integers": (x * 20).round().clamp(-128, 127),
        "bytes": (x * 40 + 128).round().clamp(0, 255),
        "halves": (x * 20).round() / 2,
        # The squares of these leave float32.
        "tiny": x * 2.0**-76,
        "some tiny": x * torch.where(torch.arange(n) % 5 == 0, 2.0**-76, 1.0)[:, None],
        "denormal": x * 2.0**-140,
        "huge": x * 2.0**54,
    }
    return sets[name]


def fits(name, dtype):
    """Whether the rows stay in the range of a dtype: float16 ends early."""
    return bool(rows(name).to(dtype).isfinite().all())


NAMES = [
    *("random", "offset", "far offset", "sizes", "one large feature", "one large row", "near ties"),
    *("all equal", "zeros", "all zero", "integers", "bytes", "halves"),
    *("tiny", "some tiny", "denormal", "huge"),
]
CASES = [pytest.param(n, d, id=f"{n}-{d}") for n in NAMES for d in DTYPES if fits(n, d)]


def exact_rows(metric, vectors):
    """Return what a plane encodes, in float64."""
    wide = vectors.double()
    if metric == "cosine":
        norms = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
        wide = torch.where(norms == 0, 0.0, wide / norms)
    return wide


def assert_bounds(plane, metric, vectors):
    centred = exact_rows(metric, vectors) - plane.mean.double()
    terms = plane.terms.double()
    assert plane.terms.dtype == torch.float32
    assert bool((terms[:, SCALE] > 0).all())
    residual = torch.linalg.vector_norm(centred - terms[:, SCALE, None] * plane.codes.double(), dim=1)
    norm = torch.linalg.vector_norm(centred, dim=1)
    assert bool((terms[:, RESIDUAL] >= residual).all())
    assert bool((terms[:, NORM] >= norm).all())
    bias = -norm.square() / 2 if metric == "l2" else torch.zeros_like(norm)
    slack = (2 * norm_slack(vectors.shape[1]) * norm.square()).clamp_min(2.0**-100)
    assert bool(((terms[:, BIAS] - bias).abs() <= slack).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_norms_and_residuals_are_upper_bounds(name, dtype, metric, kind):
    vectors = rows(name).to(dtype)
    plane = make_plane(resolve_metric(metric), vectors, kind)
    assert plane is not None
    assert plane.kind == kind
    assert_bounds(plane, metric, vectors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
def test_any_mean_gives_bounds(metric, kind):
    vectors = rows("random")
    for mean in (torch.zeros(48), rows("offset")[0], vectors[5] * 1e-20):
        plane = encode(resolve_metric(metric), vectors, mean, kind)
        assert_bounds(plane, metric, vectors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
def test_the_bounds_are_close(metric, kind):
    """Bounds that hold because they are huge would screen nothing."""
    vectors = rows("random")
    plane = make_plane(resolve_metric(metric), vectors, kind)
    centred = exact_rows(metric, vectors) - plane.mean.double()
    norm = torch.linalg.vector_norm(centred, dim=1)
    residual = torch.linalg.vector_norm(centred - plane.terms[:, :1] * plane.codes.double(), dim=1)
    assert bool((plane.terms[:, NORM] <= norm * 1.0001).all())
    assert bool((plane.terms[:, RESIDUAL] <= residual * 1.01).all())
    assert float((residual / norm).max()) < 0.02


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["random", "bytes"])
def test_the_default_dtype_changes_nothing(name, default):
    vectors, metric = rows(name), resolve_metric("l2")
    expected = make_plane(metric, vectors, "int8")
    torch.set_default_dtype(default)
    try:
        plane = make_plane(metric, vectors, "int8")
    finally:
        torch.set_default_dtype(torch.float32)
    for field in ("codes", "terms", "mean"):
        assert getattr(plane, field).dtype == getattr(expected, field).dtype
        assert torch.equal(getattr(plane, field), getattr(expected, field))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize(
    ("low", "high"), [(-128, 127), (0, 255), (-5, 9), (0, 0), (3, 257), (-255, 0), (7, 7), (769, 1024)]
)
def test_integers_are_recognised_and_without_error(low, high, metric, dtype):
    values = torch.arange(low, high + 1, dtype=torch.float64).to(dtype)
    if not torch.equal(values.double(), torch.arange(low, high + 1).double()):
        values = values[:1].expand(len(values))
    vectors = values.repeat(16)[: 16 * (len(values) // 8 + 1)].reshape(-1, 8).contiguous()
    plane = make_plane(resolve_metric(metric), vectors, "int8")
    assert plane.is_integer
    assert torch.equal(plane.codes.double() + plane.mean.double(), vectors.double())
    assert bool((plane.terms[:, RESIDUAL] == 0).all())
    assert bool((plane.terms[:, SCALE] == 1).all())
    assert_bounds(plane, metric, vectors)


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize(
    "vectors",
    [
        torch.tensor([[1.0, 2.0], [3.0, 4.5]]),
        torch.tensor([[0.0, 256.0]]),
        torch.tensor([[-129.0, 127.0]]),
        torch.tensor([[1025.0, 1025.0]]),
        torch.tensor([[1.0, 1.0 + 2.0**-23]]),
        torch.tensor([[1.0, float("nan")]]),
        torch.tensor([[1.0, float("inf")]]),
    ],
)
def test_other_values_are_no_integers(metric, vectors):
    assert integer_offset(resolve_metric(metric), vectors) is None
    plane = make_plane(resolve_metric(metric), vectors, "int8")
    assert plane is None or not plane.is_integer


def test_directions_are_no_integers():
    assert integer_offset(resolve_metric("cosine"), rows("integers")) is None
    assert not make_plane(resolve_metric("cosine"), rows("integers"), "int8").is_integer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_have_no_plane(bad, metric, kind):
    for name in ("random", "integers"):
        vectors = rows(name).clone()
        vectors[7, 3] = bad
        assert make_plane(resolve_metric(metric), vectors, kind) is None
        assert encode(resolve_metric(metric), vectors[7:8], torch.zeros(48), kind) is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2.0**61, 2.0**70, 3.0e38])
def test_rows_that_are_too_long_have_no_plane(size, kind):
    vectors = rows("random").clone()
    vectors[7] = 0.0
    vectors[7, 3] = size
    for metric in ("l2", "ip"):
        assert make_plane(resolve_metric(metric), vectors, kind) is None
    # Directions have no length.
    assert_bounds(make_plane(resolve_metric("cosine"), vectors, kind), "cosine", vectors)


@pytest.mark.parametrize(("dim", "share"), [(128, 0.30), (384, 0.27)])
def test_memory_beside_float32_vectors(dim, share):
    vectors = torch.rand(2000, dim, generator=torch.Generator().manual_seed(0))
    plane = make_plane(resolve_metric("l2"), vectors, "int8")
    assert plane.codes.nbytes + plane.terms.nbytes + plane.mean.nbytes <= share * vectors.nbytes


def test_norms_of_plain_vectors_hold_where_squares_underflow():
    vectors = torch.full((4, 400), 2.0**-75)
    plane = plain_plane(resolve_metric("ip"), vectors)
    assert bool((plane.terms[:, 2].double() >= torch.linalg.vector_norm(vectors.double(), dim=1)).all())
