"""Transforms against faiss, and as modules."""

import copy
import io
import pickle

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from elips_torch import (
    ITQ,
    OPQ,
    PCA,
    ArgumentError,
    DeviceError,
    DtypeError,
    ElipsError,
    KMeans,
    L2Normalize,
    NonFiniteError,
    NotFittedError,
    RandomRotation,
    ShapeError,
)
from elips_torch.quantizers.affine import AffineMap, Centring
from elips_torch.quantizers.transforms import TRANSFORMS

DIM = 12


def correlated(n=1500, dim=DIM, seed=0, offset=1.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator) * torch.logspace(0, -1.5, dim)
    centres = torch.randn(20, dim, generator=generator)
    chosen = centres[torch.randint(20, (n,), generator=generator)]
    return (chosen + 0.5 * torch.randn(n, dim, generator=generator)) @ mixing.T + offset


def made():
    """Return one of each kind, fitted."""
    vectors = correlated()
    matrix = torch.randn(7, DIM, generator=torch.Generator().manual_seed(1))
    transforms = [
        PCA(DIM, 5),
        PCA(DIM, DIM, whiten=True),
        OPQ(DIM, 3, nbits=4, niter=3),
        OPQ(DIM, 2, dim_out=6, nbits=4, niter=3),
        RandomRotation(DIM, 7),
        RandomRotation(DIM, 20),
        ITQ(DIM, 6, niter=5),
        L2Normalize(DIM),
        Centring(DIM),
        AffineMap(DIM, 7).give(matrix, matrix[:, 0]),
    ]
    return [transform.fit(vectors) for transform in transforms]


FITTED = made()
each = pytest.mark.parametrize("transform", FITTED, ids=repr)


def coding_error(vectors, m, nbits):
    """Return the mean squared error of faiss's product quantizer."""
    rows = np.ascontiguousarray(vectors.numpy())
    quantizer = faiss.ProductQuantizer(rows.shape[1], m, nbits)
    quantizer.train(rows)
    return float(((quantizer.decode(quantizer.compute_codes(rows)) - rows) ** 2).sum(1).mean())


def test_the_kinds_are_all_here():
    assert {type(transform) for transform in FITTED} == set(TRANSFORMS)


@pytest.mark.parametrize("whiten", [False, True])
def test_pca_equals_that_of_faiss(whiten):
    vectors = correlated()
    theirs = faiss.PCAMatrix(DIM, 5, -0.5 if whiten else 0.0)
    theirs.train(vectors.numpy())
    wanted = torch.from_numpy(theirs.apply(vectors.numpy()))
    if whiten:
        # Theirs divides by the root of the sum of squares, not of the variance.
        wanted = wanted * len(vectors) ** 0.5
    found = PCA(DIM, 5, whiten=whiten).fit(vectors)(vectors)
    signs = (found * wanted).sum(0).sign()
    torch.testing.assert_close(found * signs, wanted, rtol=1e-3, atol=1e-3)


def test_pca_keeps_the_variance():
    vectors = correlated()
    pca = PCA(DIM, 5).fit(vectors)
    kept = pca(vectors).double()
    torch.testing.assert_close(kept.mean(0), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(kept.var(0, correction=0).float(), pca.variances, rtol=1e-4, atol=1e-6)
    assert (pca.variances.diff() <= 0).all()
    lost = (pca.reverse(pca(vectors)) - vectors).square().sum(1).mean()
    rest = PCA(DIM, DIM).fit(vectors).variances[5:].sum()
    torch.testing.assert_close(lost, rest, rtol=1e-3, atol=1e-6)


def test_whitening_leaves_out_directions_without_variance():
    vectors = torch.cat([correlated(dim=3), torch.ones(1500, 2)], 1)
    pca = PCA(5, 5, whiten=True).fit(vectors)
    white = pca(vectors)
    torch.testing.assert_close(
        white.T @ white / 1500, torch.diag(torch.tensor([1.0, 1, 1, 0, 0])), rtol=0, atol=1e-3
    )
    torch.testing.assert_close(pca.reverse(white), vectors, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("m", "nbits", "dim_out"), [(4, 5, None), (2, 6, None), (3, 5, 6)])
def test_opq_loses_no_more_than_that_of_faiss(m, nbits, dim_out):
    vectors = correlated(3000)
    theirs = faiss.OPQMatrix(DIM, m, dim_out or DIM)
    quantizer = faiss.ProductQuantizer(dim_out or DIM, m, nbits)
    theirs.pq = quantizer
    theirs.niter = 20
    theirs.train(vectors.numpy())
    opq = OPQ(DIM, m, dim_out=dim_out, nbits=nbits).fit(vectors)

    def lost(rotated):
        # What is coded, and what the rotation leaves out.
        left_out = vectors.square().sum(1).mean() - rotated.square().sum(1).mean()
        return coding_error(rotated, m, nbits) + float(left_out)

    wanted = lost(torch.from_numpy(theirs.apply(vectors.numpy())))
    assert lost(opq(vectors)) < 1.03 * wanted
    if dim_out is None:
        assert lost(opq(vectors)) < 0.9 * lost(vectors)
        assert opq.history[-1] < opq.history[0]


def test_itq_keeps_neighbours_like_that_of_faiss():
    vectors = correlated(2000, dim=16, offset=0.0)
    queries, database = vectors[:200], vectors[200:]
    near = torch.cdist(queries, database).topk(20, largest=False).indices

    def recall(codes):
        signs = torch.where(codes > 0, 1.0, -1.0)
        found = (signs[:200] @ signs[200:].T).topk(100).indices
        return float((near[:, :, None] == found[:, None]).any(2).float().mean())

    theirs = faiss.ITQTransform(16, 12, True)
    theirs.train(vectors.numpy())
    ours = ITQ(16, 12).fit(vectors)
    assert recall(ours(vectors)) > recall(torch.from_numpy(theirs.apply(vectors.numpy()))) - 0.02
    projected = ours(vectors)
    scale = projected.abs().mean()
    rotated = RandomRotation(12)(projected)

    def lost(values):
        return float((values / scale - torch.where(values < 0, -1.0, 1.0)).square().mean())

    assert lost(projected) < lost(rotated)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**40))
def test_random_rotations_are_orthonormal(dim_in, dim_out, seed):
    matrix = RandomRotation(dim_in, dim_out, seed=seed).matrix
    assert matrix.shape == (dim_out, dim_in)
    small = matrix @ matrix.T if dim_out <= dim_in else matrix.T @ matrix
    torch.testing.assert_close(small, torch.eye(min(dim_in, dim_out)), rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 8), st.integers(1, 3), st.integers(0, 100), st.sampled_from(["pca", "opq", "itq"]))
def test_learned_rows_are_orthonormal(dim_out, more, seed, kind):
    vectors = correlated(60, dim_out * more, seed)
    if kind == "pca":
        transform = PCA(dim_out * more, dim_out)
    elif kind == "itq":
        transform = ITQ(dim_out * more, dim_out, niter=3)
    else:
        transform = OPQ(dim_out * more, dim_out, dim_out=dim_out, nbits=2, niter=2)
    matrix = transform.fit(vectors).matrix
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim_out), rtol=0, atol=1e-4)


def test_a_rotation_is_reproducible_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    one, other = RandomRotation(DIM, seed=3), RandomRotation(DIM, seed=3)
    assert torch.equal(one.matrix, other.matrix)
    assert not torch.equal(one.matrix, RandomRotation(DIM, seed=4).matrix)
    OPQ(DIM, 3, nbits=3, niter=1).fit(correlated())
    assert torch.equal(torch.get_rng_state(), state)


def test_normalising():
    vectors = torch.cat([correlated(), torch.zeros(1, DIM)])
    scaled = L2Normalize(DIM)(vectors)
    torch.testing.assert_close(scaled, nn.functional.normalize(vectors))
    vectors.requires_grad_()
    L2Normalize(DIM)(vectors).sum().backward()
    assert vectors.grad.isfinite().all()


@each
def test_reverse_undoes_what_can_be_undone(transform):
    vectors = correlated(50, seed=3)
    mapped = transform(vectors)
    assert mapped.shape == (50, transform.dim_out)
    back = transform.reverse(mapped)
    assert back.shape == (50, DIM)
    torch.testing.assert_close(transform(back), mapped, rtol=1e-4, atol=1e-4)
    if transform.dim_out >= DIM and not isinstance(transform, L2Normalize):
        torch.testing.assert_close(back, vectors, rtol=1e-3, atol=1e-3)


@each
def test_a_result_depends_on_its_vector_alone(transform):
    vectors = correlated(40, seed=3)
    wanted = transform(vectors)
    for size in (1, 3, 7):
        assert torch.equal(torch.cat([transform(part) for part in vectors.split(size)]), wanted)
    assert torch.equal(transform(vectors[0]), wanted[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(transform(vectors), wanted)
        assert torch.equal(transform(vectors.requires_grad_()), wanted)
    assert torch.equal(transform.reverse(wanted[0]), transform.reverse(wanted)[0])


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_gives_float32(transform, dtype):
    vectors = correlated(20, seed=3).to(dtype)
    found = transform(vectors)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, transform(vectors.float()), rtol=1e-5, atol=1e-5)


@each
def test_gradients_flow_to_the_vectors(transform):
    vectors = correlated(4, seed=3).double().requires_grad_()
    weight = torch.randn(4, transform.dim_out, generator=torch.Generator().manual_seed(1))
    (transform(vectors) * weight).sum().backward()
    step = 1e-4
    moved = torch.randn(4, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        change = (
            ((transform(vectors + step * moved) - transform(vectors - step * moved)) * weight).double().sum()
        )
    torch.testing.assert_close((vectors.grad * moved).sum(), change / (2 * step), rtol=2e-2, atol=2e-2)
    mapped = transform(vectors.detach()).requires_grad_()
    transform.reverse(mapped).sum().backward()
    assert mapped.grad.abs().sum() > 0


@each
def test_compiles_without_a_break(transform):
    vectors = correlated(6, seed=3)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: transform(x) * 2.0, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(vectors), transform(vectors) * 2.0)


@each
def test_state_copies_and_casts(transform):
    vectors = correlated(20, seed=3)
    wanted = transform(vectors)
    file = io.BytesIO()
    torch.save(nn.Sequential(transform).state_dict(), file)
    for assign in (False, True):
        file.seek(0)
        fresh = type(transform)(**transform.config())
        nn.Sequential(fresh).load_state_dict(torch.load(file, weights_only=True), assign=assign)
        assert fresh.is_trained
        assert torch.equal(fresh(vectors), wanted)
    for other in (copy.deepcopy(transform), pickle.loads(pickle.dumps(transform))):
        for cast in ("half", "bfloat16", "double", "float"):
            getattr(other, cast)()
        assert torch.equal(other(vectors), wanted)
    assert not any(buffer.is_inference() for buffer in transform.buffers())


def test_fitting_in_inference_mode_gives_ordinary_tensors():
    with torch.inference_mode():
        pca = PCA(DIM, 4).fit(correlated())
        rotation = RandomRotation(DIM)
    for transform in (pca, rotation):
        assert not any(buffer.is_inference() for buffer in transform.buffers())
        vectors = correlated(3).requires_grad_()
        transform(vectors).sum().backward()
        assert vectors.grad is not None


def test_untrained_and_bad_arguments_are_refused():
    pca = PCA(DIM, 4)
    assert not pca.is_trained
    for verb in (pca, pca.reverse):
        with pytest.raises(NotFittedError, match="call fit"):
            verb(torch.rand(3, DIM))
    poor = correlated()
    poor[5, 2] = float("inf")
    cases = [
        (poor, NonFiniteError, "row 5"),
        (correlated(dim=5), ShapeError, "vectors has dim 5, PCA has dim 12"),
        (correlated().int(), DtypeError, "int32"),
        (correlated(3), ArgumentError, "3 rows, expected at least dim_out = 4"),
    ]
    for vectors, error, message in cases:
        with pytest.raises(error, match=message):
            pca.fit(vectors)
        assert not pca.is_trained
    pca.fit(correlated())
    with pytest.raises(ShapeError, match="dim 11, PCA has dim 12"):
        pca(torch.rand(3, 11))
    with pytest.raises(ShapeError, match="dim 12, PCA has dim 4"):
        pca.reverse(torch.rand(3, 12))
    with pytest.raises(DeviceError, match="meta"):
        pca(torch.rand(3, DIM, device="meta"))
    for build, message in (
        (lambda: PCA(4, 5), "dim_out is 5, expected at most"),
        (lambda: PCA(0, 5), "dim_in is 0"),
        (lambda: PCA(4, 2.0), "dim_out is 2.0"),
        (lambda: ITQ(4, 5), "dim_out is 5"),
        (lambda: OPQ(10, 3), "m is 3, expected a divisor of dim = 10"),
        (lambda: OPQ(12, 4, dim_out=10), "m is 4, expected a divisor of dim_out = 10"),
        (lambda: OPQ(12, 4, nbits=17), "nbits is 17"),
        (lambda: OPQ(12, 4).fit(correlated(200)), r"200 rows, expected at least 2\*\*nbits = 256"),
        (lambda: RandomRotation(4, seed=-1), "seed is -1"),
        (lambda: L2Normalize(0), "dim_in is 0"),
    ):
        with pytest.raises(ElipsError, match=message):
            build()


def test_a_state_that_does_not_fit_is_refused():
    state = PCA(DIM, 4).fit(correlated()).state_dict()
    other = PCA(DIM, 5)
    with pytest.raises(RuntimeError, match=r"matrix: got shape \(4, 12\), expected \(5, 12\)"):
        other.load_state_dict(state)
    assert not other.is_trained
    partly = {**state, "mean": torch.empty(0)}
    with pytest.raises(RuntimeError, match="trained, others not"):
        PCA(DIM, 4).load_state_dict(partly)
    with pytest.raises(RuntimeError, match="dtype"):
        PCA(DIM, 4).load_state_dict({**state, "mean": torch.zeros(DIM, dtype=torch.int64)})


def test_pca_then_progressive_dimensions():
    vectors = correlated(2000)
    rotated = PCA(DIM, DIM).fit(vectors)(vectors)
    staged = KMeans(20, dims=(3, 6), min_points_per_centroid=1).fit(rotated)
    whole = KMeans(20, min_points_per_centroid=1).fit(rotated)
    assert staged.quantization_error(rotated) < 1.1 * whole.quantization_error(rotated)
