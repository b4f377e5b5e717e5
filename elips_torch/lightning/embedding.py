"""Embedding a whole corpus with a model: its batches dealt out to the processes, its rows in order."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from elips_torch.core.errors import ArgumentError, DtypeError, ShapeError
from elips_torch.core.validation import check_vectors
from elips_torch.lightning.gather import Processes
from elips_torch.lightning.steps import Step, call_step

_RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


@dataclasses.dataclass(frozen=True)
class Embedder:
    """What turns batches into rows, and who takes part.

    Args:
        module: embeds, by ``step`` or its own ``retrieval_step``.
        step: as for `call_step`; it may also return the embeddings alone.
        names: keys under which the step may return the embeddings, the first that is there counts.
        to_device: moves a batch to the module's device.
        context: makes the precision context of a step.
        processes: who takes part.
        progress: whether this process shows a progress bar, and its title.
        stopped: asked before each batch; True raises `CancelledError`.
    """

    module: LightningModule
    step: Step | None
    names: tuple[str, ...]
    to_device: Callable[[Any], Any]
    context: Callable[[], AbstractContextManager[Any]]
    processes: Processes
    progress: str | None = None
    stopped: Callable[[], bool] = bool

    def outputs(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Yield what the step returns for each batch that is this process's own.

        The caller puts the module into evaluation mode, for as long as it asks for more.
        """
        batches = own_batches(loader, self.processes.rank, self.processes.count)
        total = len(batches) if isinstance(batches, Sized) else None
        shown = self.progress is not None
        for batch in Tqdm(
            batches, desc=self.progress, total=total, disable=not shown, leave=False, unit="batch"
        ):
            if self.stopped():
                raise CancelledError("it is no longer wanted")
            with torch.no_grad(), self.context():
                output = call_step(self.step, self.module, self.to_device(batch))
            yield output

    def rounds(self, loader: Iterable[Any], *, shared: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield vectors ``(N, D)`` and ids ``(N,)``, a few batches at a time, in the order of the loader.

        Must be called by all processes, and to the end: each embeds every so manieth batch.

        Args:
            loader: batches, the same on all processes.
            shared: whether all processes get all rows, or each its own.
        """
        processes = self.processes
        outputs = self.outputs(loader)
        first = 0
        while True:
            rows = None
            for output in outputs:
                rows = embeddings_of(output, self.names)
                break
            everywhere = processes.objects(None if rows is None else (rows[0].shape, rows[0].dtype))
            known = [each for each in everywhere if each is not None]
            if not known:
                return
            sizes = [0 if each is None else each[0][0] for each in everywhere]
            if rows is None:
                (_, dim), dtype = known[0]
                rows = torch.empty(0, dim, dtype=dtype, device=self.module.device), None
            vectors, ids = rows
            if ids is None:
                start = first + sum(sizes[: processes.rank])
                ids = torch.arange(start, start + len(vectors), device=vectors.device)
            first += sum(sizes)
            if shared:
                vectors, ids = processes.rows(vectors), processes.rows(ids)
            yield vectors, ids


def embeddings_of(output: Any, names: tuple[str, ...]) -> tuple[Tensor, Tensor | None]:
    """Return the embeddings ``(B, D)`` that a step returned, and their ids if it did.

    Args:
        output: a tensor, or a dict with one of the names.
        names: in the order of preference.

    Raises:
        ElipsError: it is something else.
    """
    ids = None
    if isinstance(output, Mapping):
        found = [name for name in names if name in output]
        if not found:
            keys = ", ".join(map(repr, output)) or "nothing"
            raise ArgumentError(
                f"the retrieval step returned {keys}, expected {' or '.join(map(repr, names))}"
            )
        ids = output.get("ids")
        output = output[found[0]]
    check_vectors("the embeddings", output)
    vectors: Tensor = output.detach()
    if ids is None:
        return vectors, None
    return vectors, integers_of("ids", ids, vectors, 1)


def integers_of(name: str, integers: Any, vectors: Tensor, ndim: int) -> Tensor:
    """Return what belongs to ``(B, D)`` vectors as int64 ``(B,)``, or ``(B, R)`` where ndim is 2.

    Raises:
        ElipsError: it is something else.
    """
    if not isinstance(integers, Tensor) or integers.is_floating_point() or integers.dtype == torch.bool:
        got = integers.dtype if isinstance(integers, Tensor) else type(integers).__name__
        raise DtypeError(f"{name} is {got}, expected an int64 tensor")
    if ndim == 2 and integers.ndim == 1:
        integers = integers[:, None]
    if integers.ndim != ndim or len(integers) != len(vectors):
        expected = f"({len(vectors)}, R)" if ndim == 2 else f"({len(vectors)},)"
        raise ShapeError(f"{name} has shape {tuple(integers.shape)}, expected {expected}, a row per vector")
    moved: Tensor = integers.to(vectors.device, torch.int64)
    return moved


def embedder_for(
    trainer: Trainer,
    module: LightningModule,
    step: Step | None,
    names: tuple[str, ...],
    progress: str | None,
    *,
    group: Any = None,
    in_background: bool = False,
    stopped: Callable[[], bool] = bool,
) -> Embedder:
    """Return an embedder that treats batches and precision as the trainer does.

    Args:
        trainer: whose settings count.
        module: embeds.
        step: as for `Embedder`.
        names: as for `Embedder`.
        progress: as for `Embedder`.
        group: the process group that exchanges rows; default is that of the run.
        in_background: whether a thread of its own embeds; then nothing is touched that is not its own.
        stopped: as for `Embedder`.
    """
    plugin, device = trainer.precision_plugin, module.device
    context: Callable[[], AbstractContextManager[Any]] = plugin.val_step_context
    if in_background:
        # Other precisions set a default dtype, which is one for all threads.
        context = plugin.forward_context if isinstance(plugin, MixedPrecision) else nullcontext

    def to_device(batch: Any) -> Any:
        batch = plugin.convert_input(batch)
        if in_background:
            return move_data_to_device(batch, device)
        return trainer.strategy.batch_to_device(batch, device)

    return Embedder(module, step, names, to_device, context, Processes(device, group), progress, stopped)


def title_of(trainer: Trainer, progress: bool, title: str) -> str | None:
    """Return the title of a progress bar, None where none is to be shown."""
    bar = trainer.progress_bar_callback
    shown = progress and trainer.is_global_zero and bar is not None
    # Only the bars that can be switched off say whether they are.
    shown = shown and not getattr(bar, "is_disabled", False)
    return title if shown else None


def own_batches(loader: Iterable[Any], rank: int, count: int) -> Iterable[Any]:
    """Return every ``count``-th batch of a loader, from ``rank`` on.

    Of a `DataLoader` no other batch is loaded, and the global random numbers are left alone.

    Raises:
        ArgumentError: the loader shuffles, or yields a part of the data.
    """
    if not isinstance(loader, DataLoader):
        return loader if count == 1 else itertools.islice(loader, rank, None, count)
    for sampler in _samplers_of(loader):
        if isinstance(sampler, _RANDOM) or (isinstance(sampler, DistributedSampler) and sampler.shuffle):
            raise ArgumentError(
                f"the loader shuffles ({type(sampler).__name__}), expected one that keeps the order: "
                "shuffle=False"
            )
        if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
            raise ArgumentError(
                f"the loader yields one of {sampler.num_replicas} parts of the data "
                f"({type(sampler).__name__}), expected all of it: its batches are dealt out here"
            )
    if isinstance(loader.dataset, IterableDataset):
        return loader if count == 1 else itertools.islice(loader, rank, None, count)
    order: dict[str, Any]
    if loader.batch_sampler is None:
        order = {"sampler": _Dealt(loader.sampler, rank, count), "batch_size": None}
    else:
        order = {"batch_sampler": _Dealt(loader.batch_sampler, rank, count)}
    return DataLoader(
        loader.dataset,
        **order,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        # Without one, the workers' seed is drawn from the numbers that training draws from.
        generator=torch.Generator(),
    )


def _samplers_of(loader: DataLoader[Any]) -> Iterator[object]:
    """Yield the samplers of a loader, and those inside them."""
    waiting: list[Any] = [loader.batch_sampler, loader.sampler]
    seen: set[int] = set()
    while waiting:
        sampler = waiting.pop()
        if sampler is not None and id(sampler) not in seen:
            seen.add(id(sampler))
            yield sampler
            waiting += [getattr(sampler, name, None) for name in ("sampler", "batch_sampler")]


class _Dealt(Sampler[Any]):
    """Every ``count``-th entry of a sampler."""

    def __init__(self, sampler: Iterable[Any], rank: int, count: int) -> None:
        self.sampler, self.rank, self.count = sampler, rank, count

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self.sampler), self.rank, None, self.count)

    def __len__(self) -> int:
        return len(range(self.rank, len(self.sampler), self.count))  # type: ignore[arg-type]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and each of its parts back into its own afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training
