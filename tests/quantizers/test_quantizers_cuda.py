"""Clustering and transforms on a GPU."""

import pytest
import torch

from elips_torch import ITQ, OPQ, PCA, FlatIndex, KMeans, L2Normalize, PreTransformIndex, RefineIndex

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def vectors(n=6000, dim=16):
    generator = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(100, dim, generator=generator)
    return centres[torch.randint(100, (n,), generator=generator)] + torch.randn(n, dim, generator=generator)


@pytest.mark.parametrize(
    "options", [{}, {"init": "k-means++"}, {"metric": "cosine"}, {"batch_size": 500}], ids=str
)
def test_clusters_are_the_same_each_time_and_as_good_as_on_a_cpu(options):
    host, device = vectors(), vectors().cuda()
    one, other = (KMeans(50, **options).fit(device) for _ in range(2))
    assert one.centroids.is_cuda
    assert torch.equal(one.centroids, other.centroids)
    theirs = KMeans(50, **options).fit(host)
    assert one.quantization_error(device) == pytest.approx(theirs.quantization_error(host), rel=0.05)
    theirs.load_state_dict(one.state_dict())
    assert (one.predict(device).cpu() != theirs.predict(host)).float().mean() < 1e-3


@pytest.mark.parametrize(
    "make", [lambda: PCA(16, 8), lambda: OPQ(16, 4, nbits=5), lambda: ITQ(16, 8), lambda: L2Normalize(16)]
)
def test_transforms_move_between_devices(make):
    host, device = vectors(), vectors().cuda()
    transform = make().fit(device)
    mapped = transform(device)
    assert mapped.is_cuda
    torch.testing.assert_close(transform.cpu()(host), mapped.cpu(), rtol=1e-6, atol=1e-6)


def test_originals_may_stay_on_the_cpu():
    device = vectors().cuda()
    plain = FlatIndex(16, device="cuda")
    plain.add(device)
    index = RefineIndex(PreTransformIndex(PCA(16, 12), FlatIndex(12, device="cuda")), refine_device="cpu")
    index.fit(device).add(device)
    assert index.vectors.device.type == "cpu"
    found, wanted = index.search(device[:50], 5, k_factor=50), plain.search(device[:50], 5)
    assert found.ids.is_cuda
    assert (found.ids == wanted.ids).float().mean() > 0.99
    queries = device[:5].clone().requires_grad_()
    index.search(queries, 5).scores.sum().backward()
    assert queries.grad is not None
