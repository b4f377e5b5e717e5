"""Rows in inverted lists, one list per centroid, as module state."""

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from elips_torch.core.errors import ArgumentError, DtypeError, ShapeError
from elips_torch.core.tiling import DEFAULT_WORKSPACE_BYTES
from elips_torch.core.validation import check_count
from elips_torch.indexes.base import Index
from elips_torch.indexes.flat import FlatIndex
from elips_torch.indexes.inverted_lists import InvertedLists, SlotChange
from elips_torch.indexes.list_balance import imbalance_factor
from elips_torch.indexes.prepared_searches import PreparesSearches
from elips_torch.indexes.state import assigns
from elips_torch.indexes.storage import durable


class ListedRows(PreparesSearches):
    """An index whose rows are each assigned to the list of a centroid.

    A checkpoint holds the assignments and the centroids; the lists are made from the former.

    Args:
        dim: D, size of a vector.
        nlist: number of lists.
        metric: name of the distance kind, or an alias.
        coarse: an empty index for the centroids, or one that holds them under the ids 0 to
            ``nlist - 1``. Default: a `FlatIndex` under "ip" or "cosine" where that is the metric, else "l2".
        k: number of neighbours that `search` returns by default.
        p: exponent of metric "lp".
        device: where the database lies.
        index_in_state_dict: whether checkpoints hold the database, and the centroids.
        check_finite: whether vectors and queries are checked for NaN and infinity.
        workspace_bytes: limit on temporary memory of a search, in bytes.
    """

    row_tensors: ClassVar[tuple[str, ...]] = ("assignments", "ids")

    assignments: Tensor
    coarse: Index

    def __init__(
        self,
        dim: int,
        nlist: int,
        metric: str,
        *,
        coarse: Index | None,
        k: int,
        p: float | None,
        device: torch.device | str | None,
        index_in_state_dict: bool,
        check_finite: bool,
        workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    ) -> None:
        super().__init__(
            dim,
            metric,
            k=k,
            p=p,
            device=device,
            index_in_state_dict=index_in_state_dict,
            check_finite=check_finite,
            workspace_bytes=workspace_bytes,
        )
        self._nlist = check_count("nlist", nlist)
        with durable():
            self.register_buffer("assignments", torch.empty(0, dtype=torch.int32, device=device))
        self._has_own_coarse = coarse is None
        if coarse is None:
            coarse = FlatIndex(dim, self._coarse_metric, device=device, check_finite=False)
        self.coarse = self._check_coarse(coarse)
        self.coarse.index_in_state_dict = index_in_state_dict

    @property
    def nlist(self) -> int:
        """Number of lists."""
        return self._nlist

    @property
    def _coarse_metric(self) -> str:
        """Under which centroids are learned."""
        return self.metric if self.metric in ("ip", "cosine") else "l2"

    def _check_coarse(self, coarse: Index) -> Index:
        if not isinstance(coarse, Index):
            raise DtypeError(f"coarse is a {type(coarse).__name__}, expected an index")
        if coarse.dim != self.dim:
            raise ShapeError(f"coarse has dim {coarse.dim}, the index has dim {self.dim}")
        if coarse.ntotal not in (0, self.nlist):
            raise ArgumentError(
                f"coarse holds {coarse.ntotal} vectors, expected none or nlist = {self.nlist}"
            )
        if coarse.ntotal and not torch.equal(coarse.ids, torch.arange(self.nlist, device=coarse.device)):
            raise ArgumentError(f"coarse holds other ids, expected 0 to {self.nlist - 1} in this order")
        return coarse

    def _attach(self) -> None:
        super()._attach()
        self._lists = InvertedLists()

    def _slots_changed(self, change: SlotChange) -> None:
        """Follow a change of the slots with payload that is laid out by them; here there is none."""

    @property
    def is_trained(self) -> bool:
        """Whether `fit` has been called, so that vectors can be added."""
        return self.coarse.ntotal == self.nlist

    @property
    def lists(self) -> InvertedLists:
        """The rows of each list, as they are now."""
        if not self._lists.knows(self.assignments):
            self._slots_changed(self._lists.rebuild(self.assignments, self.nlist))
        return self._lists

    def list_sizes(self) -> Tensor:
        """Return the number of vectors in each list, ``(nlist,)`` int64."""
        return torch.bincount(self.assignments, minlength=self.nlist)

    def imbalance_factor(self) -> float:
        """Return how many times longer searches take than with lists of one length; 1.0 is best.

        The mean length of the list of a vector, in units of the mean length of a list, as faiss has it.
        """
        return imbalance_factor(self.list_sizes())

    def memory_bytes(self) -> int:
        """Return the bytes that the stored tensors and the lists occupy; see `Index.memory_bytes`."""
        return super().memory_bytes() + self.lists.nbytes

    # The lists follow changes of the assignments that they know; else the next search makes them anew.

    def _append_rows(self, rows: dict[str, Tensor]) -> None:
        known = self._lists.knows(self.assignments)
        super()._append_rows(rows)
        self._follow(known, lambda: [self._lists.append(rows["assignments"], self.assignments)])

    def _overwrite_rows(self, where: Tensor, rows: dict[str, Tensor]) -> None:
        known = self._lists.knows(self.assignments)
        super()._overwrite_rows(where, rows)
        self._follow(known, lambda: self._lists.move(where, self.assignments))

    def _keep_rows(self, keep: Tensor) -> None:
        known = self._lists.knows(self.assignments)
        super()._keep_rows(keep)
        self._follow(known, lambda: [self._lists.keep(keep, self.assignments)])

    def _follow(self, known: bool, change: Callable[[], list[SlotChange]]) -> None:
        if not known:
            self._lists.forget()
            return
        try:
            for step in change():
                self._slots_changed(step)
        except (MemoryError, RuntimeError):
            # The rows have changed; the lists are derived from them and can wait for memory.
            self._lists.forget()

    def _drop_reserves(self) -> None:
        known = self._lists.knows(self.assignments)
        super()._drop_reserves()
        if known:
            self._lists.accept(self.assignments)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._lists.forget()
        return self

    # Checkpoints.

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "index_in_state_dict" and "coarse" in self.__dict__.get("_modules", ()):
            # Rows in the lists of one fit mean nothing under the centroids of another.
            self.coarse.index_in_state_dict = value

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.pop("_lists", None)
        return state

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        n_errors, before = len(error_msgs), self.ids
        faults = self._coarse_faults(state_dict, prefix, local_metadata)
        error_msgs += [f"{prefix}coarse.{fault}" for fault in faults]
        if not faults:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        if self.ids is before and (self.ntotal or len(error_msgs) > n_errors):
            # No rows were loaded: those that there are belong to the centroids that there are.
            own = self.coarse.state_dict(prefix=f"{prefix}coarse.")
            state_dict.update({name: tensor for name, tensor in own.items() if name in state_dict})

    def _coarse_faults(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
    ) -> list[str]:
        """Return what keeps the centroids of a checkpoint from being those of this index."""
        names = (*self.coarse.row_tensors, "next_id")
        found = {name: state_dict.get(f"{prefix}coarse.{name}") for name in names}
        tensors = {name: tensor.detach() for name, tensor in found.items() if tensor is not None}
        if len(tensors) < len(names):
            # Without rows either, the checkpoint leaves the whole index out; torch says what is missing.
            has_rows = f"{prefix}ids" in state_dict
            return ["ids: the checkpoint holds rows without their centroids"] if has_rows else []
        next_id = tensors.pop("next_id")
        faults = self.coarse._faults(tensors, next_id, assigns(local_metadata))
        n = len(tensors["ids"]) if not faults else 0
        if n not in (0, self.nlist):
            faults.append(f"ids: got {n} centroids, expected {self.nlist}")
        elif n and not torch.equal(tensors["ids"].cpu(), torch.arange(n, device="cpu")):
            faults.append(f"ids: got other ids of centroids, expected 0 to {n - 1} in this order")
        return faults

    def _faults(self, rows: dict[str, Tensor], next_id: Tensor, assign: bool) -> list[str]:
        faults = super()._faults(rows, next_id, assign)
        lists = rows["assignments"]
        if not faults and lists.numel():
            low, high = (int(extreme) for extreme in torch.aminmax(lists))
            if low < 0 or high >= self.nlist:
                faults.append(f"assignments: got {low} to {high}, expected 0 <= list < {self.nlist}")
        return faults
