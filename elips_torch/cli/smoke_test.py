"""A test of the installation that takes seconds: an index is filled, searched, changed and saved."""

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from elips_torch.core.errors import ElipsError
from elips_torch.indexes.catalog import load_index
from elips_torch.indexes.flat import FlatIndex
from elips_torch.indexes.ivf_flat import IVFFlatIndex
from elips_torch.reference.knn import knn as reference_knn

_ROWS, _DIM, _QUERIES, _K = 400, 24, 8, 5
_METRICS = ("l2", "ip", "cosine")
_LISTS = 8


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one step showed.

    Attributes:
        step: what was tried.
        passed: whether it did what it should.
        detail: why not; empty when it did.
        seconds: how long it took.
    """

    step: str
    passed: bool
    detail: str
    seconds: float


def smoke_test(device: torch.device) -> list[Outcome]:
    """Try the index on a device, step by step; a failing step does not stop the others."""
    return [_try(step, check, device) for step, check in STEPS.items()]


def _try(step: str, check: Callable[[torch.device], str], device: torch.device) -> Outcome:
    start = time.perf_counter()
    try:
        detail = check(device)
    # What a broken installation raises: torch's errors, missing files, or the library's own.
    except (ElipsError, RuntimeError, OSError, ImportError, AttributeError) as error:
        detail = f"{type(error).__name__}: {error}"
    return Outcome(step, not detail, detail, time.perf_counter() - start)


def _data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(_ROWS, _DIM, generator=generator)
    return vectors, torch.randn(_QUERIES, _DIM, generator=generator)


def _filled(device: torch.device, metric: str = "l2") -> tuple[FlatIndex, Tensor, Tensor]:
    vectors, queries = _data()
    index = FlatIndex(_DIM, metric, device=device)
    index.add(vectors.to(device))
    return index, vectors, queries


def _differs(
    index: FlatIndex | IVFFlatIndex, queries: Tensor, vectors: Tensor, ids: Tensor | None = None
) -> str:
    """Return how a search differs from the reference; empty where it does not."""
    scores, found = index.search(queries.to(index.device), _K)
    wanted = reference_knn(queries, vectors, _K, index.metric, ids=ids)
    if not torch.equal(found.cpu(), wanted.ids):
        return f"{index.metric}: ids differ from the reference"
    # Another device may add up in another order, which can change the last bit.
    if not torch.allclose(scores.cpu(), wanted.scores, rtol=2.4e-7, atol=0.0):
        return f"{index.metric}: scores differ from the reference"
    return ""


def _search(device: torch.device) -> str:
    for metric in _METRICS:
        index, vectors, queries = _filled(device, metric)
        difference = _differs(index, queries, vectors)
        if difference:
            return difference
    return ""


def _remove(device: torch.device) -> str:
    index, vectors, queries = _filled(device)
    first = index.search(queries.to(device), 1).ids.flatten().unique()
    index.remove(first)
    kept = torch.ones(_ROWS, dtype=torch.bool)
    kept[first.cpu()] = False
    if index.ntotal != int(kept.sum()):
        return f"{index.ntotal} vectors are left, expected {int(kept.sum())}"
    return _differs(index, queries, vectors[kept], ids=kept.nonzero().flatten())


def _gradient(device: torch.device) -> str:
    index, vectors, queries = _filled(device, "ip")
    learned = queries.to(device).requires_grad_()
    scores, ids = index(learned, k=_K)
    scores.sum().backward()
    if learned.grad is None:
        return "the scores carry no gradient"
    wanted = vectors[ids.cpu()].sum(1)
    if not torch.allclose(learned.grad.cpu(), wanted, rtol=1e-4, atol=1e-5):
        return "the gradient is not the sum of the vectors found"
    return ""


def _save_and_load(device: torch.device) -> str:
    index, vectors, queries = _filled(device, "cosine")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.safetensors"
        index.save(path)
        loaded = load_index(path)
    if not isinstance(loaded, FlatIndex):
        return f"the file holds a {type(loaded).__name__}"
    return _differs(loaded, queries, vectors)


def _inverted_lists(device: torch.device) -> str:
    vectors, queries = _data()
    # Where all lists are read, results are exact.
    index = IVFFlatIndex(_DIM, nlist=_LISTS, nprobe=_LISTS, device=device).fit(vectors.to(device))
    ids = index.add(vectors.to(device))
    difference = _differs(index, queries, vectors)
    if difference:
        return difference
    found = index.search(vectors.to(device), 1, nprobe=1).ids[:, 0]
    if not torch.equal(found.cpu(), ids.cpu()):
        return "vectors are not found in their own lists"
    index.remove(ids[::2])
    if index.ntotal != _ROWS // 2:
        return f"{index.ntotal} vectors are left, expected {_ROWS // 2}"
    return _differs(index, queries, vectors[1::2], ids=ids[1::2].cpu())


STEPS: dict[str, Callable[[torch.device], str]] = {
    "add and search": _search,
    "remove": _remove,
    "gradient": _gradient,
    "save and load": _save_and_load,
    "inverted lists": _inverted_lists,
}
