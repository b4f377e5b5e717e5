"""Indexes of codes on a GPU answer what they answer on a CPU."""

import pytest
import torch

from elips_torch import IVFPQIndex, IVFSQIndex, PQIndex, SQIndex

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

PARTS = {"niter": 5, "min_points_per_centroid": 1}
MAKERS = {
    "int8": lambda device: SQIndex(24, "int8", device=device),
    "int6": lambda device: SQIndex(24, "int6", "cosine", device=device),
    "bf16": lambda device: SQIndex(24, "bf16", "ip", device=device),
    "parts": lambda device: PQIndex(24, 6, 8, device=device, **PARTS),
    "four-bit parts": lambda device: PQIndex(24, 12, 4, "cosine", device=device, **PARTS),
    "lists": lambda device: IVFSQIndex(24, 20, "int4", nprobe=5, device=device),
    "lists of parts": lambda device: IVFPQIndex(24, 20, 6, 4, "ip", nprobe=5, device=device, **PARTS),
}


def clustered(n, seed):
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(40, 24, generator=torch.Generator().manual_seed(99))
    return centres[torch.randint(40, (n,), generator=generator)] + torch.randn(n, 24, generator=generator)


@pytest.mark.parametrize("name", MAKERS)
def test_codes_and_results_equal_those_of_the_cpu(name):
    database, queries = clustered(3000, 0), clustered(40, 1)
    host, device = MAKERS[name]("cpu").fit(database), MAKERS[name]("cuda")
    device.load_state_dict(host.state_dict())
    host.add(database)
    device.add(database.cuda())
    # Rounding may differ at the edge of a step.
    assert (device.codes.cpu() != host.codes).float().mean() < 1e-3
    device.load_state_dict(host.state_dict())
    for n_queries in (1, 40):
        found, wanted = device(queries[:n_queries].cuda(), 10), host(queries[:n_queries], 10)
        assert found.scores.is_cuda
        torch.testing.assert_close(found.scores.cpu(), wanted.scores, rtol=1e-6, atol=1e-6)
        assert (found.ids.cpu() != wanted.ids).float().mean() < 0.01


@pytest.mark.parametrize("name", MAKERS)
def test_an_index_is_fitted_and_searched_on_the_gpu(name):
    database = clustered(3000, 0).cuda()
    index = MAKERS[name]("cuda").fit(database)
    ids = index.add(database)
    assert index.codes.is_cuda
    found = index.search(database[:20], 5).ids
    assert (found == ids[:20, None]).any(1).float().mean() > 0.2
    index.remove(ids[:100])
    queries = database[100:110].requires_grad_()
    index.search(queries, 5).scores.sum().backward()
    assert queries.grad.isfinite().all()
