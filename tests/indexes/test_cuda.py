"""FlatIndex on a GPU answers what it answers on a CPU."""

import pytest
import torch

from elips_torch import METRICS, DeviceError, FlatIndex, IVFFlatIndex

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def pair(metric="l2", n=3000, dim=32, **options):
    generator = torch.Generator().manual_seed(0)
    vectors, queries = torch.rand(n, dim, generator=generator), torch.rand(17, dim, generator=generator)
    host = FlatIndex(dim, metric, p=3.0 if metric == "lp" else None, **options)
    host.add(vectors, ids=torch.randperm(n, generator=generator))
    device = FlatIndex(dim, metric, p=3.0 if metric == "lp" else None, device="cuda", **options)
    device.add(vectors.cuda(), ids=host.ids.cuda())
    return host, device, queries


def assert_close(found, wanted):
    assert found.scores.is_cuda
    # The order of the sum differs between devices, and with it, rarely, the last bit of a score.
    torch.testing.assert_close(found.scores.cpu(), wanted.scores, rtol=2.4e-7, atol=1e-30)
    differ = found.ids.cpu() != wanted.ids
    assert differ.float().mean() < 0.01


@pytest.mark.parametrize("metric", [metric.name for metric in METRICS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_search_equals_the_cpu(metric, dtype):
    host, device, queries = pair(metric, dtype=dtype)
    for k in (1, 10, 3000):
        assert_close(device(queries.cuda(), k), host(queries, k))


def test_ties_are_exact():
    device = FlatIndex(8, device="cuda")
    device.add(torch.ones(5000, 8, device="cuda"), ids=torch.arange(5000).flip(0))
    assert device(torch.zeros(1, 8, device="cuda"), k=100).ids.tolist() == [list(range(100))]


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_matmul_precision_changes_no_number(precision):
    host, device, queries = pair()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert_close(device(queries.cuda(), 10), host(queries, 10))
    finally:
        torch.set_float32_matmul_precision(before)


def test_bad_queries_are_marked_without_an_error():
    _, device, queries = pair()
    queries = queries.cuda()
    queries[3, 0] = torch.nan
    scores, ids = device(queries, 5)
    assert scores[3].isnan().all()
    assert (ids[3] == -1).all()
    assert (ids[:3] >= 0).all()


def test_masks_exclusions_and_range_search():
    host, device, queries = pair()
    mask = host.ids % 3 == 0
    assert_close(device(queries.cuda(), 10, mask=mask.cuda()), host(queries, 10, mask=mask))
    exclude = host(queries, 5).ids
    assert_close(device(queries.cuda(), 10, exclude=exclude.cuda()), host(queries, 10, exclude=exclude))
    radius = host(queries, 20).scores[:, -1]
    assert torch.equal(
        device.range_search(queries.cuda(), radius.cuda()).lims.cpu(), host.range_search(queries, radius).lims
    )


def test_gradients_moves_and_another_device():
    host, device, queries = pair()
    here, there = queries.clone().requires_grad_(), queries.cuda().requires_grad_()
    host(here, 5).scores.sum().backward()
    device(there, 5).scores.sum().backward()
    torch.testing.assert_close(there.grad.cpu(), here.grad, rtol=1e-5, atol=1e-5)
    moved = device.to("cpu")
    assert torch.equal(moved(queries, 5).ids, host(queries, 5).ids)
    moved = moved.to("cuda")
    moved.add(torch.rand(3, 32, device="cuda"))
    assert len(moved) == 3003
    with pytest.raises(DeviceError, match="queries is on cpu, the index is on cuda:0"):
        moved(queries, 5)


def test_a_side_stream_sees_what_was_added_on_it():
    index = FlatIndex(32, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        vectors = torch.rand(20000, 32, device="cuda")
        index.add(vectors)
        found = index(vectors[:100], k=1).ids[:, 0]
    torch.cuda.synchronize()
    assert found.tolist() == list(range(100))


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine", "l1"])
def test_lists_answer_as_on_the_cpu(metric):
    generator = torch.Generator().manual_seed(0)
    vectors, queries = torch.rand(3000, 32, generator=generator), torch.rand(40, 32, generator=generator)
    host = IVFFlatIndex(32, 20, metric, nprobe=4).fit(vectors)
    host.add(vectors)
    device = IVFFlatIndex(32, 20, metric, device="cuda")
    device.load_state_dict(host.state_dict())
    mask = torch.rand(40, 3000, generator=generator) < 0.1
    for index in (device, IVFFlatIndex(32, 20, metric, nprobe=4).fit(vectors).cuda()):
        if not len(index):
            index.add(vectors.cuda())
        for part in (1, 40):
            assert_close(index(queries[:part].cuda(), 10), host(queries[:part], 10))
            shown = mask[:part]
            assert_close(
                index(queries[:part].cuda(), 90, mask=shown.cuda()), host(queries[:part], 90, mask=shown)
            )
    for index in (host, device):
        index.remove(list(range(0, 3000, 3)))
        index.upsert(-vectors[1:900:3].to(index.device), list(range(1, 900, 3)))
    assert torch.equal(device.list_sizes().cpu(), host.list_sizes())
    assert_close(device(-queries.cuda(), 10), host(-queries, 10))


@pytest.mark.parametrize("screen", ["int8", "bf16", "none"])
@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_kernels_for_lists_answer_as_on_the_cpu(metric, screen):
    generator = torch.Generator().manual_seed(0)
    vectors, queries = torch.randn(5000, 48, generator=generator), torch.randn(300, 48, generator=generator)
    host = IVFFlatIndex(48, 30, metric, nprobe=6).fit(vectors)
    host.add(vectors)
    device = IVFFlatIndex(48, 30, metric, nprobe=6, screen=screen, device="cuda")
    device.load_state_dict(host.state_dict())
    exclude = torch.randint(-1, 5000, (300, 4), generator=generator)
    for part in (1, 7, 300):
        asked, left_out = queries[:part], exclude[:part]
        found = device.search(asked.cuda(), 10, exclude=left_out.cuda(), implementation="triton")
        assert_close(found, host.search(asked, 10, exclude=left_out))
