"""Rows under ids as module state: checkpoints, and what finds a row by its id."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from elips_torch.core.errors import DuplicateIdError
from elips_torch.core.huge_pages import ask_for_huge_pages
from elips_torch.core.validation import FLOAT_DTYPES, check_flag, check_unique, check_usable
from elips_torch.indexes.id_map import IdMap
from elips_torch.indexes.row_tensors import RowTensors
from elips_torch.indexes.storage import durable, owned
from elips_torch.ops.index_search import register


class RowState(RowTensors):
    """Row tensors under ids, in checkpoints: what every index keeps.

    A checkpoint holds exactly ``ntotal`` rows; loading one resizes.
    """

    # Subclasses add theirs to "ids".
    row_tensors: ClassVar[tuple[str, ...]] = ("ids",)
    # Attributes, each one number, that go with the rows into checkpoints: search parameters that are tuned.
    tuned_parameters: ClassVar[tuple[str, ...]] = ()

    ids: Tensor

    def __init__(self, device: torch.device | str | None, index_in_state_dict: bool) -> None:
        super().__init__()
        check_usable("device", device)
        self.index_in_state_dict = check_flag("index_in_state_dict", index_in_state_dict)
        with durable():
            self.register_buffer("ids", torch.empty(0, dtype=torch.int64, device=device))
        self._next_id = 0
        self._attach()

    def _attach(self) -> None:
        super()._attach()
        self._id_map = IdMap(self.ids)
        self._handle = register(self)  # type: ignore[arg-type]

    @property
    def ntotal(self) -> int:
        """Number of stored vectors."""
        return self.ids.shape[0]

    def _current_id_map(self) -> IdMap:
        """Return the map of the ids as they are now."""
        if self._id_map.is_stale(self.ids):
            # Averaging of models and an unprepared DDP write into buffers behind the index's back.
            self._id_map.rebuild(self.ids)
            self._next_id = max(self._next_id, int(self.ids.max()) + 1) if self.ntotal else self._next_id
        return self._id_map

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.index_in_state_dict:
            for name in self.row_tensors:
                destination.pop(prefix + name, None)
            return
        for name in self.row_tensors:
            # Not all are held under their names. A view would drag the spare memory behind it into the file.
            rows = destination[prefix + name] if prefix + name in destination else getattr(self, name)
            destination[prefix + name] = owned(rows)
        # Ids that somebody else has written count, too.
        self._current_id_map()
        destination[prefix + "next_id"] = torch.tensor(self._next_id, dtype=torch.int64, device="cpu")
        for name in self.tuned_parameters:
            value = getattr(self, name)
            dtype = torch.int64 if isinstance(value, int) else torch.float64
            destination[prefix + name] = torch.tensor(value, dtype=dtype, device="cpu")

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
        hooks, self._load_state_dict_pre_hooks = self._load_state_dict_pre_hooks, OrderedDict()
        found: tuple[list[str], list[str]] = [], []
        try:
            for hook in hooks.values():
                hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
            expected = {prefix + name for name in (*self.row_tensors, "next_id", *self.tuned_parameters)}
            # Torch loads what else a subclass holds; it would refuse rows of another number.
            rest = {key: tensor for key, tensor in state_dict.items() if key not in expected}
            super()._load_from_state_dict(rest, prefix, local_metadata, strict, *found, error_msgs)
        finally:
            self._load_state_dict_pre_hooks = hooks
        unexpected_keys += found[1]
        missing = [key for key in found[0] if key not in expected]
        absent = sorted(expected - state_dict.keys())
        if len(absent) < len(expected) or self.index_in_state_dict:
            missing += absent
        missing_keys += missing
        if absent or (strict and (found[1] or missing)):
            return
        rows = {name: state_dict[prefix + name].detach() for name in self.row_tensors}
        tuned = {name: state_dict[prefix + name] for name in self.tuned_parameters}
        next_id, assign = state_dict[prefix + "next_id"], assigns(local_metadata)
        faults = self._faults(rows, next_id, assign)
        faults += [f"{name}: got {t}, expected one number" for name, t in tuned.items() if t.numel() != 1]
        if faults:
            error_msgs += [f"{prefix}{fault}" for fault in faults]
            return
        self._load_rows(rows, assign=assign)
        self._next_id = int(next_id)
        for name, tensor in tuned.items():
            setattr(self, name, tensor.item())

    def _faults(self, rows: dict[str, Tensor], next_id: Tensor, assign: bool) -> list[str]:
        """Return what keeps loaded rows from being the state of this index."""
        faults = []
        if self.ids.is_meta and not assign:
            faults.append("ids: the index is on the meta device, which holds no values; pass assign=True")
        if next_id.dtype != torch.int64 or next_id.numel() != 1 or int(next_id) < 0:
            faults.append(f"next_id: got {next_id}, expected one int64 number >= 0")
        for name, tensor in rows.items():
            like = self._like(name)
            wanted = like.shape[1:]
            if tensor.ndim != 1 + len(wanted) or tensor.shape[1:] != wanted:
                shape = ", ".join(("N", *map(str, wanted)))
                faults.append(f"{name}: got shape {tuple(tensor.shape)}, expected ({shape})")
            own = like.dtype
            if tensor.dtype != own and not {tensor.dtype, own} <= set(FLOAT_DTYPES):
                faults.append(f"{name}: got dtype {tensor.dtype}, expected {own}")
        lengths = {name: len(tensor) for name, tensor in rows.items() if tensor.ndim}
        if len(set(lengths.values())) > 1:
            faults.append(f"ids: the row tensors differ in length: {lengths}")
        if not faults:
            ids = rows["ids"]
            try:
                check_unique("ids", ids)
            except DuplicateIdError as error:
                faults.append(f"ids: {error}")
            if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= int(next_id)):
                span = f"{int(ids.min())} to {int(ids.max())}"
                faults.append(f"ids: got {span}, expected 0 <= id < {int(next_id)}")
        return faults

    def _like(self, name: str) -> Tensor:
        """Return a tensor of the dtype and the shape that rows of a row tensor have."""
        tensor: Tensor = getattr(self, name)
        return tensor

    def _load_rows(self, rows: dict[str, Tensor], *, assign: bool) -> None:
        with durable():
            resized = {}
            for name, tensor in rows.items():
                old = getattr(self, name)
                if assign:
                    resized[name] = owned(tensor)
                elif name in self._parameters and old.shape == tensor.shape:
                    # The optimiser knows this parameter.
                    old.data.copy_(tensor)
                else:
                    # As everywhere in torch, loading copies into the module's dtype and device.
                    resized[name] = torch.empty(tensor.shape, dtype=old.dtype, device=old.device)
                    ask_for_huge_pages(resized[name])
                    resized[name].copy_(tensor)
            self._assign_rows(resized)
            self._reserves.clear()
            self._id_map.rebuild(self.ids)

    def _keep_rows(self, keep: Tensor) -> None:
        super()._keep_rows(keep)
        self._id_map.rebuild(self.ids)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        rows = {name: getattr(self, name) for name in self.held_tensors}
        labels = {name: tensor for name, tensor in rows.items() if not tensor.is_floating_point()}
        del rows
        super()._apply(fn, recurse)
        for name, tensor in labels.items():
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype:
                # `Module.type` casts every tensor; a label or a code is no number to round.
                self._buffers[name] = tensor.to(moved.device)
        self._id_map.move(self.ids)
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        for name in ("_id_map", "_handle"):
            state.pop(name, None)
        return state


def assigns(local_metadata: dict[str, Any]) -> bool:
    """Whether a checkpoint is to be loaded by taking its tensors over."""
    return bool(local_metadata.get("assign_to_params_buffers", False))
