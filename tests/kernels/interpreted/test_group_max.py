import pytest
import torch

from elips_torch.kernels.group_max_triton import DTYPES, group_max_triton
from elips_torch.kernels.triton_language import LOWEST_BOUND

TERMS = ("scales", "biases", "residuals", "norms")
# Which of these sizes are multiples of a block differs from kernel to kernel.
SHAPES = [
    (1, 1, 1),
    (1, 1000, 100),
    (1, 256, 128),
    (2, 63, 7),
    (2, 127, 48),
    (3, 1, 48),
    (3, 127, 100),
    (3, 1000, 7),
    (17, 63, 1),
    (17, 1000, 300),
    (17, 256, 64),
    (128, 300, 33),
    (129, 63, 48),
    (129, 1000, 7),
    (200, 256, 128),
    (1100, 127, 16),
]


def codes_of(shape, dtype, generator):
    if dtype == torch.int8:
        return torch.randint(-127, 128, shape, generator=generator).to(torch.int8)
    return torch.randn(shape, generator=generator).to(dtype)


def problem(shape, dtype, seed=0):
    n_queries, n_rows, dim = shape
    generator = torch.Generator().manual_seed(seed)
    queries = codes_of((n_queries, dim), dtype, generator)
    codes = codes_of((n_rows, dim), dtype, generator)
    scales = torch.rand(n_rows, generator=generator) + 0.5
    rows = [torch.randn(n_rows, generator=generator) for _ in range(3)]
    of_queries = [torch.randn(n_queries, generator=generator) for _ in range(3)]
    return queries, codes, scales, *rows, *of_queries


def reference(arguments, group, mask=None):
    """The maxima in float64, and what float32 may err by: sums of magnitudes times roundings."""
    queries, codes, scales, *terms = arguments
    rows, of_queries = terms[:3], terms[3:]
    parts = [queries.double() @ codes.double().T]
    sizes = [queries.double().abs() @ codes.double().abs().T]
    if scales is not None:
        parts[0], sizes[0] = parts[0] * scales.double(), sizes[0] * scales.double()
    for row, query in zip(rows, of_queries, strict=True):
        if row is not None:
            parts.append(query.double()[:, None] * row.double())
            sizes.append(parts[-1].abs())
    bounds = sum(parts)
    roundings = (5 if codes.dtype == torch.int8 else codes.shape[1] + 5) * 2.0**-24
    if mask is not None:
        bounds = torch.where(mask, bounds, LOWEST_BOUND)
    n_queries, n_rows = bounds.shape
    missing = -n_rows % group
    bounds = torch.nn.functional.pad(bounds, (0, missing), value=-torch.inf)
    error = torch.nn.functional.pad(sum(sizes), (0, missing))
    shape = (n_queries, -1, group)
    return bounds.view(shape).amax(2), error.view(shape).amax(2) * roundings


def check(arguments, group, mask=None):
    found = group_max_triton(*arguments, group=group, mask=mask)
    expected, error = reference(arguments, group, mask)
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    assert bool(((found.double() - expected).abs() <= error + (expected.abs() > 1e38) * 1e31).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_maxima_are_those_of_the_formula(shape, dtype):
    check(problem(shape, dtype), 32)


@pytest.mark.parametrize("group", [1, 2, 8, 64, 128])
@pytest.mark.parametrize("n_queries", [1, 3, 130])
def test_every_size_of_group(n_queries, group):
    check(problem((n_queries, 300, 20), torch.int8), group)


@pytest.mark.parametrize("biases", ["weighted", "plain", "none"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float32], ids=str)
@pytest.mark.parametrize("n_queries", [1, 2, 5, 130])
def test_terms_may_be_given_per_group(n_queries, dtype, masked, biases):
    n_rows, group = 300, 16
    arguments = list(problem((n_queries, n_rows, 20), dtype))
    n_groups = -(-n_rows // group)
    mask = torch.rand(n_rows, generator=torch.Generator().manual_seed(1)) > 0.5 if masked else None
    if masked:
        mask[16:48] = False
        mask[288:] = False
    if biases == "none":
        arguments[3] = None
    if biases != "weighted":
        arguments[6] = None
    for place in (2, 4, 5):
        arguments[place] = arguments[place][:n_groups].clone()
    found = group_max_triton(*arguments, group=group, mask=mask)
    for place in (2, 4, 5):
        arguments[place] = arguments[place].repeat_interleave(group)[:n_rows]
    if biases == "plain":
        arguments[6] = torch.ones(n_queries)
    expected, error = reference(arguments, group, mask)
    assert bool(((found.double() - expected).abs() <= error + (expected.abs() > 1e38) * 1e31).all())


@pytest.mark.parametrize("n_queries", [1, 2, 5, 130])
def test_integer_products_have_the_bits_of_torch(n_queries):
    queries, codes, *_ = problem((n_queries, 130, 80), torch.int8)
    found = group_max_triton(queries, codes, *[None] * 7, group=1)
    exact = queries.int() @ codes.int().T
    # They fit the 24 bits of float32, so nothing hides in its rounding.
    assert exact.abs().max() < 2**24
    assert torch.equal(found.int(), exact)


@pytest.mark.parametrize("wide", [False, True], ids=["per row", "per pair"])
@pytest.mark.parametrize("n_queries", [1, 2, 5, 130])
def test_a_mask_leaves_rows_out(n_queries, wide):
    arguments = problem((n_queries, 200, 33), torch.int8)
    mask = torch.rand((n_queries, 200) if wide else (200,), generator=torch.Generator().manual_seed(1)) > 0.6
    mask[..., 32:64] = False
    mask[..., 199] = False
    check(arguments, 32, mask)
    found = group_max_triton(*arguments, group=32, mask=mask)
    assert (found[:, 1] == torch.tensor(LOWEST_BOUND)).all()


def test_a_strided_mask_is_read_as_it_is():
    arguments = problem((4, 100, 16), torch.float32)
    mask = torch.rand(100, 8, generator=torch.Generator().manual_seed(1)) > 0.5
    check(arguments, 32, mask.T[::2])


@pytest.mark.parametrize("n_queries", [1, 5, 130])
@pytest.mark.parametrize("left_out", TERMS)
def test_a_term_may_be_left_out(n_queries, left_out):
    arguments = list(problem((n_queries, 70, 33), torch.float32))
    place = 2 + TERMS.index(left_out)
    arguments[place] = None
    if left_out != "scales":
        arguments[place + 3] = None
    check(arguments, 16)


@pytest.mark.parametrize("n_queries", [1, 5, 130])
def test_rows_may_have_a_stride(n_queries):
    queries, codes, *rest = problem((n_queries, 90, 64), torch.int8)
    check((queries[:, :40], codes[:, :40], *rest), 32)


@pytest.mark.parametrize("n_queries", [0, 3])
def test_nothing_to_scan(n_queries):
    arguments = problem((n_queries, 0, 8), torch.int8)
    assert group_max_triton(*arguments, group=32).shape == (n_queries, 0)


def test_what_the_kernels_do_not_take_is_refused():
    queries, codes, *rest = problem((3, 40, 8), torch.int8)
    with pytest.raises(ValueError, match="power of two"):
        group_max_triton(queries, codes, *rest, group=12)
    with pytest.raises(ValueError, match=r"torch\.float64"):
        group_max_triton(queries.double(), codes.double(), *rest, group=8)
    with pytest.raises(ValueError, match="one per group, of all"):
        group_max_triton(queries, codes, rest[0][:5], *rest[1:], group=8)
    with pytest.raises(ValueError, match="contiguous"):
        group_max_triton(queries, codes.T.contiguous().T, *rest, group=8)
