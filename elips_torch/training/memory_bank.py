"""A queue of embeddings that is searched like an index."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from elips_torch.core.errors import ArgumentError, DtypeError, ElipsError, ShapeError
from elips_torch.core.tiling import DEFAULT_WORKSPACE_BYTES
from elips_torch.core.validation import as_ids, check_count, check_device, check_flag
from elips_torch.indexes.flat import FlatIndex
from elips_torch.indexes.storage import durable
from elips_torch.indexes.untraced import untraced
from elips_torch.training.gather import gather_batch


class MemoryBank(FlatIndex):
    """The latest embeddings, first in, first out, as an index that is searched exactly.

    Cross-batch memory and contrast against a queue (`XBM <https://arxiv.org/abs/1912.06798>`_,
    `MoCo <https://arxiv.org/abs/1911.05722>`_), and, by `update`, a bank with one slowly moving row
    per sample (`instance discrimination <https://arxiv.org/abs/1805.01978>`_). Everything that
    `FlatIndex` does works here, masks and exclusions included; the oldest vectors leave when there
    are more than ``capacity``. A bank is part of checkpoints, with ids, labels and ages: training
    resumes exactly.

    Under DDP `enqueue` and `update` take the batches of all processes, in the order of their ranks:
    every process must call them, and all hold the same bank. The other verbs that change an index act
    on the process that calls them. Call `elips_torch.prepare_for_ddp` on the model, as for any index.

    A search keeps its gradients when the bank changes before the backward pass: they go by the vectors
    as they were searched. Memory for twice the capacity is set aside at the first `enqueue`.

    Args:
        dim: D, size of a vector.
        capacity: largest number of vectors.
        metric: name of the distance kind, or an alias.
        k: number of neighbours that `search` returns by default.
        dtype: how vectors are stored: float32, float16, bfloat16 or float64.
        screen: as for `FlatIndex`.
        all_processes: whether `enqueue` and `update` take the batches of all processes when
            `torch.distributed` is initialised.
        p: exponent of metric "lp".
        device: where the bank lies.
        index_in_state_dict: whether checkpoints hold the bank.
        check_finite: whether vectors and queries are checked for NaN and infinity.
        workspace_bytes: limit on temporary memory of a search, in bytes. Default 256 MiB.

    Attributes:
        labels: ``(ntotal,)`` int64, the label of each vector, -1 for none; in the order of ``ids``,
            the oldest first.
        step: number of calls of `enqueue` so far.

    Raises:
        ElipsError: an argument has a wrong type or value.

    >>> import torch
    >>> bank = MemoryBank(dim=2, capacity=3)
    >>> bank.enqueue(torch.eye(2), labels=torch.tensor([7, 8]))
    tensor([0, 1])
    >>> bank.enqueue(-torch.eye(2), labels=torch.tensor([9, 7]))
    tensor([2, 3])
    >>> bank.ids, bank.labels, bank.ages
    (tensor([1, 2, 3]), tensor([8, 9, 7]), tensor([1, 0, 0]))
    >>> queries, own = torch.tensor([[0.0, -1.0]]), torch.tensor([[7]])
    >>> bank.search(queries, k=1, mask=bank.labels != own).ids
    tensor([[2]])
    """

    row_tensors: ClassVar[tuple[str, ...]] = ("vectors", "labels", "stamps", "ids")
    tuned_parameters: ClassVar[tuple[str, ...]] = ("step",)
    drops_rows: ClassVar[bool] = True

    labels: Tensor
    stamps: Tensor

    def __init__(
        self,
        dim: int,
        capacity: int,
        metric: str = "cosine",
        *,
        k: int = 10,
        dtype: torch.dtype = torch.float32,
        screen: str = "auto",
        all_processes: bool = True,
        p: float | None = None,
        device: torch.device | str | None = None,
        index_in_state_dict: bool = True,
        check_finite: bool = True,
        workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    ) -> None:
        super().__init__(
            dim,
            metric,
            k=k,
            dtype=dtype,
            screen=screen,
            p=p,
            device=device,
            index_in_state_dict=index_in_state_dict,
            check_finite=check_finite,
            workspace_bytes=workspace_bytes,
        )
        self.capacity = check_count("capacity", capacity)
        self.all_processes = check_flag("all_processes", all_processes)
        self.step = 0
        with durable():
            for name in ("labels", "stamps"):
                self.register_buffer(name, torch.empty(0, dtype=torch.int64, device=device))

    @property
    def ages(self) -> Tensor:
        """``(ntotal,)`` int64: how many calls of `enqueue` ago each vector was last written."""
        return self.step - self.stamps

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return f"{super().extra_repr()}, capacity={self.capacity}"

    def config(self) -> dict[str, Any]:
        """Return the constructor keywords that make an empty bank like this one, for JSON."""
        config = {name: value for name, value in super().config().items() if name != "learnable"}
        return {**config, "capacity": self.capacity, "all_processes": self.all_processes}

    @untraced
    def enqueue(self, vectors: Tensor, labels: Tensor | None = None) -> Tensor:
        """Add a batch, and drop what is oldest beyond the capacity.

        Under DDP the batches of all processes are added, that of rank 0 first; they may differ in
        size, and may be empty.

        Args:
            vectors: ``(B, D)`` float32, float16, bfloat16 or float64, on the bank's device; stored
                without gradient history.
            labels: ``(B,)`` int64, -1 for none. Default: none.

        Returns:
            ``(B,)`` int64, the ids of this process's vectors. If there are more than ``capacity`` of
            them, the first are gone already.

        Raises:
            ElipsError: vectors or labels of wrong type, shape, device or value, on any process.
        """
        fault, batch = None, None
        try:
            rows = self._check_new(vectors)
            batch = (rows, self._checked_labels(labels, len(rows)))
        except ElipsError as error:
            fault = error
        (rows, row_labels), own = self._of_all(batch, fault)
        if not len(rows):
            return self.ids.new_empty(0)
        ids = self._new_ids(len(rows), None)
        encoded = {"vectors": rows, "labels": row_labels, "stamps": torch.full_like(ids, self.step + 1)}
        self._append(encoded, ids, automatic=True)
        self.step += 1
        return ids[own]

    @untraced
    def update(self, ids: Tensor, vectors: Tensor, momentum: float = 0.5) -> None:
        """Move vectors towards new ones: ``momentum * old + (1 - momentum) * new``.

        Under "cosine" both are brought to length one before, and the result after. Ids, labels and
        the order in which vectors leave stay; ages start again at 0. Under DDP the updates of all
        processes are made. An id that occurs several times takes the last vector, by rank.

        Args:
            ids: ``(B,)`` ids that the bank holds.
            vectors: ``(B, D)``, as for `enqueue`.
            momentum: share of the old vector, from 0 (replace) to 1 (keep).

        Raises:
            UnknownIdError: an id that the bank does not hold, on any process.
            ElipsError: an argument of wrong type, shape, device or value, on any process.
        """
        fault, batch = None, None
        try:
            if not 0.0 <= momentum <= 1.0:
                raise ArgumentError(f"momentum is {momentum}, expected 0 <= momentum <= 1")
            rows, wanted = self._check_new(vectors), as_ids("ids", ids, self.device)
            if len(wanted) != len(rows):
                raise ShapeError(f"ids has {len(wanted)} entries, expected {len(rows)}, one per vector")
            self._known_rows(wanted)
            batch = (rows, wanted)
        except ElipsError as error:
            fault = error
        (rows, wanted), _ = self._of_all(batch, fault)
        if not len(rows):
            return
        place = torch.full_like(self.ids, -1)
        order = torch.arange(len(rows), device=self.device)
        place.scatter_reduce_(0, self._known_rows(wanted), order, "amax")
        where = (place >= 0).nonzero()[:, 0]
        moved = self._mixed(self._decode(where), rows[place[where]], momentum)
        self._overwrite_rows(where, {"vectors": moved, "stamps": torch.full_like(where, self.step)})

    def _mixed(self, old: Tensor, new: Tensor, momentum: float) -> Tensor:
        """Return the vectors ``(B, D)`` between old and new ones."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        old, new = old.to(wide), new.to(wide)
        if self.metric != "cosine":
            return (momentum * old + (1.0 - momentum) * new).to(self.dtype)
        mixed = momentum * functional.normalize(old, dim=1) + (1.0 - momentum) * functional.normalize(
            new, dim=1
        )
        return functional.normalize(mixed, dim=1).to(self.dtype)

    def _of_all(
        self, batch: tuple[Tensor, Tensor] | None, fault: ElipsError | None
    ) -> tuple[tuple[Tensor, ...], slice]:
        if self.all_processes:
            return gather_batch(batch, fault, self.device)
        if batch is None or fault is not None:
            raise fault or ArgumentError("no batch was given")
        return batch, slice(0, len(batch[0]))

    def _checked_labels(self, labels: Tensor | None, n: int) -> Tensor:
        if labels is None:
            return torch.full((n,), -1, dtype=torch.int64, device=self.device)
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
            got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise DtypeError(f"labels is {got}, expected an int64 tensor")
        if tuple(labels.shape) != (n,):
            raise ShapeError(f"labels has shape {tuple(labels.shape)}, expected ({n},), one per vector")
        check_device("labels", labels, self.device, "the bank")
        if n and int(labels.min()) < -1:
            raise ArgumentError(f"labels has {int(labels.min())}, expected labels >= 0, or -1 for none")
        return labels

    # How rows are kept: they move along memory for twice the capacity.

    def _encode(self, vectors: Tensor) -> dict[str, Tensor]:
        n = len(vectors)
        labels = torch.full((n,), -1, dtype=torch.int64, device=self.device)
        stamps = torch.full((n,), self.step, dtype=torch.int64, device=self.device)
        return {**super()._encode(vectors), "labels": labels, "stamps": stamps}

    def _append(self, encoded: dict[str, Tensor], ids: Tensor, *, automatic: bool) -> Tensor:
        surplus = len(ids) - self.capacity
        if surplus <= 0:
            return super()._append(encoded, ids, automatic=automatic)
        # What would leave at once need not come.
        largest = int(ids.max())
        kept = {name: rows[surplus:] for name, rows in encoded.items()}
        super()._append(kept, ids[surplus:], automatic=automatic)
        self._next_id = max(self._next_id, largest + 1)
        return ids

    def _append_rows(self, rows: dict[str, Tensor]) -> None:
        n_new = len(rows["ids"])
        stay = min(self.ntotal, self.capacity - n_new)
        keep = torch.arange(self.ntotal, device=self.device) >= self.ntotal - stay
        known = self.plane.knows(self.vectors)
        evicts, moves = stay < self.ntotal, False
        grown, reserves = {}, {}
        with durable():
            for name, new in rows.items():
                grown[name], reserves[name], moved = self._slide(name, new, stay)
                moves |= moved
            self._reserves.update(reserves)
            self._assign_rows(grown)
        if evicts and not self._id_map.ascending:
            self._id_map.rebuild(self.ids)
        if evicts and moves:
            # Now and then the plane is made anew, for embeddings that drift as a model learns.
            self.plane.forget()
            return
        if evicts:
            self._follow_vectors(known, self.plane.keep, keep)
        self._follow_vectors(known, self.plane.append, rows["vectors"])

    def _slide(self, name: str, new: Tensor, stay: int) -> tuple[Tensor, Tensor, bool]:
        """Return a row tensor of its last ``stay`` rows and new ones, its memory, and whether that is new."""
        old, reserve = getattr(self, name), self._reserves.get(name)
        kept = old[len(old) - stay :]
        moves = reserve is None or not _lies_in(old, reserve)
        first = 0
        if reserve is not None and not moves:
            row_bytes = max(1, reserve[:1].nbytes)
            first = (old.data_ptr() - reserve.data_ptr()) // row_bytes + len(old) - stay
            moves = first + stay + len(new) > len(reserve)
        if reserve is None or moves:
            # Never back to the start of the same memory: a graph may hold the rows that lay there.
            reserve, first = old.new_empty(2 * self.capacity, *old.shape[1:]), 0
            reserve[:stay] = kept
        # Through `data`, so that autograd does not take the rows before for changed.
        reserve.data[first + stay : first + stay + len(new)] = new
        return reserve[first : first + stay + len(new)], reserve, moves

    def _overwrite_rows(self, where: Tensor, rows: dict[str, Tensor]) -> None:
        # `upsert` knows no labels; those of the vectors it replaces stay.
        super()._overwrite_rows(where, {name: new for name, new in rows.items() if name != "labels"})

    def _faults(self, rows: dict[str, Tensor], next_id: Tensor, assign: bool) -> list[str]:
        faults = super()._faults(rows, next_id, assign)
        if not faults and len(rows["ids"]) > self.capacity:
            faults.append(f"ids: got {len(rows['ids'])} rows, expected at most the capacity {self.capacity}")
        return faults


def _lies_in(tensor: Tensor, reserve: Tensor) -> bool:
    same_kind = reserve.dtype == tensor.dtype and reserve.device == tensor.device
    return same_kind and tensor.untyped_storage().data_ptr() == reserve.untyped_storage().data_ptr()
