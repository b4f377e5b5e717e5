"""One batch of all processes on every process."""

import torch
import torch.distributed
from torch import Tensor

from elips_torch.core.errors import ArgumentError, ElipsError


def is_distributed() -> bool:
    """Whether a default process group is there."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def exchange_device(device: torch.device) -> torch.device:
    """Return where the process group exchanges tensors of a device: there, or where they must be taken.

    Gloo, which knows few of its verbs on accelerators, exchanges on the CPU, NCCL on the current GPU.
    """
    # Such as "cpu:gloo,cuda:nccl", "cuda:nccl", or "cpu:gloo,cuda:gloo" for gloo alone.
    backends = dict(pair.split(":") for pair in torch.distributed.get_backend_config().split(","))
    usable = [kind for kind, backend in backends.items() if kind == "cpu" or backend != "gloo"]
    if device.type in usable:
        return device
    return torch.device("cpu" if "cpu" in usable else usable[0])


def gather_batch(
    columns: tuple[Tensor, ...] | None, fault: ElipsError | None, device: torch.device
) -> tuple[tuple[Tensor, ...], slice]:
    """Return the rows of all processes in the order of their ranks; every process must call this.

    Args:
        columns: tensors ``(B, ...)``; B may differ between processes, the rest of the shape may not.
        fault: what is wrong with this process's batch, which then fails on all of them: no process
            is left waiting for one that has raised.
        device: where the columns are, on every process a device of the same kind.

    Returns:
        The tensors ``(sum of B, ...)``, and where this process's own rows stand in them.

    Raises:
        ElipsError: the fault, or that another process has one.
    """
    if not is_distributed():
        if columns is None or fault is not None:
            raise fault or ArgumentError("no batch was given")
        return columns, slice(0, len(columns[0]))
    place = exchange_device(device)
    sizes = _gather_sizes(-1 if columns is None or fault is not None else len(columns[0]), place)
    if fault is not None:
        raise fault
    bad = [rank for rank, size in enumerate(sizes) if size < 0]
    if columns is None or bad:
        raise ArgumentError(f"the batch of rank {bad[0]} was refused there, so no process takes this step")
    gathered = tuple(_gather_rows(column, sizes, place) for column in columns)
    first = sum(sizes[: torch.distributed.get_rank()])
    return gathered, slice(first, first + len(columns[0]))


def _gather_sizes(size: int, device: torch.device) -> list[int]:
    own = torch.tensor([size], device=device)
    parts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, own)
    return [int(part) for part in parts]


def _gather_rows(rows: Tensor, sizes: list[int], place: torch.device) -> Tensor:
    # Collectives take one shape on all ranks.
    padded = torch.zeros(max(sizes), *rows.shape[1:], dtype=rows.dtype, device=place)
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).to(rows.device)
