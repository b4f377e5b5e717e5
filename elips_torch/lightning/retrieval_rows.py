"""What the steps of a validation epoch return, kept until its end."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from elips_torch.core.errors import ArgumentError, DtypeError, ShapeError
from elips_torch.core.validation import check_vectors
from elips_torch.lightning.dealt_samples import places_of
from elips_torch.lightning.gather import Processes

# What a step may return: the name of the vectors, and what the integers that belong to them may be called.
KINDS = {"embeddings": ("labels",), "queries": ("relevant", "labels"), "documents": ("ids", "labels")}
_EXPECTED = " or ".join(
    f"{{{vectors!r}, {' or '.join(map(repr, integers))}}}" for vectors, integers in KINDS.items()
)


@dataclasses.dataclass
class Rows:
    """Vectors ``(N, D)``, the integers ``(N,)`` or ``(N, R)`` that belong to them, their places ``(N,)``.

    Vectors and integers may be the very tensors that a step returned: nobody writes into them.
    The place of a row is its number in the data of all processes, which have ``total`` rows together;
    ``meaning`` is what the step called the integers.
    """

    vectors: Tensor
    integers: Tensor
    places: Tensor
    total: int
    meaning: str


class RowCollection:
    """The rows that this process has seen, by kind and by dataloader."""

    def __init__(self) -> None:
        # By kind and dataloader; each pair has the number of the batch that it comes from.
        self._parts: dict[str, dict[int, list[tuple[Tensor, Tensor]]]] = {}
        self._batches: dict[str, dict[int, list[int]]] = {}
        self._seen: Counter[int] = Counter()
        self._meanings: dict[str, str] = {}

    def add(self, output: Any, dataloader_idx: int, device: torch.device | str | None) -> None:
        """Keep what a step returned.

        Raises:
            ElipsError: it is no mapping, lacks a key, or its tensors do not fit.
        """
        if not isinstance(output, Mapping):
            raise DtypeError(f"the retrieval step returned a {type(output).__name__}, expected {_EXPECTED}")
        present = [kind for kind in KINDS if kind in output]
        if not present:
            keys = ", ".join(map(repr, output)) or "nothing"
            raise ArgumentError(f"the retrieval step returned {keys}, expected {_EXPECTED}")
        # All are checked before one is kept.
        for kind, (meaning, rows) in {kind: _checked(kind, output, device) for kind in present}.items():
            if self._meanings.setdefault(kind, meaning) != meaning:
                raise ArgumentError(
                    f"the retrieval step returned {kind!r} with {meaning!r}, before that with "
                    f"{self._meanings[kind]!r}: expected the same for all batches"
                )
            self._parts.setdefault(kind, {}).setdefault(dataloader_idx, []).append(rows)
            self._batches.setdefault(kind, {}).setdefault(dataloader_idx, []).append(
                self._seen[dataloader_idx]
            )
        self._seen[dataloader_idx] += 1

    def kinds(self, processes: Processes) -> set[str]:
        """Return the kinds of rows that any process has; must be called by all processes."""
        return set().union(*processes.objects({kind for kind in self._parts if self._count(kind)}))

    def by_label(self, processes: Processes) -> bool:
        """Return whether labels tell what is relevant, as far as is known; called by all processes."""
        meanings = set().union(*processes.objects(set(self._meanings.values())))
        return not meanings or "labels" in meanings

    def dim(self, processes: Processes) -> int | None:
        """Return the size of a vector, None if there is none; must be called by all processes."""
        shapes = [_shape(self._parts[kind]) for kind in self._parts]
        known = processes.objects([shape[0] for shape in shapes if shape is not None])
        return next((dim for each in known for dim in each), None)

    def take(self, kind: str, loaders: list[Any], device: torch.device | str, processes: Processes) -> Rows:
        """Give away the rows of a kind that are this process's own; must be called by all processes.

        Args:
            kind: one of `KINDS`.
            loaders: the dataloaders, by number.
            device: where the empty result lies if this process has none.
            processes: who takes part.
        """
        parts = self._parts.pop(kind, {})
        everywhere = processes.objects(set(parts))
        shapes = [shape for shape in processes.objects(_shape(parts)) if shape is not None]
        if len({shape[0] for shape in shapes}) > 1:
            raise ShapeError(f"{kind} differ in dim between processes: {shapes}")
        meanings = {each for each in processes.objects(self._meanings.get(kind)) if each is not None}
        if len(meanings) > 1:
            raise ArgumentError(f"{kind} come with {' and '.join(sorted(meanings))}, expected one of them")
        (meaning,) = meanings
        pieces = []
        first = 0
        for loader in sorted(set().union(*everywhere)):
            numbers = self._batches.get(kind, {}).pop(loader, [])
            places, total = places_of(
                [
                    (batch, integers)
                    for batch, (_, integers) in zip(numbers, parts.get(loader, []), strict=True)
                ],
                self._seen[loader],
                loaders[loader] if loader < len(loaders) else None,
                processes,
                name=kind,
                unique=meaning == "ids",
            )
            kept = places < total
            if loader in parts:
                vectors, integers = _joined(parts.pop(loader))
                places = places.to(vectors.device)
                if not bool(kept.all()):
                    kept = kept.to(vectors.device)
                    vectors, integers, places = vectors[kept], integers[kept], places[kept]
                pieces.append((vectors, integers, places + first))
            first += total
        if not pieces:
            shape = (0, 1) if meaning == "relevant" else (0,)
            integers = torch.empty(shape, dtype=torch.int64, device=device)
            vectors = torch.empty(0, shapes[0][0], dtype=torch.float32, device=device)
            return Rows(vectors, integers, integers.flatten(), first, meaning)
        vectors, integers = _joined([piece[:2] for piece in pieces])
        return Rows(vectors, integers, torch.cat([piece[2] for piece in pieces]), first, meaning)

    def _count(self, kind: str) -> int:
        return sum(_count(part) for part in self._parts.get(kind, {}).values())


def _shape(parts: Mapping[int, list[tuple[Tensor, Tensor]]]) -> tuple[int, int] | None:
    """Return the dim of the vectors and the largest number of integers per row; None without rows."""
    tensors = [pair for part in parts.values() for pair in part]
    if not tensors:
        return None
    return tensors[0][0].shape[1], max(pair[1].shape[-1] for pair in tensors)


def _checked(
    kind: str, output: Mapping[str, Any], device: torch.device | str | None
) -> tuple[str, tuple[Tensor, Tensor]]:
    """Return what the step called the integers, and the vectors with them."""
    names = [name for name in KINDS[kind] if name in output]
    if not names:
        raise ArgumentError(
            f"the retrieval step returned {kind!r} without {' or '.join(map(repr, KINDS[kind]))}"
        )
    name = names[0]
    vectors, integers = output[kind], output[name]
    check_vectors(kind, vectors)
    if not isinstance(integers, Tensor) or integers.is_floating_point() or integers.dtype == torch.bool:
        got = integers.dtype if isinstance(integers, Tensor) else type(integers).__name__
        raise DtypeError(f"{name} is {got}, expected an int64 tensor")
    if name == "relevant" and integers.ndim == 1:
        integers = integers[:, None]
    n, ndim = len(vectors), 2 if name == "relevant" else 1
    if integers.ndim != ndim or len(integers) != n:
        expected = f"({n}, R)" if ndim == 2 else f"({n},)"
        raise ShapeError(f"{name} has shape {tuple(integers.shape)}, expected {expected}, a row per vector")
    where = vectors.device if device is None else device
    return name, (vectors.detach().to(where, torch.float32), integers.to(where, torch.int64))


def _count(pairs: Iterable[tuple[Tensor, Tensor]]) -> int:
    return sum(len(vectors) for vectors, _ in pairs)


def _joined(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(pairs) == 1:
        return pairs[0]
    if len({vectors.shape[1] for vectors, _ in pairs}) > 1:
        dims = sorted({vectors.shape[1] for vectors, _ in pairs})
        raise ShapeError(f"the retrieval step returned vectors of dims {dims}, expected one dim")
    integers = [each for _, each in pairs]
    if integers[0].ndim == 2:
        width = max(each.shape[1] for each in integers)
        integers = [functional.pad(each, (0, width - each.shape[1]), value=-1) for each in integers]
    return torch.cat([vectors for vectors, _ in pairs]), torch.cat(integers)
