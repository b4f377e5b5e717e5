"""KMeans against faiss and scikit-learn, and what it promises beyond them."""

import copy
import io
import pickle

import faiss
import pytest
import sklearn.cluster
import torch
from torch import nn

from elips_torch import (
    ArgumentError,
    DeviceError,
    DtypeError,
    ElipsError,
    KMeans,
    NonFiniteError,
    NotFittedError,
    ShapeError,
)
from elips_torch.reference.knn import knn


def clustered(n=4000, dim=16, n_clusters=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(n_clusters, dim, generator=generator)
    which = torch.randint(n_clusters, (n,), generator=generator)
    return centres[which] + torch.randn(n, dim, generator=generator)


def faiss_error(vectors, k, niter, seed=1):
    dim = vectors.shape[1]
    kmeans = faiss.Kmeans(dim, k, niter=niter, seed=seed, max_points_per_centroid=10**6)
    kmeans.train(vectors.numpy())
    return float(kmeans.index.search(vectors.numpy(), 1)[0].mean())


def error(vectors, k, **options):
    return KMeans(k, min_points_per_centroid=1, **options).fit(vectors).quantization_error(vectors)


@pytest.mark.parametrize(("dim", "k", "niter"), [(16, 64, 10), (4, 100, 5), (64, 30, 20)])
def test_the_error_is_that_of_faiss(dim, k, niter):
    vectors = clustered(dim=dim, n_clusters=200)
    ours = sum(error(vectors, k, niter=niter, seed=seed) for seed in range(4))
    theirs = sum(faiss_error(vectors, k, niter, seed + 1) for seed in range(4))
    assert ours < 1.02 * theirs


@pytest.mark.parametrize("init", ["sample", "k-means++"])
def test_the_error_is_that_of_scikit_learn(init):
    vectors = clustered(n_clusters=200)
    ours = sum(error(vectors, 50, niter=15, init=init, seed=seed) for seed in range(4))
    start = "random" if init == "sample" else init
    theirs = 0.0
    for seed in range(4):
        sklearn_kmeans = sklearn.cluster.KMeans(
            50, init=start, n_init=1, max_iter=15, tol=0, random_state=seed
        )
        theirs += sklearn_kmeans.fit(vectors.numpy()).inertia_ / len(vectors)
    assert ours < 1.03 * theirs


def test_batches_come_close_to_whole_passes():
    vectors = clustered(8000, n_clusters=200)
    whole = sum(error(vectors, 50, seed=seed) for seed in range(3))
    batched = sum(error(vectors, 50, seed=seed, batch_size=512) for seed in range(3))
    assert batched < 1.05 * whole


def test_progressive_dimensions_come_close_to_all_at_once():
    vectors = clustered(n_clusters=200)
    vectors = vectors @ torch.linalg.svd(vectors - vectors.mean(0)).Vh.T
    whole = sum(error(vectors, 50, seed=seed) for seed in range(3))
    staged = sum(error(vectors, 50, seed=seed, dims=(4, 8)) for seed in range(3))
    assert staged < 1.05 * whole


def test_history_descends_to_the_error():
    vectors = clustered()
    kmeans = KMeans(20, niter=100, max_points_per_centroid=None).fit(vectors)
    assert len(kmeans.history) < 100
    assert all(later <= earlier for earlier, later in zip(kmeans.history, kmeans.history[1:], strict=False))
    assert kmeans.quantization_error(vectors) == pytest.approx(kmeans.history[-1], rel=1e-5)
    labels = kmeans.predict(vectors)
    by_hand = (vectors - kmeans.centroids[labels]).square().sum(1).mean()
    assert kmeans.quantization_error(vectors) == pytest.approx(float(by_hand), rel=1e-5)
    # Nothing changes any more: each centroid is the mean of its vectors.
    means = torch.stack([vectors[labels == label].mean(0) for label in range(20)])
    torch.testing.assert_close(kmeans.centroids, means, rtol=1e-5, atol=1e-5)


def test_predict_is_an_exact_search():
    vectors = clustered()
    for metric in ("l2", "ip", "cosine"):
        kmeans = KMeans(30, metric=metric, niter=3).fit(vectors)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            queries = vectors[:150].to(dtype)
            wanted = knn(queries, kmeans.centroids, 1, metric).ids[:, 0]
            assert torch.equal(kmeans.predict(queries), wanted)
            assert torch.equal(kmeans(queries), wanted)
        assert torch.equal(kmeans.predict(vectors.double()), kmeans.predict(vectors))


OPTIONS = [
    {},
    {"init": "k-means++"},
    {"batch_size": 300},
    {"metric": "cosine"},
    {"dims": (4,)},
    {"max_points_per_centroid": 39},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_seed_decides_and_nothing_else(options):
    vectors = clustered(2000)

    def centroids(**more):
        return KMeans(30, niter=3, **options, **more).fit(vectors).centroids

    wanted = centroids()
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert torch.equal(centroids(), wanted)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(centroids(seed=1), wanted)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 4):
            torch.set_num_threads(number)
            assert torch.equal(centroids(), wanted)
    finally:
        torch.set_num_threads(threads)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        found = centroids()
    assert torch.equal(found, wanted)
    assert not found.is_inference()
    default, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        torch.set_float32_matmul_precision("medium")
        found = centroids()
    finally:
        torch.set_default_dtype(default)
        torch.set_default_device(None)
        torch.set_float32_matmul_precision(precision)
    assert torch.equal(found, wanted)
    assert found.dtype == torch.float32
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(centroids(), wanted)
    finally:
        torch.use_deterministic_algorithms(False)


def test_empty_clusters_are_filled():
    vectors = clustered(1000, dim=4)
    # All but one of these centroids lose every vector.
    start = torch.full((20, 4), 1e3) + torch.arange(20.0)[:, None]
    start[0] = 0.0
    kmeans = KMeans(20, min_points_per_centroid=1).fit(vectors, centroids=start)
    assert len(kmeans.predict(vectors).unique()) == 20
    assert kmeans.quantization_error(vectors) < 1.3 * error(vectors, 20)
    batched = KMeans(20, min_points_per_centroid=1, batch_size=250).fit(vectors, centroids=start)
    assert batched.quantization_error(vectors) < 1.3 * error(vectors, 20)


def test_duplicates_are_no_obstacle():
    few = clustered(7, dim=3)
    vectors = few.repeat(30, 1)
    for options in ({}, {"init": "k-means++"}, {"batch_size": 50}):
        kmeans = KMeans(10, min_points_per_centroid=1, **options).fit(vectors)
        assert kmeans.centroids.isfinite().all()
        assert kmeans.centroids.shape == (10, 3)
        if "batch_size" not in options:
            assert kmeans.quantization_error(vectors) < 1e-6
    same = KMeans(5, min_points_per_centroid=1).fit(torch.ones(50, 3))
    assert torch.equal(same.centroids, torch.ones(5, 3))
    assert not same.predict(torch.ones(50, 3)).any()


def test_as_many_clusters_as_vectors():
    vectors = clustered(50, dim=3)
    kmeans = KMeans(50, min_points_per_centroid=1).fit(vectors)
    assert kmeans.quantization_error(vectors) == 0.0
    assert sorted(kmeans.predict(vectors).tolist()) == list(range(50))


@pytest.mark.parametrize("metric", ["ip", "cosine"])
def test_spherical_centroids_have_length_one(metric):
    vectors = clustered(n_clusters=10) * torch.rand(4000, 1, generator=torch.Generator().manual_seed(5))
    vectors[3] = 0.0
    kmeans = KMeans(10, metric=metric).fit(vectors)
    torch.testing.assert_close(kmeans.centroids.norm(dim=1), torch.ones(10))
    plain = KMeans(10, spherical=True).fit(vectors)
    torch.testing.assert_close(plain.centroids.norm(dim=1), torch.ones(10))
    units = torch.nn.functional.normalize(vectors)
    theirs = faiss.Kmeans(16, 10, niter=20, spherical=True, max_points_per_centroid=10**6)
    theirs.train(units.numpy())
    best = float((units @ torch.from_numpy(theirs.centroids).T).amax(1).mean())
    ours = max(
        float((units @ KMeans(10, metric="cosine", seed=seed).fit(vectors).centroids.T).amax(1).mean())
        for seed in range(3)
    )
    assert ours > best - 0.02


def test_a_warm_start_goes_on():
    vectors = clustered()
    short = KMeans(30, niter=3).fit(vectors)
    kept = short.centroids.clone()
    on = KMeans(30, niter=4).fit(vectors, centroids=short.centroids)
    torch.testing.assert_close(on.centroids, KMeans(30, niter=7).fit(vectors).centroids, rtol=0, atol=0)
    assert torch.equal(short.centroids, kept)
    none = KMeans(30, niter=0).fit(vectors, centroids=kept)
    assert torch.equal(none.centroids, kept)


def test_too_few_vectors():
    vectors = clustered(100, dim=3)
    with pytest.raises(ArgumentError, match="100 rows, expected at least k = 101"):
        KMeans(101).fit(vectors)
    with pytest.warns(UserWarning, match="100 rows to learn 10 centroids from, expected at least 390"):
        KMeans(10).fit(vectors)


def test_bad_arguments_are_refused_and_change_nothing():
    vectors = clustered(500, dim=4)
    kmeans = KMeans(5).fit(vectors)
    before = kmeans.centroids.clone()
    poor = vectors.clone()
    poor[7, 1] = float("nan")
    cases = [
        (poor, None, NonFiniteError, "row 7"),
        (vectors[0], None, ShapeError, "expected"),
        (vectors.int(), None, DtypeError, "int32"),
        (vectors.numpy(), None, DtypeError, "ndarray"),
        (vectors.double() * 1e39, None, NonFiniteError, "expected finite torch.float32 values"),
        (vectors, vectors[:4], ArgumentError, "centroids has 4 rows, expected k = 5"),
        (vectors, vectors[:5, :3], ShapeError, "centroids has dim 3"),
        (vectors, vectors[:5].to("meta"), DeviceError, "meta"),
        (vectors, poor[5:10], NonFiniteError, "centroids has NaN"),
    ]
    for bad, start, kind, message in cases:
        with pytest.raises(kind, match=message):
            kmeans.fit(bad, centroids=start)
        assert torch.equal(kmeans.centroids, before)
    for bad, kind, message in (
        (vectors[:, :3], ShapeError, "vectors has dim 3, KMeans has dim 4"),
        (poor, NonFiniteError, "row 7"),
        (vectors.to("meta"), DeviceError, "vectors is on meta"),
    ):
        with pytest.raises(kind, match=message):
            kmeans.predict(bad)
    with pytest.raises(NotFittedError, match="call fit"):
        KMeans(5).predict(vectors)
    for options in (
        {"k": 0},
        {"k": 2.0},
        {"niter": -1},
        {"metric": "l1"},
        {"init": "magic"},
        {"batch_size": 0},
        {"dims": (4, 2)},
        {"seed": 1.5},
        {"max_points_per_centroid": 0},
        {"workspace_bytes": 7},
    ):
        with pytest.raises(ElipsError, match=next(iter(options))):
            KMeans(**{"k": 5, **options})
    with pytest.raises(ArgumentError, match="dims is"):
        KMeans(5, dims=(8,)).fit(vectors)


def test_state_copies_and_files():
    vectors = clustered(2000)
    kmeans = KMeans(30, niter=2).fit(vectors)
    labels = kmeans.predict(vectors)
    file = io.BytesIO()
    torch.save(nn.ModuleDict({"coarse": kmeans}).state_dict(), file)
    for assign in (False, True):
        file.seek(0)
        for other in (KMeans(30), KMeans(30, niter=1).fit(clustered(2000, dim=3))):
            model = nn.ModuleDict({"coarse": other})
            model.load_state_dict(torch.load(file, weights_only=True), assign=assign)
            file.seek(0)
            assert torch.equal(other.predict(vectors), labels)
    for other in (copy.deepcopy(kmeans), pickle.loads(pickle.dumps(kmeans))):
        assert torch.equal(other.predict(vectors), labels)
        assert other.history == kmeans.history
    with pytest.raises(RuntimeError, match=r"centroids: got shape \(30, 16\), expected \(20, any\)"):
        KMeans(20).load_state_dict(kmeans.state_dict())
    empty = KMeans(30)
    empty.load_state_dict(KMeans(30).state_dict())
    assert not empty.is_trained
    assert empty.dim is None


def test_casts_leave_the_centroids_alone():
    vectors = clustered(2000)
    kmeans = KMeans(30, niter=2).fit(vectors)
    before = kmeans.centroids.clone()
    for cast in ("half", "bfloat16", "double", "float"):
        getattr(kmeans, cast)()
        assert torch.equal(kmeans.centroids, before)
    assert repr(kmeans) == "KMeans(k=30, dim=16, metric='l2', niter=2, seed=0)"


def test_predict_compiles_without_a_break():
    vectors = clustered(2000)
    kmeans = KMeans(30, niter=2).fit(vectors)
    compiled = torch.compile(lambda x: kmeans.predict(x * 1.0), fullgraph=True, backend="eager")
    assert torch.equal(compiled(vectors), kmeans.predict(vectors))


def test_the_progress_bar_counts_passes(capsys):
    KMeans(5, niter=3, progress=True).fit(clustered(500))
    assert "k-means: 100%" in capsys.readouterr().err
