"""Searching an index through a copy of it in faiss."""

import importlib
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from elips_torch.core.dispatch import Implementation, Request, check_name
from elips_torch.core.errors import ConversionError, ImplementationError
from elips_torch.core.locks import ForkSafeLock
from elips_torch.core.validation import bad_queries
from elips_torch.engines.faiss.builds import FaissBuild, is_installed, load_installed
from elips_torch.engines.faiss.construct import construct
from elips_torch.engines.faiss.descriptions import (
    CodedDescription,
    Description,
    PreTransformDescription,
    ProductDescription,
)
from elips_torch.engines.faiss.looks import are_labels
from elips_torch.engines.faiss.search import index_gpu, search_index
from elips_torch.engines.faiss.selectors import bitmap_selector, lists_parameters, plain_parameters
from elips_torch.engines.faiss.stats import SEARCHES
from elips_torch.engines.faiss.transfer import to_gpu
from elips_torch.indexes.base import Index
from elips_torch.indexes.storage import Snapshot
from elips_torch.indexes.unit_length import normalized
from elips_torch.kernels.selection import Selection
from elips_torch.quantizers.learned import Learned

NAME = "faiss"


class FaissMirror:
    """A copy of an index in faiss, whose labels are the numbers of rows.

    It is made of the tensors of the index and good as long as these do not change.

    Args:
        build: the faiss to use.
        index: an index with lists or codes.

    Raises:
        ConversionError: faiss has no such index.
    """

    def __init__(self, build: FaissBuild, index: Index) -> None:
        self.build = build
        modules = list(index.modules())
        self._children = [(module, list(module._modules.values())) for module in modules if module._modules]
        # The ids of rows are not in the copy.
        self._tensors = [
            (module, name, Snapshot(getattr(module, name)))
            for module in modules
            for name in _names_of_values(module)
        ]
        self._metric = index._metric
        description = _describe(index)
        # Queries are normalised where the vectors were.
        self._normalizes = isinstance(description, PreTransformDescription)
        if isinstance(description, PreTransformDescription):
            description = description.index
        self._takes_masks = not _is_product_quantized(description)
        made = construct(build, description)
        if index.device.type == "cuda":
            number = torch.cuda.current_device() if index.device.index is None else index.device.index
            made = to_gpu(build, made, (number,))
        self._index = made
        self._parameters: dict[int, Any] = {}

    def is_current(self) -> bool:
        """Whether the index still is what was copied."""
        return all(
            len(module._modules) == len(children)
            and all(a is b for a, b in zip(module._modules.values(), children, strict=True))
            for module, children in self._children
        ) and all(snapshot.matches(getattr(module, name)) for module, name, snapshot in self._tensors)

    def search(
        self, queries: Tensor, k: int, selection: Selection, n_probes: int | None
    ) -> tuple[Tensor, Tensor]:
        """Return scores and rows ``(Q, K)``, as faiss gives them; row -1 and any score where it finds fewer.

        Args:
            queries: ``(Q, D)``, finite.
            k: number of neighbours.
            selection: rows that each query may see.
            n_probes: number of lists to read, None for an index without lists.

        Raises:
            ImplementationError: faiss takes no mask for such an index.
        """
        if self._normalizes:
            queries = normalized(queries)
        width = k + selection.n_excluded
        mask = selection.visible()
        if mask is None:
            scores, rows = self._search(queries, width, self._plain(n_probes))
        elif mask.ndim == 1:
            scores, rows = self._search_masked(queries, width, mask, n_probes)
        else:
            shape = (len(queries), width)
            scores = torch.empty(shape, dtype=torch.float32, device=queries.device)
            rows = torch.empty(shape, dtype=torch.int64, device=queries.device)
            for i in range(len(queries)):
                scores[i], rows[i] = self._search_masked(queries[i], width, mask[i], n_probes)
        return (scores, rows) if selection.exclude is None else _without(scores, rows, selection.exclude, k)

    def _search(self, queries: Tensor, k: int, parameters: Any) -> tuple[Tensor, Tensor]:
        return search_index(self.build, self._index, queries, k, parameters)

    def _plain(self, n_probes: int | None) -> Any:
        """Return the parameters of a search that sees all rows; made once for each number of probes."""
        if n_probes is None:
            return None
        if n_probes not in self._parameters:
            self._parameters[n_probes] = lists_parameters(self.build, n_probes)
        return self._parameters[n_probes]

    def _search_masked(
        self, queries: Tensor, k: int, mask: Tensor, n_probes: int | None
    ) -> tuple[Tensor, Tensor]:
        if index_gpu(self._index) is not None or not self._takes_masks:
            raise ImplementationError(
                "implementation='faiss' takes no mask here: faiss has none for IndexPQ and on GPUs"
            )
        with bitmap_selector(self.build, mask) as selector:
            if n_probes is None:
                parameters = plain_parameters(self.build, selector)
            else:
                parameters = lists_parameters(self.build, n_probes, selector)
            return self._search(queries, k, parameters)


def _describe(index: Index) -> Description:
    # That module knows every class of index, and those with lists or codes import this one.
    described = importlib.import_module("elips_torch.indexes.described_indexes")
    description: Description = described.describe_index(index, None, described.DescriptionOptions())
    return description


def _is_product_quantized(description: Description) -> bool:
    if not isinstance(description, CodedDescription):
        return False
    return isinstance(description.quantizer, ProductDescription)


def _names_of_values(module: torch.nn.Module) -> list[str]:
    # Planes follow the vectors.
    if isinstance(module, Index):
        return [name for name in module.held_tensors if name != "ids"]
    return list(module.learned_buffers) if isinstance(module, Learned) else []


def _without(scores: Tensor, rows: Tensor, exclude: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k first of what was found that are not excluded, in their order."""
    hit = rows < 0
    for column in exclude.unbind(1):
        hit |= rows == column[:, None]
    kept = hit.to(torch.uint8).argsort(dim=1, stable=True)[:, :k]
    return scores.gather(1, kept), rows.masked_fill(hit, -1).gather(1, kept)


# By index: so no copy of an index, no pickle and no state dictionary takes one along.
_mirrors: "weakref.WeakKeyDictionary[Index, FaissMirror]" = weakref.WeakKeyDictionary()
_making = ForkSafeLock()


def mirror_of(index: Index) -> FaissMirror:
    """Return the mirror of an index as it is now.

    Raises:
        ImplementationError: faiss has no such index, or is not installed.
    """
    found = _mirrors.get(index)
    if found is not None and found.is_current():
        return found
    with _making:
        # Another thread may have made it meanwhile.
        found = _mirrors.get(index)
        if found is not None and found.is_current():
            return found
        # Memory for one copy, not for two.
        _mirrors.pop(index, None)
        del found
        reasons = mirror_reasons(index)
        if reasons:
            raise ImplementationError(f"implementation='faiss' cannot serve: {', '.join(reasons)}")
        try:
            _mirrors[index] = mirror = FaissMirror(load_installed(), index)
        except ConversionError as error:
            raise ImplementationError(f"implementation='faiss' cannot serve: {error}") from error
        return mirror


def search_mirror(
    index: Index, queries: Tensor, k: int, selection: Selection, n_probes: int | None = None
) -> tuple[Tensor, Tensor]:
    """Search an index through its mirror; scores and order are those of faiss.

    A query that finds fewer than k rows that it may see reads more lists, as in other searches.

    Args:
        index: one with lists or codes.
        queries: ``(Q, D)``.
        k: number of neighbours.
        selection: rows that each query may see.
        n_probes: number of lists to read, None for an index without lists.

    Returns:
        Scores and row numbers ``(Q, K)``, -1 where there are fewer than k.

    Raises:
        ImplementationError: faiss has no such index or takes no such mask, or is not installed.
    """
    bad = bad_queries(queries, index._metric) if index.check_finite else None
    mirror = mirror_of(index)
    if bad is not None:
        queries = queries.masked_fill(bad[:, None], 0.0)
    with SEARCHES.as_one(len(queries)):
        scores, rows = mirror.search(queries, k, selection, n_probes)
        on_cpu = rows.device.type == "cpu" and rows.is_contiguous()
        if not (on_cpu and are_labels(mirror.build, rows)) and bool((rows[:, -1:] < 0).any()):
            if n_probes is not None:
                _read_on(index, mirror, queries, k, selection, n_probes, (scores, rows))
            scores.masked_fill_(rows < 0, index._metric.worst)
    if bad is not None:
        scores.masked_fill_(bad[:, None], torch.nan)
        rows.masked_fill_(bad[:, None], -1)
    return scores, rows


def _read_on(
    index: Any,
    mirror: FaissMirror,
    queries: Tensor,
    k: int,
    selection: Selection,
    n_probes: int,
    found: tuple[Tensor, Tensor],
) -> None:
    """Search more lists for the queries that have found fewer than there are; writes into what was found."""
    scores, rows = found
    while n_probes < index.nlist:
        pending = index._short(rows, k, selection).nonzero()[:, 0]
        if not pending.numel():
            return
        n_probes = min(2 * n_probes, index.nlist)
        more = mirror.search(queries[pending], k, selection.for_queries(pending), n_probes)
        scores[pending], rows[pending] = more


def is_asked_for(implementation: str, operation: str, others: Sequence[Implementation]) -> bool:
    """Return whether a search goes through faiss; what is not among the others is refused."""
    if implementation == "auto":
        return False
    check_name(operation, (*(each.name for each in others), NAME), implementation)
    return implementation == NAME


def mirror_entry(index: Index) -> Implementation:
    """Return the search through a mirror as `explain` lists it."""
    return Implementation(NAME, search_mirror, lambda request: mirror_reasons(index), _unwise)


def _unwise(request: Request) -> list[str]:
    return ["scores and their order would be faiss's own; it serves when asked for by name"]


def mirror_reasons(index: Any) -> list[str]:
    """Return why faiss cannot serve an index; reads no row."""
    reasons = []
    if not is_installed():
        reasons.append("faiss is not installed")
    if index.device.type not in ("cpu", "cuda"):
        reasons.append(f"faiss serves the CPU and CUDA and ROCm GPUs, the index is on {index.device}")
    if getattr(index, "quantizer", None) is not None and index.metric not in ("l2", "ip"):
        reasons.append(f"faiss searches codes under 'l2' and 'ip', the metric is {index.metric!r}")
    return reasons
