"""Memory of rows that are read in any order is asked to lie in huge pages."""

import mmap
from pathlib import Path

import pytest
import torch

from elips_torch import SQIndex
from elips_torch.core import huge_pages
from elips_torch.core.huge_pages import ask_for_huge_pages

MAPS = Path("/proc/self/smaps")
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def is_asked_for(tensor):
    """Whether the kernel notes that the middle of a tensor's memory may lie in huge pages."""
    place, inside = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in MAPS.read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            low, high = (int(bound, 16) for bound in first.split("-"))
            inside = low <= place < high
        elif inside and first == "VmFlags:":
            return "hg" in line.split()
    return False


needs_linux = pytest.mark.skipif(
    not MAPS.exists() or not THP.exists() or not hasattr(mmap, "MADV_HUGEPAGE"),
    reason="needs a Linux with transparent huge pages",
)


@needs_linux
def test_stored_rows_are_asked_to_lie_in_huge_pages():
    index = SQIndex(64, "fp16")
    index.add(torch.zeros(50_000, 64))
    assert is_asked_for(index.codes)
    loaded = SQIndex(64, "fp16")
    loaded.load_state_dict(index.state_dict())
    assert is_asked_for(loaded.codes)
    assert torch.equal(loaded.codes, index.codes)


@needs_linux
def test_whole_pages_inside_a_tensor_are_asked_for():
    asked = []
    tensor = torch.empty(2**22 + 1000, dtype=torch.uint8)[7:]
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(huge_pages, "_madvise", lambda: lambda *arguments: asked.append(arguments))
        ask_for_huge_pages(tensor)
        ask_for_huge_pages(tensor[:1000])
        ask_for_huge_pages(torch.empty(2**24, dtype=torch.uint8, device="meta"))
    [(start, size, advice)] = asked
    assert start % mmap.PAGESIZE == size % mmap.PAGESIZE == 0
    assert 0 <= start - tensor.data_ptr() < mmap.PAGESIZE
    assert 0 <= tensor.data_ptr() + tensor.nbytes - start - size < mmap.PAGESIZE
    assert advice == mmap.MADV_HUGEPAGE


def test_nothing_is_asked_where_there_are_none(monkeypatch):
    monkeypatch.setattr(huge_pages, "_madvise", lambda: None)
    ask_for_huge_pages(torch.empty(2**23, dtype=torch.uint8))
