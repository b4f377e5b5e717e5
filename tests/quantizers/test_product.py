"""ProductQuantizer against faiss, and its promises."""

import faiss
import pytest
import torch

from elips_torch import ArgumentError, DtypeError, MetricError, NonFiniteError, NotFittedError, ShapeError
from elips_torch.quantizers.product import ProductQuantizer


def clustered(n, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(50, dim, generator=torch.Generator().manual_seed(99)) * 2
    return centres[torch.randint(0, 50, (n,), generator=generator)] + torch.randn(n, dim, generator=generator)


def small(n=60, dim=12, m=4, **options):
    quantizer = ProductQuantizer(dim, m, nbits=4, min_points_per_centroid=1, **options)
    return quantizer.fit(clustered(n, dim))


def mean_error(vectors, decoded):
    return (vectors - decoded).square().sum(1).mean()


@pytest.mark.parametrize(("m", "nbits", "n"), [(4, 8, 4000), (8, 4, 4000), (3, 4, 2000)])
def test_the_error_is_that_of_faiss(m, nbits, n):
    dim = 24
    train, fresh = clustered(n, dim), clustered(1000, dim, seed=1)
    theirs = faiss.ProductQuantizer(dim, m, nbits)
    theirs.cp.min_points_per_centroid = 1
    theirs.train(train.numpy())
    ours = ProductQuantizer(dim, m, nbits, min_points_per_centroid=1).fit(train)
    for vectors in (train, fresh):
        expected = torch.from_numpy(theirs.decode(theirs.compute_codes(vectors.numpy())))
        assert mean_error(vectors, ours(vectors)) < 1.03 * mean_error(vectors, expected)


@pytest.mark.parametrize(("m", "nbits"), [(4, 8), (6, 4), (3, 4), (1, 4)])
def test_codes_are_those_of_faiss_with_the_same_centroids(m, nbits):
    dim = 12
    train, fresh = clustered(400, dim), clustered(300, dim, seed=1)
    ours = ProductQuantizer(dim, m, nbits, niter=3, min_points_per_centroid=1).fit(train)
    theirs = faiss.ProductQuantizer(dim, m, nbits)
    faiss.copy_array_to_vector(ours.codebooks.numpy().ravel(), theirs.centroids)
    assert ours.code_size == theirs.code_size
    codes = ours.encode(fresh)
    assert torch.equal(codes, torch.from_numpy(theirs.compute_codes(fresh.numpy())))
    assert torch.equal(ours.decode(codes), torch.from_numpy(theirs.decode(codes.numpy())))


def test_each_part_gets_its_nearest_centroid():
    quantizer = small()
    fresh = clustered(200, 12, seed=1)
    parts = fresh.view(200, 4, 1, 3).double()
    nearest = (parts - quantizer.codebooks.double()).square().sum(3).argmin(2)
    expected = quantizer.codebooks[torch.arange(4), nearest].reshape(200, 12)
    assert torch.equal(quantizer(fresh), expected)


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_lookup_tables_sum_to_scores(metric, dtype):
    quantizer, queries = small(), clustered(9, 12, seed=2).to(dtype)
    codes = quantizer.encode(clustered(50, 12, seed=3))
    tables = quantizer.lookup_tables(queries, metric)
    assert tables.shape == (9, 4, 16)
    entries = quantizer.entries(codes).long()
    scores = tables.view(9, -1)[:, entries].sum(2)
    decoded, wide = quantizer.decode(codes).double(), queries.float().double()
    expected = wide @ decoded.T if metric == "ip" else (wide[:, None] - decoded).square().sum(2)
    torch.testing.assert_close(scores, expected.float(), rtol=1e-5, atol=1e-5)


def test_fitting_is_deterministic_and_depends_on_the_seed():
    before = torch.random.get_rng_state()
    one, other = small(seed=3), small(seed=3)
    assert torch.equal(one.codebooks, other.codebooks)
    assert not torch.equal(one.codebooks, small(seed=4).codebooks)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_codes_do_not_depend_on_the_batch(monkeypatch):
    quantizer, fresh = small(), clustered(90, 12, seed=1)
    whole = quantizer.encode(fresh)
    assert torch.equal(torch.cat([quantizer.encode(part) for part in fresh.split(7)]), whole)
    decoded, tables = quantizer.decode(whole), quantizer.lookup_tables(fresh)
    monkeypatch.setattr("elips_torch.quantizers.product._FEATURES_AT_ONCE", 12 * 16 * 5)
    assert torch.equal(quantizer.decode(whole), decoded)
    assert torch.equal(quantizer.lookup_tables(fresh), tables)


def test_settings_of_the_caller_change_no_code():
    quantizer, fresh = small(), clustered(90, 12, seed=1)
    codes = quantizer.encode(fresh)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(small().codebooks, quantizer.codebooks)
        assert torch.equal(quantizer.encode(fresh), codes)
    with torch.inference_mode():
        fitted = small()
    assert not fitted.codebooks.is_inference()
    assert torch.equal(quantizer.double().encode(fresh), codes)


def test_the_state_restores_any_quantizer_of_the_same_settings():
    fitted, fresh = small(), ProductQuantizer(12, 4, nbits=4)
    fresh.load_state_dict(fitted.state_dict())
    vectors = clustered(30, 12, seed=1)
    assert torch.equal(fresh.encode(vectors), fitted.encode(vectors))
    with pytest.raises(RuntimeError, match="codebooks"):
        ProductQuantizer(12, 6, nbits=4).load_state_dict(fitted.state_dict())


def test_bad_input_is_refused():
    for m in (5, 0, -3, 13):
        with pytest.raises(ArgumentError, match=f"m is {m}, which does not divide dim = 12"):
            ProductQuantizer(12, m)
    with pytest.raises(DtypeError, match=r"m is 2\.0"):
        ProductQuantizer(12, 2.0)
    with pytest.raises(ArgumentError, match="nbits is 6, expected 8 or 4"):
        ProductQuantizer(12, 4, 6)
    with pytest.raises(ArgumentError, match="niter is -1"):
        ProductQuantizer(12, 4, niter=-1)
    quantizer = ProductQuantizer(12, 4, nbits=4, min_points_per_centroid=1)
    with pytest.raises(ArgumentError, match="15 rows, expected at least 2\\*\\*nbits = 16"):
        quantizer.fit(clustered(15, 12))
    with pytest.raises(NotFittedError, match="lookup_tables was called before fit"):
        quantizer.lookup_tables(torch.rand(2, 12))
    poor = clustered(20, 12)
    poor[3, 4] = torch.inf
    with pytest.raises(NonFiniteError, match="row 3"):
        quantizer.fit(poor)
    assert not quantizer.is_trained
    quantizer.fit(clustered(20, 12))
    with pytest.raises(NonFiniteError, match="row 3"):
        quantizer.encode(poor)
    assert quantizer.encode(poor, check_finite=False).shape == (20, 2)
    with pytest.raises(ShapeError, match="vectors has dim 11"):
        quantizer.encode(torch.rand(2, 11))
    with pytest.raises(ShapeError, match="queries has dim 11"):
        quantizer.lookup_tables(torch.rand(2, 11))
    with pytest.raises(MetricError, match="'cosine', lookup tables exist for 'l2' and 'ip'"):
        quantizer.lookup_tables(torch.rand(2, 12), "cosine")


def test_few_training_vectors_are_warned_of_once():
    quantizer = ProductQuantizer(12, 4, nbits=4)
    with pytest.warns(UserWarning, match="vectors has 100 rows.*at least 624") as seen:
        quantizer.fit(clustered(100, 12))
    assert len(seen) == 1
    assert seen[0].filename == __file__
