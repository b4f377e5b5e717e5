"""One batch of all processes on every process."""

import torch
import torch.distributed
from torch import Tensor

from elips_torch.core.errors import ArgumentError, ElipsError


def is_distributed() -> bool:
    """Whether a default process group is there."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def gather_batch(
    columns: tuple[Tensor, ...] | None, fault: ElipsError | None, device: torch.device
) -> tuple[tuple[Tensor, ...], slice]:
    """Return the rows of all processes in the order of their ranks; every process must call this.

    Args:
        columns: tensors ``(B, ...)``; B may differ between processes, the rest of the shape may not.
        fault: what is wrong with this process's batch, which then fails on all of them: no process
            is left waiting for one that has raised.
        device: where the process group exchanges tensors.

    Returns:
        The tensors ``(sum of B, ...)``, and where this process's own rows stand in them.

    Raises:
        ElipsError: the fault, or that another process has one.
    """
    if not is_distributed():
        if columns is None or fault is not None:
            raise fault or ArgumentError("no batch was given")
        return columns, slice(0, len(columns[0]))
    sizes = _gather_sizes(-1 if columns is None or fault is not None else len(columns[0]), device)
    if fault is not None:
        raise fault
    bad = [rank for rank, size in enumerate(sizes) if size < 0]
    if columns is None or bad:
        raise ArgumentError(f"the batch of rank {bad[0]} was refused there, so no process takes this step")
    gathered = tuple(_gather_rows(column, sizes) for column in columns)
    first = sum(sizes[: torch.distributed.get_rank()])
    return gathered, slice(first, first + len(columns[0]))


def _gather_sizes(size: int, device: torch.device) -> list[int]:
    own = torch.tensor([size], device=device)
    parts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, own)
    return [int(part) for part in parts]


def _gather_rows(rows: Tensor, sizes: list[int]) -> Tensor:
    # Collectives take one shape on all ranks.
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
