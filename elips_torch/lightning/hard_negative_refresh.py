"""Negatives for a training set, mined anew as the model learns."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from torch import Tensor

from elips_torch.core.errors import ArgumentError, DtypeError, ShapeError
from elips_torch.core.results import SearchResult
from elips_torch.core.validation import check_count, check_flag
from elips_torch.indexes.base import Index
from elips_torch.lightning.embedding import embedder_for, embeddings_of, evaluating, integers_of, title_of
from elips_torch.lightning.index_choice import IndexPlace, check_place, index_at, name_of
from elips_torch.lightning.index_refresh import IndexRefresh
from elips_torch.lightning.steps import Step

# Called with the index, queries (B, D), and positives or labels.
Miner: TypeAlias = Callable[..., SearchResult]


@runtime_checkable
class TakesNegatives(Protocol):
    """What negatives can be handed to: a datamodule, a dataset, a module."""

    def set_negatives(self, negatives: Tensor) -> None:
        """Take ``(N, M)`` int64 ids of documents, a row per training sample; -1 where none was found."""


class HardNegativeRefresh(Callback):
    """Mines negatives for every training sample, every few epochs, and hands them to the data.

    Each sample searches an index of the documents; its own positives are left out *in* the search. An
    `IndexRefresh` before it in the list of callbacks keeps the index up to date; one after it is warned of.
    The first time is before the loaders of the training data start, so that their workers know the negatives;
    later times are at the start of an epoch. With several processes each mines for every so manieth batch,
    and all get the whole table; the index must hold all documents on each. Queries that yield nothing are an
    error the first time; later the negatives stay as they are, which is warned of.

    Args:
        index: the name of the module's attribute, such as ``"index"``, the index itself, or a function of the
            module.
        queries: a loader over the training samples that does not shuffle, in the order in which the receiver
            numbers them; or a function of the trainer that returns one.
        miner: how many negatives per sample, which then are the nearest documents that are not positive; or
            what mines, such as a `training.HardNegativeMiner`: called with the index, queries ``(B, D)``
            and their positives ``(B, R)``, or in place of these with ``query_labels=`` ``(B,)`` and
            ``labels=`` ``(ntotal,)`` in the order of ``index.ids``; it returns a `SearchResult` whose ids
            ``(B, M)`` are padded by -1. One that draws at random does so by numbers of its own, from its
            ``seed`` on, which no checkpoint holds: a resumed run begins with the first again, and several
            processes draw otherwise than one does.
        step: called with the module and a batch, instead of ``pl_module.retrieval_step``. It returns
            ``{"queries": (B, D), "relevant": (B, R)}``, ids of documents padded by -1; or ``"queries"`` (or
            ``"embeddings"``) with ``"labels": (B,)``, and then ``labels`` is needed.
        labels: ``(L,)`` int64, the label of the document with each id, or a function of the trainer that
            returns it. Documents of the sample's label are positives.
        receiver: something with a method ``set_negatives(negatives)``, or a function; called on each process
            with int64 ``(N, M)`` on the CPU. Default: the trainer's datamodule, or else the module.
        every_n_epochs: mine at the start of every so manieth epoch.
        progress: whether a bar is shown, where the trainer shows its own.
        name: tells its part of a checkpoint from that of others; default is the index's name, or "" where it
            has none. Several in a trainer need different ones.

    Attributes:
        refreshes: how often negatives were mined. Part of checkpoints.

    Raises:
        ElipsError: an argument is wrong; when training starts, if nothing takes the negatives.

    >>> HardNegativeRefresh("index", queries=[torch.zeros(2, 4)], miner=5, every_n_epochs=2).refreshes
    0
    """

    def __init__(
        self,
        index: IndexPlace,
        queries: Iterable[Any] | Callable[[Trainer], Iterable[Any]],
        *,
        miner: int | Miner = 8,
        step: Step | None = None,
        labels: Tensor | Callable[[Trainer], Tensor] | None = None,
        receiver: TakesNegatives | Callable[[Tensor], None] | None = None,
        every_n_epochs: int = 1,
        progress: bool = True,
        name: str | None = None,
    ) -> None:
        check_place(index)
        if not callable(miner):
            miner = check_count("miner", miner)
        if not (receiver is None or isinstance(receiver, TakesNegatives) or callable(receiver)):
            raise DtypeError(
                f"receiver is a {type(receiver).__name__} without set_negatives, expected something with "
                "that method or a function"
            )
        self.index = index
        self.queries = queries
        self.miner = miner
        self.step = step
        self.labels = labels
        self.receiver = receiver
        self.every_n_epochs = check_count("every_n_epochs", every_n_epochs)
        self.progress = check_flag("progress", progress)
        self.name = name_of(index) if name is None else name
        self.refreshes = 0
        self._just_mined = False
        self._has_mined = False

    @property
    def state_key(self) -> str:
        """Key of the callback's part of a checkpoint."""
        return self._generate_state_key(name=self.name)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of refreshes; the negatives follow from the weights and the data."""
        return {"refreshes": self.refreshes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the number of refreshes."""
        self.refreshes = state_dict["refreshes"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mine before the first epoch, also of a resumed run, whose data has no negatives yet."""
        self._has_mined = False
        self._check_order(trainer, pl_module)
        self._refresh(trainer, pl_module)
        self._just_mined = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse loaders whose workers would never see new negatives."""
        for loader in CombinedLoader(trainer.train_dataloader).flattened:
            if getattr(loader, "persistent_workers", False):
                raise ArgumentError(
                    "the training data has persistent_workers=True: its workers keep the copy of the dataset "
                    "that they began with and never see new negatives, expected False"
                )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mine if the epoch is one of those."""
        if trainer.current_epoch % self.every_n_epochs == 0 and not self._just_mined:
            self._refresh(trainer, pl_module)
        self._just_mined = False

    def _refresh(self, trainer: Trainer, pl_module: LightningModule) -> None:
        take = self._receiver_of(trainer, pl_module)
        index = index_at(self.index, pl_module)
        labels = self.labels(trainer) if callable(self.labels) else self.labels
        loader = self.queries(trainer) if callable(self.queries) else self.queries
        title = title_of(trainer, self.progress, "mining negatives")
        embedder = embedder_for(trainer, pl_module, self.step, ("queries", "embeddings"), title)
        processes = embedder.processes
        with processes.agreeing("while mining negatives"), evaluating(pl_module):
            found = [self._mined(index, output, labels) for output in embedder.outputs(loader)]
        sizes = processes.objects([tuple(each.shape) for each in found])
        if not any(sizes) and self._has_mined:
            rank_zero_warn("queries yields nothing: the negatives that were mined before stay")
            return
        widths = {shape[1] for each in sizes for shape in each}
        if not widths:
            raise ArgumentError("queries yields nothing, expected at least one batch")
        if len(widths) > 1:
            raise ShapeError(f"the miner found {sorted(widths)} negatives per sample, expected one number")
        (width,) = widths
        own = torch.cat(found) if found else torch.empty(0, width, dtype=torch.int64)
        negatives = _in_order(processes.rows(own), [[shape[0] for shape in each] for each in sizes])
        without = int((negatives < 0).all(1).sum())
        if without:
            rank_zero_warn(f"{without} of {len(negatives)} training samples have no negative at all")
        take(negatives)
        self._has_mined = True
        self.refreshes += 1

    def _check_order(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of a refresh of the same index that comes too late."""
        index = index_at(self.index, pl_module)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks[callbacks.index(self) :]:
            if isinstance(callback, IndexRefresh) and index_at(callback.index, pl_module) is index:
                rank_zero_warn(
                    "HardNegativeRefresh comes before the IndexRefresh of its index among the callbacks, so "
                    "it mines in what the model made one refresh ago, and at first in nothing: expected "
                    "callbacks=[IndexRefresh(...), HardNegativeRefresh(...)]"
                )

    def _mined(self, index: Index, output: Any, labels: Tensor | None) -> Tensor:
        """Return ids ``(B, M)`` on the CPU for what the step made of a batch."""
        queries, _ = embeddings_of(output, ("queries", "embeddings"))
        queries = queries.to(index.device)
        columns = output if isinstance(output, Mapping) else {}
        if "relevant" in columns:
            positives = integers_of("relevant", columns["relevant"], queries, 2)
            if callable(self.miner):
                found = self.miner(index, queries, positives).ids
            else:
                found = index.search(queries, self.miner, exclude=positives).ids
        elif "labels" in columns:
            own = integers_of("labels", columns["labels"], queries, 1)
            others = _labels_in(index, labels)
            if callable(self.miner):
                found = self.miner(index, queries, query_labels=own, labels=others).ids
            else:
                mask = (others != own[:, None]) | (own[:, None] < 0)
                found = index.search(queries, self.miner, mask=mask).ids
        else:
            raise ArgumentError(
                "the retrieval step returned neither 'relevant' nor 'labels': without them the nearest "
                "documents are the positives"
            )
        if found.ndim != 2 or len(found) != len(queries):
            raise ShapeError(f"the miner found {tuple(found.shape)} ids, expected ({len(queries)}, M)")
        return found.cpu()

    def _receiver_of(self, trainer: Trainer, pl_module: LightningModule) -> Callable[[Tensor], None]:
        candidates: list[object] = [self.receiver]
        if self.receiver is None:
            candidates = [getattr(trainer, "datamodule", None), pl_module]
        for candidate in candidates:
            if isinstance(candidate, TakesNegatives):
                return candidate.set_negatives
            if candidate is self.receiver and callable(candidate):
                return candidate
        raise ArgumentError(
            "neither the datamodule nor the module has a method set_negatives(negatives): define it, or pass "
            "receiver="
        )


def _labels_in(index: Index, labels: Tensor | None) -> Tensor:
    """Return ``(ntotal,)``, the labels of what an index holds."""
    if labels is None:
        raise ArgumentError("the step returned 'labels', but labels= of the documents is not given")
    if not isinstance(labels, Tensor) or labels.ndim != 1:
        got = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise ShapeError(f"labels is {got}, expected (L,), a label for each id of a document")
    if len(index) and int(index.ids.max()) >= len(labels):
        raise ShapeError(f"labels has {len(labels)} entries, the index holds the id {int(index.ids.max())}")
    return labels.to(index.device, torch.int64)[index.ids]


def _in_order(rows: Tensor, sizes: list[list[int]]) -> Tensor:
    """Return rows that lie by process in the order of the batches, which were dealt out in turn."""
    order = []
    starts = [0]
    for each in sizes:
        starts.append(starts[-1] + sum(each))
    taken = starts[:-1]
    for turn in range(max(len(each) for each in sizes)):
        for rank, each in enumerate(sizes):
            if turn < len(each):
                order.append(torch.arange(taken[rank], taken[rank] + each[turn]))
                taken[rank] += each[turn]
    return rows[torch.cat(order)]
