"""Facts about the machine, read once."""

import dataclasses
import functools
import os

import torch


@dataclasses.dataclass(frozen=True)
class DeviceFacts:
    """What a device is, as far as the choice of an implementation may depend on it.

    Attributes:
        type: "cpu", "cuda", ...
        name: what the driver calls a GPU; the number of cores of a CPU.
        capability: instruction set of a CPU ("AVX512"), "sm_90" or "gfx942" for a GPU.
        memory_bytes: memory of a GPU; 0 for a CPU.
        vnni: the CPU has 8-bit integer dot products (AVX512-VNNI).
    """

    type: str
    name: str
    capability: str
    memory_bytes: int = 0
    vnni: bool = False

    def __str__(self) -> str:
        memory = f", {self.memory_bytes / 2**30:.0f} GiB" if self.memory_bytes else ""
        return f"{self.type} ({self.name}, {self.capability}{', VNNI' if self.vnni else ''}{memory})"


@functools.cache
def _facts(device_type: str, index: int) -> DeviceFacts:
    if device_type == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(index)
        arch = getattr(properties, "gcnArchName", "") if torch.version.hip else ""
        capability = arch.split(":")[0] or f"sm_{properties.major}{properties.minor}"
        return DeviceFacts("cuda", properties.name, capability, properties.total_memory)
    if device_type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        vnni = capability == "AVX512" and torch.cpu._is_vnni_supported()
        return DeviceFacts("cpu", f"{os.cpu_count()} cores", capability, vnni=vnni)
    return DeviceFacts(device_type, device_type, "unknown")


def device_facts(device: torch.device | str) -> DeviceFacts:
    """Return the facts of a device; each device is asked once per process.

    A GPU that torch cannot use is "unknown".

    >>> device_facts("cpu").type
    'cpu'
    """
    if device == "cpu":
        # Each search asks, several times.
        return _facts("cpu", 0)
    device = torch.device(device)
    index = device.index
    if device.type == "cuda" and index is None and torch.cuda.is_available():
        index = torch.cuda.current_device()
    return _facts(device.type, index or 0)


def float32_product_is_exact(device: torch.device) -> bool:
    """Whether float32 matrix products run in full float32 under the present settings.

    `torch.set_float32_matmul_precision` and its kin may replace them by TF32 or bfloat16.
    """
    backend = torch.backends.mkldnn if device.type == "cpu" else torch.backends.cuda
    return backend.matmul.fp32_precision in ("none", "ieee")


def int8_product_is_fast(device: torch.device) -> bool:
    """Whether products of int8 matrices run on integer instructions here, and give right results.

    Elsewhere torch computes them in a plain loop, far slower than a float32 product.
    """
    if device.type != "cpu" or not device_facts(device).vnni:
        return False
    has_library = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return has_library and _int8_product_is_right()


@functools.cache
def _int8_product_is_right() -> bool:
    """Compare one product of extreme codes with its value; instructions that saturate fail."""
    return all(_product_of_extremes_is_right(dim) for dim in (8, 33, 512))


def _product_of_extremes_is_right(dim: int) -> bool:
    signs = torch.where(torch.arange(dim, device="cpu") % 3 == 0, -1, 1)
    low = torch.full((dim,), -128, device="cpu")
    rows = torch.stack(
        [127 * signs, low, torch.full_like(low, 127), signs * torch.arange(dim, device="cpu") % 128]
    )
    rows = rows.repeat(16, 1)
    product = torch._int_mm(rows.to(torch.int8), rows.to(torch.int8).t())
    return torch.equal(product.double(), rows.double() @ rows.double().t())
