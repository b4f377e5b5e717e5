"""Tensors with one row per stored vector, as module state: growth, copies, moves."""

import copy
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from elips_torch.indexes.storage import append_rows, durable, owned


class RowTensors(nn.Module):
    """A module whose tensors have one row per stored vector and grow.

    Each row tensor is a buffer, or a parameter where it is learnable, of exactly as many rows as
    there are vectors. Spare memory for growth lies behind it and never reaches a checkpoint, a copy
    or a pickle.
    """

    # Names of the tensors with one row per vector.
    row_tensors: ClassVar[tuple[str, ...]] = ()
    # The attribute whose dictionary has those that are no parameters.
    _holder: ClassVar[str] = "_buffers"

    @property
    def held_tensors(self) -> tuple[str, ...]:
        """Names of the buffers and parameters that hold the row tensors."""
        return self.row_tensors

    def __init__(self) -> None:
        super().__init__()
        self._reserves: dict[str, Tensor] = {}

    @property
    def _held(self) -> dict[str, Tensor | None]:
        held: dict[str, Tensor | None] = self.__dict__[self._holder]
        return held

    def stored_tensors(self) -> list[Tensor]:
        """Return all parameters and buffers, and what is stored beside these."""
        tensors = [*self.parameters(), *self.buffers()]
        for module in self.modules():
            if isinstance(module, RowTensors) and module._held is not module._buffers:
                tensors += [tensor for tensor in module._held.values() if tensor is not None]
        return tensors

    def _attach(self) -> None:
        """Make what belongs to this object alone and is not copied along."""
        with durable():
            for name, tensor in self._held.items():
                if tensor is not None and tensor.is_inference():
                    self._held[name] = tensor.clone()
        self._reserves = {}

    def _assign_rows(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name in self._parameters:
                old = self._parameters[name]
                trained = old is not None and old.requires_grad
                # A new parameter, not new data in the old one: a graph that is still to run
                # backward holds the old one with its shape.
                self._parameters[name] = nn.Parameter(tensor, requires_grad=trained)
            else:
                self._held[name] = tensor
        self._rows_changed()

    def _rows_changed(self) -> None:
        """Called after row tensors were replaced."""

    def _row_tensors(self) -> tuple[Tensor, ...]:
        """Return all row tensors."""
        return tensors_of(self, self.held_tensors)

    def _append_rows(self, rows: dict[str, Tensor]) -> None:
        """Append to every row tensor, all or none."""
        grown, reserves = {}, {}
        with durable():
            for name, new in rows.items():
                old = getattr(self, name).detach()
                if name in self._parameters:
                    grown[name] = torch.cat([old, new.to(old.dtype)])
                else:
                    grown[name], reserves[name] = append_rows(old, self._reserves.get(name), new)
            self._reserves.update(reserves)
            self._assign_rows(grown)

    def _overwrite_rows(self, where: Tensor, rows: dict[str, Tensor]) -> None:
        """Replace rows ``where (M,)`` of some row tensors."""
        with durable():
            for name, new in rows.items():
                old = getattr(self, name)
                if old.is_inference():
                    # Nothing can be written into it here.
                    self._assign_rows({name: old.clone()})
                    old = getattr(self, name)
                old.index_copy_(0, where, new.to(old.dtype))

    def _keep_rows(self, keep: Tensor) -> None:
        """Drop every row where ``keep (N,)`` is False; the others stay in order."""
        with durable():
            self._assign_rows(self._kept(keep))
            self._reserves.clear()

    def _kept(self, keep: Tensor) -> dict[str, Tensor]:
        """Return what is held of the rows where ``keep (N,)`` is True."""
        return {name: getattr(self, name).detach()[keep] for name in self.held_tensors}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        with durable():
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._reserves = {
            n: r for n, r in self._reserves.items() if r.data_ptr() == getattr(self, n).data_ptr()
        }
        self._rows_changed()
        return self

    def share_memory(self) -> Self:
        """Move the tensors to shared memory, without the spare memory behind them."""
        for module in self.modules():
            if isinstance(module, RowTensors):
                module._drop_reserves()
        return super().share_memory()

    def _drop_reserves(self) -> None:
        self._reserves.clear()
        self._assign_rows(
            {name: owned(getattr(self, name)) for name in self.held_tensors if name in self._held}
        )

    def __copy__(self) -> Self:
        # Two indexes cannot share rows that either may change.
        return copy.deepcopy(self)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_reserves", None)
        state[self._holder] = {
            name: owned(tensor) if tensor is not None and name in self.held_tensors else tensor
            for name, tensor in self._held.items()
        }
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._attach()


def tensors_of(module: nn.Module, names: Iterable[str]) -> tuple[Tensor, ...]:
    """Return buffers and parameters by name, in a fraction of the time that a module takes for each."""
    buffers, parameters = module._buffers, module._parameters
    found = [buffers[name] if name in buffers else parameters[name] for name in names]
    return tuple([tensor for tensor in found if tensor is not None])
