import faiss
import pytest
import torch

from elips_torch.core.errors import ArgumentError
from elips_torch.engines.faiss.builds import load_installed
from elips_torch.engines.faiss.inverted_file import PARALLEL_MODES, FaissInvertedFile

DIM, NLIST = 16, 8


@pytest.fixture
def vectors():
    return torch.randn(800, DIM, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize(
    ("description", "options"),
    [
        ("IVF8,Flat", {}),
        ("IVF8,SQ8", {"qtype": "int8"}),
        ("IVF8,SQ4", {"qtype": "int4"}),
        ("IVF8,SQbf16", {"qtype": "bf16"}),
        ("IVF8,PQ4x4", {"m": 4, "nbits": 4}),
    ],
)
def test_it_is_what_the_factory_of_faiss_makes(vectors, metric, description, options):
    kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    usual = faiss.index_factory(DIM, description, kind)
    usual.cp.niter = 7
    if "m" in options:
        usual.pq.cp.niter = 7
    usual.train(vectors.numpy())
    usual.add(vectors.numpy())
    usual.nprobe = 3
    file = FaissInvertedFile(load_installed(), DIM, NLIST, metric, niter=7, **options)
    file.train(vectors)
    file.add(vectors)
    wanted = torch.from_numpy(usual.search(vectors[:30].numpy(), 5)[1])
    for mode in PARALLEL_MODES:
        found = file.search(vectors[:30], 5, 3, mode)
        # Equal scores may change places.
        assert (found == wanted).float().mean() > 0.95


def test_centroids_that_are_given_are_kept(vectors):
    centroids = vectors[100 : 100 + NLIST]
    file = FaissInvertedFile(load_installed(), DIM, NLIST, "l2")
    file.train(vectors, centroids)
    assert torch.equal(file.centroids, centroids)
    file.add(vectors)
    # Query and centroid are one: it lies in the list that is read first.
    assert file.search(centroids, 1, 1)[:, 0].tolist() == list(range(100, 100 + NLIST))


def test_another_metric_is_refused():
    with pytest.raises(ArgumentError, match="metric is 'cosine', expected 'l2' or 'ip'"):
        FaissInvertedFile(load_installed(), DIM, NLIST, "cosine")
