"""The vectors of an index as faiss takes them, kept for its brute-force search."""

import dataclasses
import weakref

import torch
from torch import Tensor, nn

from elips_torch.core.locks import ForkSafeLock
from elips_torch.core.metric import Metric
from elips_torch.core.tiling import spans
from elips_torch.engines.faiss.candidates import CONVERTED_BYTES, FAISS_METRICS, converts, prepared
from elips_torch.indexes.storage import Snapshot

# What is converted to float32 without loss.
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass
class _Mirror:
    snapshot: Snapshot
    vectors: Tensor | None  # None where there was no memory for them


# By the module that holds the vectors: so no copy of it, no pickle and no state dictionary takes one along.
_mirrors: "weakref.WeakKeyDictionary[nn.Module, _Mirror]" = weakref.WeakKeyDictionary()
_making = ForkSafeLock()


def vectors_for_faiss(
    index: nn.Module,
    vectors: Tensor,  # (N, D)
    metric: Metric,
    workspace_bytes: int,
    make: bool,
) -> Tensor | None:  # (N, D) float32
    """Return vectors as faiss takes them on the CPU, made once until they change.

    Writes through ``vectors.data`` and numpy are not seen, as torch does not count them.

    Args:
        index: the module that holds them.
        vectors: ``(N, D)``.
        metric: the distance kind.
        workspace_bytes: limit on temporary memory, in bytes.
        make: whether to make them where they have not been made.

    Returns:
        Float32, normalised under "cosine"; None where they are not made, where faiss takes vectors as they
        are or not at all, where there is no memory, and where nobody can tell whether they have changed.
    """
    if vectors.device.type != "cpu" or vectors.dtype not in _DTYPES or metric.name not in FAISS_METRICS:
        return None
    # Fused optimisers leave no trace of what they write.
    if not converts(metric, vectors, torch.float32) or isinstance(vectors, nn.Parameter):
        return None
    found = _mirrors.get(index)
    if found is not None and found.snapshot.matches(vectors):
        return found.vectors
    if not make:
        return None
    with _making:
        # Another thread may have made it meanwhile.
        found = _mirrors.get(index)
        if found is None or not found.snapshot.matches(vectors):
            # Memory for one copy, not for two.
            _mirrors.pop(index, None)
            del found
            snapshot = Snapshot(vectors)
            try:
                made: Tensor | None = _converted(vectors, metric, workspace_bytes)
            except (MemoryError, RuntimeError):
                # Searches convert part by part, as those of plain tensors do.
                made = None
            _mirrors[index] = found = _Mirror(snapshot, made)
    return found.vectors


def _converted(vectors: Tensor, metric: Metric, workspace_bytes: int) -> Tensor:
    n_rows, dim = vectors.shape
    made = torch.empty((n_rows, dim), dtype=torch.float32, device="cpu")
    for start, stop in spans(n_rows, max(1, workspace_bytes // (CONVERTED_BYTES * dim))):
        made[start:stop] = prepared(vectors[start:stop].detach(), metric, torch.float32)
    return made
