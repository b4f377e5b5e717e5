"""The vectors of an index and their ids: adding, replacing, removing, asking for them."""

import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Self, SupportsIndex

import torch
from torch import Tensor

from elips_torch.core.errors import (
    ArgumentError,
    DtypeError,
    DuplicateIdError,
    ShapeError,
    UnknownIdError,
)
from elips_torch.core.metric import resolve_metric
from elips_torch.core.validation import (
    as_ids,
    check_exclude,
    check_flag,
    check_mask,
    check_unique,
    check_values,
    check_vectors,
)
from elips_torch.indexes.state import RowState
from elips_torch.indexes.storage import durable
from elips_torch.indexes.untraced import untraced
from elips_torch.kernels.selection import EVERYTHING, Selection

_LARGEST_ID = torch.iinfo(torch.int64).max - 1


class Rows(RowState, ABC):
    """Vectors under the users' ids; what an index is before it can be searched.

    Args:
        dim: D, size of a vector.
        metric: name of the distance kind, or an alias.
        p: exponent of metric "lp".
        device: where the database lies.
        index_in_state_dict: whether checkpoints hold the database.
        check_finite: whether vectors are checked for NaN and infinity.
    """

    # Whether old vectors leave by themselves when new ones come.
    drops_rows: ClassVar[bool] = False

    def __init__(
        self,
        dim: int,
        metric: str,
        *,
        p: float | None,
        device: torch.device | str | None,
        index_in_state_dict: bool,
        check_finite: bool,
    ) -> None:
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise DtypeError(f"dim is {dim!r}, expected an int")
        if dim < 1:
            raise ArgumentError(f"dim is {dim}, expected at least 1")
        self._metric = resolve_metric(metric, p)
        super().__init__(device, index_in_state_dict)
        self.dim = dim
        self.check_finite = check_flag("check_finite", check_finite)

    @abstractmethod
    def _encode(self, vectors: Tensor) -> dict[str, Tensor]:
        """Return the rows to store for ``(N, D)`` vectors, by name of the row tensor."""

    @abstractmethod
    def _decode(self, rows: Tensor) -> Tensor:
        """Return the vectors ``(M, D)`` of rows ``(M,)``."""

    @property
    def is_trained(self) -> bool:
        """Whether vectors can be added."""
        return True

    @property
    def metric(self) -> str:
        """Canonical name of the metric."""
        return self._metric.name

    @property
    def p(self) -> float | None:
        """Exponent of metric "lp", None for the others."""
        return self._metric.p if self._metric.name == "lp" else None

    @property
    def higher_is_better(self) -> bool:
        """Whether larger scores are nearer."""
        return self._metric.higher_is_better

    @property
    def device(self) -> torch.device:
        """Device of the database."""
        return self.ids.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which `reconstruct` returns vectors."""
        return torch.float32

    def __len__(self) -> int:
        return self.ntotal

    def __contains__(self, id: object) -> bool:
        try:
            label = operator.index(id)  # type: ignore[arg-type]
        except TypeError:
            return False
        if isinstance(id, bool) or not 0 <= label <= _LARGEST_ID:
            return False
        return bool(self._rows_of(torch.tensor([label], device=self.device)) >= 0)

    def memory_bytes(self) -> int:
        """Return the bytes that the stored tensors occupy; on accelerators, room for growth included.

        On a CPU that room is address space that no memory stands behind.
        """
        tensors = self.stored_tensors()
        if self.device.type == "cpu":
            return sum(tensor.nbytes for tensor in tensors)
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    @untraced
    def fit(self, vectors: Tensor) -> Self:
        """Learn from ``(N, D)`` vectors what the index needs before `add`; here, nothing.

        Returns:
            The index itself.
        """
        self._check_new(vectors)
        return self

    @untraced
    def add(self, vectors: Tensor, ids: Tensor | Sequence[int] | None = None) -> Tensor:
        """Store vectors under new ids.

        Args:
            vectors: ``(N, D)`` float32, float16, bfloat16 or float64, on the index's device; stored
                in the index's dtype, without gradient history.
            ids: ``(N,)`` unique integers >= 0 that the index does not hold. Default: ascending from
                one past the largest id ever used.

        Returns:
            ``(N,)`` int64, the ids.

        Raises:
            ShapeError, DtypeError, DeviceError: the vectors or ids do not fit.
            NonFiniteError: NaN or infinity, also where the index's dtype cannot hold a value.
            DuplicateIdError: an id occurs twice or is held already.
        """
        encoded = self._encode(self._check_new(vectors))
        return self._append(encoded, self._new_ids(vectors.shape[0], ids), automatic=ids is None)

    @untraced
    def upsert(self, vectors: Tensor, ids: Tensor | Sequence[int]) -> Tensor:
        """Replace the vectors of known ids in place and add those of unknown ids at the end.

        Args:
            vectors: ``(N, D)``, as for `add`.
            ids: ``(N,)`` unique integers >= 0.

        Returns:
            ``(N,)`` int64, the ids.

        Raises:
            ElipsError: as for `add`, but for ids that are held already.
        """
        encoded = self._encode(self._check_new(vectors))
        labels = self._own_ids(vectors.shape[0], ids)
        rows = self._rows_of(labels)
        known = rows >= 0
        new = ~known
        fresh = {name: tensor[new] for name, tensor in encoded.items()}
        stale = {name: tensor[known] for name, tensor in encoded.items()}
        if bool(new.any()):
            self._append(fresh, labels[new], automatic=False)
        self._overwrite_rows(rows[known], stale)
        return labels

    @untraced
    def remove(self, ids: Tensor | Sequence[int] | int) -> int:
        """Remove the vectors of ids; the others keep their ids and their order.

        Args:
            ids: ``(N,)`` unique ids that the index holds, or one id.

        Returns:
            Number of vectors removed.

        Raises:
            UnknownIdError: an id that the index does not hold.
            DuplicateIdError: an id occurs twice.
        """
        labels = as_ids("ids", ids, self.device)
        check_unique("ids", labels)
        rows = self._known_rows(labels)
        if rows.numel():
            keep = torch.ones(self.ntotal, dtype=torch.bool, device=self.device)
            keep[rows] = False
            self._keep_rows(keep)
        return rows.numel()

    @untraced
    def reset(self) -> None:
        """Remove every vector.

        What `fit` learned stays, and automatic ids go on after the largest ever used: give
        ``ids=`` to start over at 0.
        """
        self._keep_rows(torch.zeros(self.ntotal, dtype=torch.bool, device=self.device))

    def reconstruct(self, ids: Tensor | Sequence[int] | int) -> Tensor:
        """Return stored vectors: what was added, also under "cosine", in the index's dtype.

        Args:
            ids: ``(N,)`` ids, or one id.

        Returns:
            ``(N, D)``, or ``(D,)`` for one id.

        Raises:
            UnknownIdError: an id that the index does not hold.
        """
        rows = self._known_rows(as_ids("ids", ids, self.device))
        vectors = self._decode(rows)
        single = ids.ndim == 0 if isinstance(ids, Tensor) else isinstance(ids, SupportsIndex)
        return vectors[0] if single else vectors

    # How rows are kept.

    def _check_new(self, vectors: Tensor) -> Tensor:
        """Return vectors as they will be stored, or raise."""
        check_vectors("vectors", vectors, dim=self.dim, device=self.device)
        vectors = vectors.detach().to(self.dtype)
        if self.check_finite:
            check_values("vectors", vectors, self._metric)
        return vectors

    def _own_ids(self, n: int, ids: Tensor | Sequence[int]) -> Tensor:
        labels = as_ids("ids", ids, self.device)
        if labels.numel() != n:
            raise ShapeError(f"ids has {labels.numel()} entries, expected {n}, one per vector")
        if labels.numel() and int(labels.max()) > _LARGEST_ID:
            raise ArgumentError(f"ids has the id {int(labels.max())}, expected ids <= {_LARGEST_ID}")
        check_unique("ids", labels)
        return labels

    def _new_ids(self, n: int, ids: Tensor | Sequence[int] | None) -> Tensor:
        self._current_id_map()
        if ids is None:
            if self._next_id + n - 1 > _LARGEST_ID:
                raise ArgumentError(f"no {n} automatic ids are left after {self._next_id - 1}; pass ids")
            return torch.arange(self._next_id, self._next_id + n, device=self.device)
        labels = self._own_ids(n, ids)
        # Ids beyond the running maximum, the usual case, need no look-up.
        if labels.numel() and int(labels.min()) < self._next_id:
            held = labels[self._rows_of(labels) >= 0]
            if held.numel():
                raise DuplicateIdError(
                    f"ids has the id {int(held[0])}, which the index holds already; use upsert"
                )
        return labels

    def _append(self, encoded: dict[str, Tensor], ids: Tensor, *, automatic: bool) -> Tensor:
        if not ids.numel():
            return ids
        # One change of modes for all that follows the rows.
        with durable():
            id_map, first_row = self._current_id_map(), self.ntotal
            self._append_rows({**encoded, "ids": ids})
            id_map.append(ids, first_row, largest=None if automatic else self._next_id - 1)
            id_map.accept(self.ids)
        self._next_id = self._next_id + len(ids) if automatic else max(self._next_id, int(ids.max()) + 1)
        return ids

    def _selection(
        self, n_queries: int, mask: Tensor | None, exclude: Tensor | None, exclude_self: bool
    ) -> Selection:
        """Return the rows that each of so many queries may see, of masks and ids as `search` takes them."""
        if not check_flag("exclude_self", exclude_self) and mask is None and exclude is None:
            return EVERYTHING
        check_mask(mask, n_queries, self.ntotal, self.device)
        check_exclude(exclude, n_queries, self.device)
        rows = None if exclude is None else self._rows_of(exclude)
        if exclude_self:
            if n_queries != self.ntotal:
                raise ShapeError(
                    f"exclude_self takes the stored vectors as queries: got {n_queries} queries, expected "
                    f"{self.ntotal}; for a part of them pass exclude=ids[:, None]"
                )
            own = torch.arange(n_queries, device=self.device)[:, None]
            rows = own if rows is None else torch.cat([rows, own], 1)
        return Selection(mask, rows)

    def _rows_of(self, ids: Tensor) -> Tensor:
        """Return the row of each id, any shape; -1 where it is unknown."""
        return self._current_id_map().rows(ids, self.ids)

    def _known_rows(self, ids: Tensor) -> Tensor:
        rows = self._rows_of(ids)
        unknown = ids[rows < 0]
        if unknown.numel():
            shown = ", ".join(map(str, unknown[:5].tolist()))
            more = f" and {unknown.numel() - 5} more" if unknown.numel() > 5 else ""
            raise UnknownIdError(f"ids has {shown}{more}, expected ids that the index holds")
        return rows
