"""Calling the functions by which users turn a batch into embeddings."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from lightning.pytorch import LightningModule
from torch import Tensor

from elips_torch.core.errors import ImplementationError

# Called with the module and the batch, and with the dataloader's number if it takes that too.
Step: TypeAlias = Callable[..., Mapping[str, Tensor]]


def call_step(step: Step | None, module: LightningModule, batch: Any, dataloader_idx: int = 0) -> Any:
    """Return what ``step``, or else the module's ``retrieval_step``, makes of a batch.

    Args:
        step: called with the module, the batch and, if it takes a third argument, the number of the
            dataloader.
        module: its ``retrieval_step`` is called with the batch and perhaps that number.
        batch: on the module's device.
        dataloader_idx: number of the dataloader.

    Raises:
        ImplementationError: there is neither.
    """
    if step is not None:
        return _called(step, (module, batch), dataloader_idx)
    own = getattr(module, "retrieval_step", None)
    if not callable(own):
        raise ImplementationError(
            f"{type(module).__name__} has no retrieval_step: define retrieval_step(batch), or pass step="
        )
    return _called(own, (batch,), dataloader_idx)


def has_step(step: Step | None, module: LightningModule) -> bool:
    """Whether `call_step` would find a function to call."""
    return step is not None or callable(getattr(module, "retrieval_step", None))


def _called(function: Callable[..., Any], arguments: tuple[Any, ...], dataloader_idx: int) -> Any:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    places = sum(parameter.kind in kinds for parameter in parameters)
    takes_any = any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters)
    if takes_any or places > len(arguments):
        return function(*arguments, dataloader_idx)
    return function(*arguments)
