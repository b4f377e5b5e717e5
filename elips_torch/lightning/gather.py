"""What the processes of a run tell each other."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from elips_torch.core.errors import ProcessError


@dataclasses.dataclass(frozen=True)
class _Failure:
    """What a process sends when it can send nothing else any more."""

    what: str
    error: str


class Processes:
    """The processes of a run, or of a group of them; every method must be called by all of them.

    Args:
        device: where a process group of an accelerator exchanges tensors.
        group: the process group; default is that of the whole run, if there is one.

    Attributes:
        count: number of processes, 1 without a process group.
        rank: number of this one.
        device: where tensors are exchanged.

    >>> processes = Processes(torch.device("cpu"))
    >>> processes.count, processes.rank, processes.objects("seen")
    (1, 0, ['seen'])
    """

    def __init__(self, device: torch.device, group: Any = None) -> None:
        self._group = group
        running = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.count = torch.distributed.get_world_size(group) if running else 1
        self.rank = torch.distributed.get_rank(group) if running else 0
        # Gloo knows few of its verbs on accelerators.
        on_host = running and torch.distributed.get_backend(group) == "gloo"
        self.device = torch.device("cpu") if on_host else device

    def objects(self, value: Any) -> list[Any]:
        """Return what each process passed, by rank.

        Raises:
            ProcessError: another process failed within `agreeing`.
        """
        values = self._exchanged(value)
        for rank, each in enumerate(values):
            if isinstance(each, _Failure):
                raise ProcessError(f"process {rank} failed {each.what}: {each.error}")
        return values

    @contextmanager
    def agreeing(self, what: str) -> Iterator[None]:
        """Let all processes fail where one does, rather than wait for it; all of them enter and leave it.

        Who fails says so in place of the next exchange, and the others learn of it there.

        Args:
            what: what is done within, for the message; such as "while embedding the corpus".

        Raises:
            ProcessError: another process failed.
        """
        try:
            yield
        except ProcessError:
            raise
        except Exception as error:
            self._exchanged(_Failure(what, f"{type(error).__name__}: {error}"))
            raise
        self.objects(None)

    def _exchanged(self, value: Any) -> list[Any]:
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value, group=self._group)
        return values

    def rows(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes, by rank.

        Args:
            rows: ``(N, ...)``; N may differ between processes, the rest may not.

        Returns:
            ``(sum of N, ...)`` on the device of ``rows``.
        """
        sizes = self.objects(len(rows))
        if self.count == 1:
            return rows
        padded = self._padded(rows, max(sizes))
        parts = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(parts, padded, group=self._group)
        return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)]).to(rows.device)

    def rows_on(self, rank: int, rows: Tensor, sizes: list[int]) -> list[Tensor] | None:
        """Return on one process the rows of each, by rank; None on the others.

        Args:
            rank: the process that receives.
            rows: ``(N, ...)``.
            sizes: N of each process.
        """
        if self.count == 1:
            return [rows]
        padded = self._padded(rows, max(sizes))
        parts = [torch.empty_like(padded) for _ in sizes] if rank == self.rank else None
        torch.distributed.gather(padded, parts, group=self._group, group_dst=rank)
        if parts is None:
            return None
        return [part[:n].to(rows.device) for part, n in zip(parts, sizes, strict=True)]

    def sent(self, rank: int, rows: Tensor | None, like: Tensor, n: int) -> Tensor:
        """Return the n rows of one process on all of them.

        Args:
            rank: the process that sends.
            rows: ``(n, ...)`` there; elsewhere it is not looked at.
            like: ``(any, ...)``, of the shape, dtype and device that are received.
            n: number of rows.
        """
        if self.rank == rank and rows is not None:
            buffer = rows.to(self.device).contiguous()
        else:
            buffer = torch.empty(n, *like.shape[1:], dtype=like.dtype, device=self.device)
        torch.distributed.broadcast(buffer, group=self._group, group_src=rank)
        return buffer.to(like.device)

    def _padded(self, rows: Tensor, n: int) -> Tensor:
        """Return rows that are n on every process: collectives take one shape."""
        padded = torch.zeros(n, *rows.shape[1:], dtype=rows.dtype, device=self.device)
        padded[: len(rows)] = rows
        return padded
