"""Rows of all processes on every process."""

from typing import Any

import torch
import torch.distributed
from torch import Tensor


def gather_objects(value: Any) -> list[Any]:
    """Return what each process passed, by rank; must be called by all processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def gather_rows(rows: Tensor, device: torch.device) -> Tensor:
    """Return the rows of all processes, by rank; must be called by all processes.

    Args:
        rows: ``(N, ...)``; N may differ between processes.
        device: where the process group exchanges tensors.

    Returns:
        ``(sum of N, ...)`` on the device of ``rows``.
    """
    sizes = gather_objects(len(rows))
    if len(sizes) == 1:
        return rows
    # Collectives take one shape on all ranks.
    padded = torch.zeros(max(sizes), *rows.shape[1:], dtype=rows.dtype, device=device)
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)]).to(rows.device)
