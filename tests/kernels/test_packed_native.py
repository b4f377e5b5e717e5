"""Rows of codes that C++ decodes equal those that their quantizer decodes, whatever the instructions."""

import ctypes
import mmap

import pytest
import torch

from elips_torch.core.hardware import DeviceFacts, device_facts
from elips_torch.core.metric import resolve_metric
from elips_torch.core.native import native_reasons
from elips_torch.kernels import packed_native, search_native
from elips_torch.kernels.coded_rows import PackedRows
from elips_torch.kernels.packed_native import PackedSearch
from elips_torch.kernels.selection import Selection
from elips_torch.quantizers.scalar import QTYPES, ScalarQuantizer

pytestmark = pytest.mark.skipif(
    bool(native_reasons(device_facts("cpu"))), reason="; ".join(native_reasons(device_facts("cpu")))
)
N, WORKSPACE = 90, 64 * 2**20
# Instruction sets that this machine can run.
WAYS = {"AVX2": DeviceFacts("cpu", "2 cores", "AVX2")}
if device_facts("cpu").capability == "AVX512":
    WAYS["AVX512"] = DeviceFacts("cpu", "2 cores", "AVX512")
if device_facts("cpu").vnni:
    WAYS["VNNI"] = DeviceFacts("cpu", "2 cores", "AVX512", vnni=True)
# Below, at and above whole registers of either width.
DIMS = [1, 5, 8, 13, 16, 23, 31, 32, 67]


@pytest.fixture(params=WAYS, autouse=True)
def _instructions(request, monkeypatch):
    for module in (packed_native, search_native):
        monkeypatch.setattr(module, "device_facts", lambda device: WAYS[request.param])


def coded(qtype, dim, generator):
    """Return a quantizer and codes: of any bits, or of short floats half of which are not normal."""
    examples = torch.randn(50, dim, generator=generator) * torch.logspace(0, 1, dim)
    examples[:, ::4] = 0.1
    quantizer = ScalarQuantizer(dim, qtype).fit(examples)
    if qtype in ("fp16", "bf16"):
        tiny = 1e-6 if qtype == "fp16" else 1e-39
        # Those near zero leave doubt about the last bit of a score, which Python then decides.
        vectors = (0.5 + torch.rand(N, dim, generator=generator)).copysign(
            torch.randn(N, dim, generator=generator)
        )
        return quantizer, quantizer.encode(torch.cat([vectors[::2], tiny * vectors[1::2]]))
    return quantizer, torch.randint(0, 256, (N, quantizer.code_size), generator=generator, dtype=torch.uint8)


def unreachable(rows):
    raise AssertionError(f"rows {rows.tolist()} were decoded in Python")


def features(packed, dim):
    """Return the vectors ``(N, D)`` of rows as inner products with the axes show them."""
    search = PackedSearch(packed, unreachable, dim, resolve_metric("ip"), N, 0)
    scores, rows, certified = search.run(torch.eye(dim), N, None, Selection(), WORKSPACE)
    assert bool(certified.all())
    return torch.empty(dim, N).scatter_(1, rows, scores).t()


@pytest.mark.parametrize("qtype", QTYPES)
@pytest.mark.parametrize("with_centroids", [False, True])
def test_rows_are_decoded_to_the_last_bit(qtype, with_centroids):
    generator = torch.Generator().manual_seed(0)
    for dim in DIMS:
        quantizer, codes = coded(qtype, dim, generator)
        packed, wanted = PackedRows(codes, quantizer.packed_table()), quantizer.decode(codes)
        if with_centroids:
            centroids = torch.randn(4, dim, generator=generator)
            lists = torch.randint(0, 4, (N,), generator=generator, dtype=torch.int32)
            packed = PackedRows(codes, packed.table, centroids, lists)
            wanted = wanted + centroids[lists]
        assert torch.equal(features(packed, dim), wanted)


@pytest.mark.parametrize("qtype", QTYPES)
def test_nothing_is_read_behind_the_codes(qtype):
    """The codes end where memory may no longer be read."""
    generator = torch.Generator().manual_seed(1)
    pages = mmap.mmap(-1, 4 * mmap.PAGESIZE)
    held = (ctypes.c_uint8 * len(pages)).from_buffer(pages)
    last = ctypes.addressof(held) + 3 * mmap.PAGESIZE
    protect = ctypes.CDLL(None).mprotect
    assert protect(ctypes.c_void_p(last), mmap.PAGESIZE, 0) == 0
    try:
        for dim in (5, 13, 31, 67):
            quantizer, codes = coded(qtype, dim, generator)
            end = 3 * mmap.PAGESIZE
            edge = torch.frombuffer(pages, dtype=torch.uint8, count=codes.numel(), offset=end - codes.numel())
            edge = edge.view_as(codes).copy_(codes)
            found = features(PackedRows(edge, quantizer.packed_table()), dim)
            assert torch.equal(found, quantizer.decode(codes))
    finally:
        protect(ctypes.c_void_p(last), mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE)
