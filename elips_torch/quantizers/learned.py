"""Modules whose buffers get their sizes from `fit` or from a checkpoint."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from elips_torch.core.execution import plain_arithmetic
from elips_torch.core.validation import FLOAT_DTYPES, check_usable


class Learned(nn.Module):
    """A module with float32 buffers that are empty until they are learned or loaded.

    A subclass names them; all are filled together, so the module is trained as soon as the first is.
    `half` and its kin leave them as they are: what they say of a vector stays the same.
    """

    learned_buffers: ClassVar[tuple[str, ...]] = ()

    def __init__(self, device: torch.device | str | None = None) -> None:
        super().__init__()
        check_usable("device", device)
        with learning(torch.device("cpu")):
            for name in self.learned_buffers:
                self.register_buffer(name, torch.empty(0, dtype=torch.float32, device=device))

    @property
    def is_trained(self) -> bool:
        """Whether `fit` has run or a trained state was loaded."""
        first: Tensor = getattr(self, self.learned_buffers[0])
        return first.numel() > 0

    def _expected_shapes(self) -> dict[str, tuple[int | None, ...]]:
        """Return the shape of each buffer once trained; None where any size will do."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: self._buffers[name] for name in self.learned_buffers}
        with learning(torch.device("cpu")):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            for name, old in before.items():
                new = self._buffers[name]
                if old is not None and new is not None and new.dtype != old.dtype:
                    self._buffers[name] = old.to(new.device)
        return self

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
        loaded = {name: state_dict.get(prefix + name) for name in self.learned_buffers}
        faults = self._loaded_faults(state_dict, prefix)
        if faults:
            error_msgs += faults
            return
        with learning(torch.device("cpu")):
            for name, tensor in loaded.items():
                own = self._buffers[name]
                if tensor is not None and own is not None and own.shape != tensor.shape:
                    # Torch copies into buffers of the right size.
                    self._buffers[name] = torch.empty(tensor.shape, dtype=own.dtype, device=own.device)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        with learning(torch.device("cpu")):
            for name in loaded:
                # Loading with assign takes tensors as they are.
                buffer = self._buffers[name]
                if buffer is not None:
                    self._buffers[name] = buffer.float().contiguous()

    def _loaded_faults(self, state_dict: dict[str, Any], prefix: str) -> list[str]:
        """Return what keeps buffers of a checkpoint from being the state of this module."""
        found = {
            name: state_dict[prefix + name] for name in self.learned_buffers if prefix + name in state_dict
        }
        faults = [
            f"{prefix}{name}: {fault}"
            for name, tensor in found.items()
            for fault in self._faults(name, tensor)
        ]
        if len({tensor.numel() > 0 for tensor in found.values()}) > 1:
            faults.append(f"{prefix}: some of {', '.join(self.learned_buffers)} are trained, others not")
        return faults

    def _faults(self, name: str, tensor: Tensor) -> list[str]:
        faults = []
        shape = self._expected_shapes()[name]
        fits = tensor.ndim == len(shape) and all(
            wanted in (None, size) for wanted, size in zip(shape, tensor.shape, strict=True)
        )
        if tensor.numel() and not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            faults.append(f"got shape {tuple(tensor.shape)}, expected ({wanted})")
        if tensor.dtype not in FLOAT_DTYPES:
            faults.append(f"got dtype {tensor.dtype}, expected floating point")
        return faults


def in_float32(vectors: Tensor) -> Tensor:
    """Return vectors without their history, float64 rounded: what float32 cannot hold becomes infinite."""
    vectors = vectors.detach()
    return vectors.float() if vectors.dtype == torch.float64 else vectors


@contextmanager
def learning(device: torch.device) -> Iterator[None]:
    """Compute what is learned free of the caller's modes: gradients, inference mode, autocast.

    What is learned outlives the mode: a module fitted during validation is trained through.
    """
    with torch.inference_mode(False), plain_arithmetic(device):
        yield
