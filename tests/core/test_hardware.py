import pytest
import torch

from elips_torch.core.hardware import device_facts, float32_product_is_exact


def test_the_facts_of_a_cpu():
    facts = device_facts("cpu")
    assert facts == device_facts(torch.device("cpu"))
    assert facts.type == "cpu"
    assert facts.capability == torch.backends.cpu.get_cpu_capability()
    assert facts.capability in str(facts)
    assert facts.vnni <= (facts.capability == "AVX512")


def test_another_device_is_named():
    assert device_facts("meta").type == "meta"


@pytest.mark.parametrize("level", [torch.backends, torch.backends.mkldnn, torch.backends.mkldnn.matmul])
def test_a_reduced_float32_product_is_noticed_wherever_it_is_set(level):
    cpu = torch.device("cpu")
    before = level.fp32_precision
    assert float32_product_is_exact(cpu)
    try:
        level.fp32_precision = "tf32"
        if torch.backends.mkldnn.matmul.fp32_precision == "tf32":
            assert not float32_product_is_exact(cpu)
    finally:
        level.fp32_precision = before
    assert float32_product_is_exact(cpu)
