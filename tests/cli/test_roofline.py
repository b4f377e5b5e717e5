import pytest
import torch

from elips_torch.cli.roofline import Roofline, measure_roofline


def test_shares_count_each_row_and_each_product_once():
    roofline = Roofline(bytes_per_second=1e9, flops_per_second=1e12, dtype=torch.float16)
    bandwidth, rate = roofline.shares(n_queries=10, n_rows=1_000_000, dim=100, seconds=1.0)
    assert bandwidth == pytest.approx(0.2)
    assert rate == pytest.approx(0.002)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.cuda,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
            ],
        ),
    ],
)
def test_a_device_is_measured(device):
    roofline = measure_roofline(torch.device(device), torch.float32, copy_bytes=2**24, side=256)
    # Between a very slow machine and one beyond any that exists.
    assert 1e7 < roofline.bytes_per_second < 1e14
    assert 1e7 < roofline.flops_per_second < 1e16
    assert roofline.dtype == torch.float32
