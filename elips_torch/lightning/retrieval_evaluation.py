"""Recall of a model on its validation data, measured at the end of every validation epoch."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from elips_torch.core.errors import DtypeError, ImplementationError
from elips_torch.core.validation import check_count
from elips_torch.evaluation.recall import RecallAtK
from elips_torch.lightning.gather import Processes
from elips_torch.lightning.index_choice import IndexChoice, check_choice
from elips_torch.lightning.measures import check_names
from elips_torch.lightning.retrieval_rows import RowCollection
from elips_torch.lightning.retrieval_task import Neighbours, NothingToEvaluateError, Task
from elips_torch.lightning.steps import Step, call_step, has_step


class RetrievalEvaluation(Callback):
    """Builds an index from the validation embeddings and logs recall@k.

    For each batch it calls ``pl_module.retrieval_step(batch)``, or ``retrieval_step(batch, dataloader_idx)``;
    a module without that method returns the same from its ``validation_step``. It returns a dict, or
    another mapping, with

    - ``embeddings (B, D)`` and ``labels (B,)``: each sample queries all others. ``val/recall@k`` is the
      fraction of samples with the same label among the first k (the Recall@k of metric learning),
      ``val/label_recall@k`` the fraction of all samples of that label found. Samples without a
      label (-1), or alone with it, do not count as queries. Or
    - ``queries (B, D)`` and ``relevant (B, R)``, document ids padded by -1; and, from the same batch or
      from another, ``documents (B, D)`` and ``ids (B,)``. ``val/recall@k`` is the fraction of the
      relevant documents found, ``val/hit_rate@k`` the fraction of queries that found any. Relevant ids of no
      document count as not found, which is warned of once. Or
    - ``queries`` and ``documents``, both with ``labels (B,)``: measured as labelled embeddings are.

    Logged beside these are ``val/retrieval_seconds``, which building the index and searching it took, and,
    where the index is approximate, ``val/index_recall@k``: the share of the true neighbours that it finds.

    Recall rises: follow it with ``ModelCheckpoint(monitor="val/recall@10", mode="max")``, since
    Lightning minimises by default. Validation data in which there is nothing to find is warned of, and NaN is
    logged: training goes on, and ``ModelCheckpoint`` takes NaN for the worst value.

    Batches of all dataloaders form one evaluation. The sanity check is skipped. With several
    processes each must see its part of the data: samples that Lightning's sampler repeats to give
    each process equally many count once, so the numbers are those of one process, also where the step makes
    several rows of each sample (views, by ``torch.cat`` or ``torch.stack``). An exact
    index is then sharded: each process indexes the documents that it embedded, and only queries and results
    travel. An approximate index is built on the first process, which alone holds all documents; so it is the
    index that one process would build. Ids and labels (8 bytes per document) are known to all.

    Args:
        k: one or several numbers of neighbours to look at.
        index: an index class, a description for `elips_torch.index_factory`, or a function that is called
            with D and makes the empty index. Default: `FlatIndex`. An index that has to be fitted is fitted
            on the embeddings.
        step: called with the module, the batch and, if it takes that too, the dataloader's number, instead of
            ``retrieval_step``.
        device: where the embeddings are kept and searched; default is where the step leaves them.
        prefix: what the logged names begin with.
        metric: distance kind of an index that is named by class or description.
        metrics: what to measure: "recall", "hit_rate", "precision", "ndcg", "map", "mrr" and "label_recall",
            at each k, and "r_precision", which looks at no more than the largest k. What the data does not
            allow is left out. `evaluation.RetrievalMetrics` says what each is.
        shard: True shards an approximate index too: faster, but each process learns its own lists or codes,
            so that numbers differ from those of one process. False builds any index on the first process.
        recall_queries: by how many queries, about, the recall of an approximate index is measured; 0 for not
            at all.

    Attributes:
        history: one dict per evaluation: "epoch", "step" (of the optimiser) and what was logged,
            without the prefix. It is part of checkpoints.
        neighbours: what a few of this process's queries found last, if a `NeighbourTable` asks for it.

    Raises:
        ElipsError: an argument is wrong; during validation, if a step returns something else.

    >>> evaluation = RetrievalEvaluation(k=(1, 5, 10), index="IVF64,Flat")
    >>> evaluation.history
    []
    """

    def __init__(
        self,
        k: int | Sequence[int] = (1, 5, 10),
        *,
        index: IndexChoice = None,
        step: Step | None = None,
        device: torch.device | str | None = None,
        prefix: str = "val/",
        metric: str = "cosine",
        metrics: Sequence[str] = ("recall", "hit_rate", "label_recall"),
        shard: bool | None = None,
        recall_queries: int = 500,
    ) -> None:
        check_choice(index, metric)
        if shard not in (None, True, False):
            raise DtypeError(f"shard is {shard!r}, expected True, False or None")
        self.k = RecallAtK(k).k
        self.index = index
        self.step = step
        self.device = device
        self.prefix = prefix
        self.metric = metric
        self.metrics = check_names(metrics)
        self.shard = shard
        self.recall_queries = check_count("recall_queries", recall_queries, least=0)
        self.history: list[dict[str, float]] = []
        self.neighbours: Neighbours | None = None
        self._kept = 0
        self._said: set[str] = set()
        self._rows = RowCollection()

    @property
    def state_key(self) -> str:
        """Name of the callback's part of a checkpoint: several may run, each with its own prefix."""
        return self._generate_state_key(prefix=self.prefix)

    def state_dict(self) -> dict[str, Any]:
        """Return the history."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a history."""
        self.history = list(state_dict["history"])

    def keep_neighbours(self, queries: int) -> None:
        """Keep in `neighbours` what so many queries find, spread evenly over the validation data."""
        self._kept = max(self._kept, queries)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module that Lightning would never validate."""
        if stage == "fit" and not is_overridden("validation_step", pl_module):
            raise ImplementationError(
                f"{type(pl_module).__name__} has no validation_step, so Lightning skips validation "
                "and nothing is evaluated: define one (it may return what retrieval_step would, or nothing)"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that there is nothing to evaluate: Lightning then skips validation altogether."""
        self._warn_of_no_batch(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say that there was nothing to evaluate."""
        if stage == "validate":
            self._warn_of_no_batch(trainer)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what an interrupted validation left."""
        self._rows = RowCollection()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect the embeddings of a batch."""
        if trainer.sanity_checking:
            return
        if has_step(self.step, pl_module):
            with trainer.precision_plugin.val_step_context():
                outputs = call_step(self.step, pl_module, batch, dataloader_idx)
        if outputs is None:
            raise ImplementationError(
                f"{type(pl_module).__name__} has no retrieval_step and its validation_step returns nothing: "
                "define retrieval_step(batch), or pass step= to RetrievalEvaluation"
            )
        self._rows.add(outputs, dataloader_idx, self.device)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the index, search, log, and free the embeddings."""
        if trainer.sanity_checking:
            return
        rows, self._rows = self._rows, RowCollection()
        values = self._evaluate(rows, trainer, pl_module.device)
        for name, value in values.items():
            # Equal on all ranks, but for the time; the largest of equals has the very same digits.
            pl_module.log(self.prefix + name, value, sync_dist=trainer.world_size > 1, reduce_fx="max")
        measured = {name: float(value) for name, value in values.items()}
        self.history.append({"epoch": trainer.current_epoch, "step": trainer.global_step, **measured})

    def _warn_of_no_batch(self, trainer: Trainer) -> None:
        if trainer.limit_val_batches != 0 and not any(trainer.num_val_batches):
            rank_zero_warn(
                "the validation data yields no batch: retrieval is not evaluated, and nothing is logged "
                f"under {self.prefix!r}"
            )

    def _evaluate(self, rows: RowCollection, trainer: Trainer, device: torch.device) -> dict[str, Tensor]:
        loaders = CombinedLoader(trainer.val_dataloaders, "sequential").flattened
        processes = Processes(device)
        task = Task(
            self.k,
            self.metrics,
            self.index,
            self.metric,
            self.shard,
            self.recall_queries,
            self._kept,
            self._said,
        )
        self.neighbours = None
        place = torch.device(device if self.device is None else self.device)
        by_label, dim = rows.by_label(processes), rows.dim(processes)
        try:
            values, self.neighbours = task.run(rows, loaders, place, processes)
        except NothingToEvaluateError as error:
            rank_zero_warn(f"retrieval is not evaluated, NaN is logged: {error}")
            values = {name: torch.tensor(torch.nan) for name in task.names(by_label, dim, place)}
        return {name: value.to(device) for name, value in values.items()}
