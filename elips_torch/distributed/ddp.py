"""Indexes inside a model that DistributedDataParallel wraps."""

from typing import TypeVar

from torch import nn

from elips_torch.indexes.state import RowState

M = TypeVar("M", bound=nn.Module)


def prepare_for_ddp(model: M) -> M:
    """Keep DistributedDataParallel from broadcasting the databases of a model's indexes.

    DDP sends every buffer of rank 0 to all ranks at each step, which would copy the whole database
    over the network and overwrite what the other ranks hold. Call this once, before the model is
    wrapped, on the very module that is wrapped; under Lightning that is the LightningModule, for
    example at the end of its ``__init__``. A learnable database stays with DDP, so that its
    gradients are reduced; its size must then not change after wrapping.

    Args:
        model: the module that will be given to ``DistributedDataParallel``.

    Returns:
        The same module.
    """
    # The attribute by which DDP is told; see torch.nn.parallel.DistributedDataParallel.
    ignored = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    for prefix, module in model.named_modules():
        if isinstance(module, RowState):
            ignored.update(f"{prefix}.{name}".lstrip(".") for name, _ in module.named_buffers())
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(ignored))
    return model
