"""Filling an index with what an encoder makes of a data loader."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from elips_torch.core.errors import ArgumentError, DtypeError, NotFittedError
from elips_torch.core.progress import with_progress
from elips_torch.core.validation import check_flag
from elips_torch.indexes.base import Index
from elips_torch.training.memory_bank import MemoryBank


def fill(
    index: Index,
    encoder: Callable[[Any], Tensor],
    loader: Iterable[Any],
    *,
    batch_to_inputs: Callable[[Any], Any] | None = None,
    batch_to_ids: Callable[[Any], Tensor] | None = None,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    progress: bool = False,
) -> Tensor:
    """Embed every batch of a loader and add the embeddings to an index: all, or on failure none.

    The encoder runs without gradients and, if it is a module, in eval mode; afterwards each of its
    parts is in the mode it was in. Only one batch of embeddings is held at a time.

    Args:
        index: where the embeddings go; what it holds stays, but for what leaves a full `MemoryBank`.
            One that learns must have been fitted.
        encoder: makes ``(B, D)`` of inputs.
        loader: yields batches.
        batch_to_inputs: takes out of a batch what the encoder is called with. Default: the first entry
            of a tuple or list, any other batch as it is.
        batch_to_ids: takes out of a batch the ids ``(B,)``. Default: ascending ids, see `Index.add`.
        device: where inputs are moved. Default: where the encoder's first parameter is, or, without
            one, the index.
        autocast: dtype such as ``torch.bfloat16`` to run the encoder in under `torch.autocast`. Default:
            as the caller has it.
        progress: show a progress bar.

    Returns:
        ``(N,)`` int64, the ids, in the order of the loader.

    Raises:
        ArgumentError: the loader yields no batch.
        NotFittedError: the index has not been fitted; nothing is embedded.
        ElipsError: embeddings or ids do not fit the index.

    >>> import torch
    >>> from elips_torch.indexes.flat import FlatIndex
    >>> index, encoder = FlatIndex(4), torch.nn.Linear(9, 4)
    >>> loader = torch.utils.data.DataLoader(torch.randn(10, 9), batch_size=4)
    >>> len(fill(index, encoder, loader)), len(index)
    (10, 10)
    """
    check_flag("progress", progress)
    if not isinstance(index, Index):
        raise DtypeError(f"index is a {type(index).__name__}, expected an Index")
    if not index.is_trained:
        raise NotFittedError(f"{type(index).__name__} must be fitted before it is filled; call fit(vectors)")
    place = _device_of(encoder, index) if device is None else torch.device(device)
    added: list[Tensor] = []
    with ExitStack() as stack:
        stack.enter_context(_all_or_nothing(index, added))
        stack.enter_context(_eval_mode(encoder))
        stack.enter_context(torch.no_grad())
        for batch in with_progress(loader, progress, "filling the index", "batch"):
            inputs = _inputs(batch) if batch_to_inputs is None else batch_to_inputs(batch)
            with torch.autocast(place.type, autocast, enabled=True) if autocast is not None else ExitStack():
                vectors = encoder(_moved(inputs, place))
            if not isinstance(vectors, Tensor):
                raise DtypeError(f"the encoder returned a {type(vectors).__name__}, expected a tensor (B, D)")
            ids = None if batch_to_ids is None else batch_to_ids(batch)
            added.append(index.add(vectors.to(index.device), ids=ids))
        if not added:
            raise ArgumentError("loader yields no batch, so nothing was added; is it empty or used up?")
    return torch.cat(added)


@contextmanager
def _all_or_nothing(index: Index, added: list[Tensor]) -> Iterator[None]:
    """Take back what was added if the block fails."""
    # A queue drops what is old, so all that it holds, which is never more than its capacity, is kept.
    banks = [(part, _whole_state(part)) for part in index.modules() if isinstance(part, MemoryBank)]
    done = False
    try:
        yield
        done = True
    finally:
        if not done and added:
            if not banks:
                index.remove(torch.cat(added))
            for bank, before in banks:
                with _in_state_dict(bank):
                    bank.load_state_dict(before)


def _whole_state(bank: MemoryBank) -> dict[str, Tensor]:
    with _in_state_dict(bank):
        return {name: tensor.clone() for name, tensor in bank.state_dict().items()}


@contextmanager
def _in_state_dict(bank: MemoryBank) -> Iterator[None]:
    """Have the state of a bank hold its rows for the block, also if checkpoints do not."""
    usual, bank.index_in_state_dict = bank.index_in_state_dict, True
    try:
        yield
    finally:
        bank.index_in_state_dict = usual


@contextmanager
def _eval_mode(encoder: object) -> Iterator[None]:
    """Put a module into eval mode for the block, and each of its parts back into its own."""
    modes = [(part, part.training) for part in encoder.modules()] if isinstance(encoder, nn.Module) else []
    for part, _ in modes:
        part.training = False
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _device_of(encoder: object, index: Index) -> torch.device:
    parameter = next(encoder.parameters(), None) if isinstance(encoder, nn.Module) else None
    return index.device if parameter is None else parameter.device


def _inputs(batch: Any) -> Any:
    if isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields"):
        if not len(batch):
            raise ArgumentError(
                "a batch is an empty list, expected inputs; batch_to_inputs says what they are"
            )
        return batch[0]
    return batch


def _moved(inputs: Any, device: torch.device) -> Any:
    """Return inputs with every tensor in them on a device."""
    if isinstance(inputs, Tensor):
        return inputs.to(device, non_blocking=True)
    if isinstance(inputs, Mapping):
        moved = {name: _moved(value, device) for name, value in inputs.items()}
        # What tokenizers return is a mapping of its own kind, which moves itself.
        return moved if type(inputs) is dict or not hasattr(inputs, "to") else inputs.to(device)
    if isinstance(inputs, (tuple, list)):
        entries = [_moved(value, device) for value in inputs]
        return type(inputs)(*entries) if hasattr(inputs, "_fields") else type(inputs)(entries)
    return inputs.to(device) if hasattr(inputs, "to") else inputs
