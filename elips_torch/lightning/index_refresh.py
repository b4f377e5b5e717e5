"""An index that is filled anew as the model that embeds its corpus learns."""

import copy
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, TypeAlias

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from elips_torch.core.errors import ArgumentError
from elips_torch.core.validation import check_count, check_flag
from elips_torch.indexes.base import Index
from elips_torch.lightning.embedding import Embedder, embedder_for, evaluating, title_of
from elips_torch.lightning.gather import Processes
from elips_torch.lightning.index_choice import IndexPlace, check_place, index_at, name_of
from elips_torch.lightning.snapshot import snapshot_of
from elips_torch.lightning.steps import Step

Corpus: TypeAlias = Iterable[Any] | Callable[[Trainer], Iterable[Any]]


class IndexRefresh(Callback):
    """Embeds a corpus every few steps or epochs and replaces what an index holds.

    The new vectors are collected in an index of their own; only when it is whole does the old one take it
    over, in one go between two training steps. So every search, also during a refresh, sees one
    generation of the corpus. An index that is empty when training starts (or is resumed) is filled before the
    first step.

    With several processes each embeds every so manieth batch of the corpus, and all get all rows, in the
    order of the corpus. A corpus that yields nothing is an error where the index is empty; later the index
    keeps what it holds, which is warned of.

    Args:
        index: the name of the module's attribute, such as ``"index"`` or ``"memory.index"``, the index
            itself, or a function of the module.
        corpus: a loader that does not shuffle, or a function of the trainer that returns one, such as
            ``lambda trainer: trainer.datamodule.corpus_dataloader()``.
        step: called with the module and a batch, instead of ``pl_module.retrieval_step``. It returns
            ``{"documents": (B, D), "ids": (B,)}``, or without ids, which then are the numbers of the rows in
            the corpus, or the embeddings alone.
        every_n_epochs: refresh at the start of every so manieth epoch; the default is 1.
        every_n_steps: refresh after every so many steps of the optimiser, instead.
        background: embed in a thread while training goes on, by a copy of the module as it was when the
            refresh began; on a GPU on a stream of its own. Batches then are moved by Lightning's default,
            without the module's transfer hooks. Takes room for a copy of the weights. What fails there ends
            training before the next step, on all processes.
        refit: whether an index that learns (centroids, codes) learns anew each time.
        shard: whether each process keeps only the rows that it embedded.
        progress: whether a bar is shown, where the trainer shows its own.
        name: tells its part of a checkpoint from that of others; default is the index's name, or "" where it
            has none. Several in a trainer need different ones.

    Attributes:
        refreshes: how often the index was replaced. Part of checkpoints.

    Raises:
        ElipsError: an argument is wrong; when training starts, if there is no such index.

    >>> IndexRefresh("index", corpus=[torch.zeros(2, 4)], every_n_steps=100).refreshes
    0
    """

    def __init__(
        self,
        index: IndexPlace,
        corpus: Corpus,
        *,
        step: Step | None = None,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        background: bool = False,
        refit: bool = True,
        shard: bool = False,
        progress: bool = True,
        name: str | None = None,
    ) -> None:
        if every_n_epochs is not None and every_n_steps is not None:
            raise ArgumentError("every_n_epochs and every_n_steps are both given, expected one of them")
        check_place(index)
        if every_n_steps is not None:
            check_count("every_n_steps", every_n_steps)
        elif every_n_epochs is not None:
            check_count("every_n_epochs", every_n_epochs)
        self.index = index
        self.corpus = corpus
        self.step = step
        self.every_n_steps = every_n_steps
        self.every_n_epochs = 1 if every_n_epochs is None and every_n_steps is None else every_n_epochs
        self.background = check_flag("background", background)
        self.refit = check_flag("refit", refit)
        self.shard = check_flag("shard", shard)
        self.progress = check_flag("progress", progress)
        self.name = name_of(index) if name is None else name
        self.refreshes = 0
        self._last_step = -1
        self._owed = False
        self._just_filled = False
        self._executor: ThreadPoolExecutor | None = None
        self._running: Future[Index] | None = None
        self._stopping = False
        self._group: Any = None
        self._stream: torch.cuda.Stream | None = None

    @property
    def state_key(self) -> str:
        """Key of the callback's part of a checkpoint."""
        return self._generate_state_key(name=self.name)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of refreshes and the step of the last."""
        return {"refreshes": self.refreshes, "last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the number of refreshes and the step of the last."""
        self.refreshes = state_dict["refreshes"]
        self._last_step = state_dict["last_step"]

    # Hooks.

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the index, and fill it if it is empty."""
        index = self._index_of(pl_module)
        self._stopping = False
        self._owed = False
        if self.background:
            # What cannot be copied is said now, not when a refresh is due.
            snapshot_of(pl_module)
        if self.background and trainer.world_size > 1 and torch.distributed.is_initialized():
            # What the thread exchanges must not get between what training exchanges.
            self._group = torch.distributed.new_group(backend="gloo")
        if not sum(Processes(pl_module.device).objects(len(index))):
            embedder = self._embedder(trainer, pl_module)
            self._swap(index, self._built(index, embedder, self._loader(trainer)), embedder.processes)
            self._just_filled = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refresh if the epoch is one of those."""
        if self.every_n_epochs is not None and trainer.current_epoch % self.every_n_epochs == 0:
            self._owe(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Take over a refresh that is done; begin one that is due."""
        step = trainer.global_step
        if self._running is not None:
            self._finish(pl_module, wait=False)
        if self.every_n_steps is not None and step % self.every_n_steps == 0 and step != self._last_step:
            self._last_step = step
            self._owe(trainer, pl_module)
        elif self._owed and self._running is None:
            self._begin(trainer, pl_module)
        self._just_filled = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for a refresh that is under way."""
        if self._running is not None:
            self._finish(pl_module, wait=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop a refresh that is under way."""
        self._give_up()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop a refresh that is under way."""
        self._give_up()

    # How it is done.

    def _owe(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._just_filled:
            return
        self._owed = True
        if self._running is None:
            self._begin(trainer, pl_module)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._owed = False
        index, loader = self._index_of(pl_module), self._loader(trainer)
        if not self.background:
            embedder = self._embedder(trainer, pl_module)
            self._swap(index, self._built(index, embedder, loader), embedder.processes)
            return
        embedder = self._embedder(trainer, snapshot_of(pl_module), in_background=True)
        device = pl_module.device
        if device.type == "cuda":
            self._stream = self._stream or torch.cuda.Stream(device)
            # The copy of the weights must be there before the thread reads it.
            self._stream.wait_stream(torch.cuda.current_stream(device))
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="index-refresh")
        empty = self._empty(index)
        self._running = self._executor.submit(self._built_on_stream, empty, embedder, loader)

    def _finish(self, pl_module: LightningModule, *, wait: bool) -> None:
        """Take over what the thread built; on all processes at the same step."""
        running = self._running
        if running is None:
            return
        if not wait and not all(Processes(pl_module.device).objects(running.done())):
            return
        self._running = None
        fresh = running.result()
        if self._stream is not None:
            current = torch.cuda.current_stream(pl_module.device)
            current.wait_stream(self._stream)
            for tensor in (*fresh.buffers(), *fresh.parameters()):
                tensor.record_stream(current)
        self._swap(self._index_of(pl_module), fresh, Processes(pl_module.device))

    def _give_up(self) -> None:
        self._stopping = True
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
        if self._group is not None and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group(self._group)
        self._executor = self._running = self._stream = self._group = None

    def _built_on_stream(self, empty: Index, embedder: Embedder, loader: Iterable[Any]) -> Index:
        with ExitStack() as stack:
            if self._stream is not None:
                stack.enter_context(torch.cuda.stream(self._stream))
            fresh = self._filled(empty, embedder, loader)
            if self._stream is not None:
                self._stream.synchronize()
        return fresh

    def _built(self, index: Index, embedder: Embedder, loader: Iterable[Any]) -> Index:
        return self._filled(self._empty(index), embedder, loader)

    def _filled(self, fresh: Index, embedder: Embedder, loader: Iterable[Any]) -> Index:
        """Return the index with the corpus in it."""
        waiting = []
        with embedder.processes.agreeing("while embedding the corpus"), evaluating(embedder.module):
            for vectors, ids in embedder.rounds(loader, shared=not self.shard):
                vectors, ids = vectors.to(fresh.device), ids.to(fresh.device)
                if fresh.is_trained:
                    fresh.add(vectors, ids=ids)
                else:
                    waiting.append((vectors, ids))
            if waiting:
                vectors, ids = (torch.cat(parts) for parts in zip(*waiting, strict=True))
                del waiting
                fresh.fit(vectors)
                fresh.add(vectors, ids=ids)
        return fresh

    def _empty(self, index: Index) -> Index:
        if self.refit:
            return type(index)._from_config(index.config(), index.device)
        empty = copy.deepcopy(index)
        empty.reset()
        return empty

    def _swap(self, index: Index, fresh: Index, processes: Processes) -> None:
        """Let an index take over what another holds; an index that holds something is not emptied."""
        held, found = (sum(processes.objects(len(each))) for each in (index, fresh))
        if not found:
            if not held:
                raise ArgumentError("corpus yields nothing, expected at least one batch")
            rank_zero_warn(
                f"corpus yields nothing: the index is not refreshed and keeps what it holds, {held} vectors"
            )
            return
        fresh.index_in_state_dict = True
        kept, index.index_in_state_dict = index.index_in_state_dict, True
        try:
            index.load_state_dict(fresh.state_dict(), assign=True)
        finally:
            index.index_in_state_dict = kept
        self.refreshes += 1

    def _index_of(self, pl_module: LightningModule) -> Index:
        index = index_at(self.index, pl_module)
        if any(True for _ in index.parameters()):
            raise ArgumentError(
                "index is learnable, its vectors come from the optimiser and not from a corpus"
            )
        return index

    def _loader(self, trainer: Trainer) -> Iterable[Any]:
        return self.corpus(trainer) if callable(self.corpus) else self.corpus

    def _embedder(
        self, trainer: Trainer, module: LightningModule, *, in_background: bool = False
    ) -> Embedder:
        return embedder_for(
            trainer,
            module,
            self.step,
            ("documents", "embeddings"),
            title_of(trainer, self.progress, "refreshing the index"),
            group=self._group if in_background else None,
            in_background=in_background,
            stopped=lambda: self._stopping,
        )
