"""Recall of a model on its validation data, measured at the end of every validation epoch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from elips_torch.core.errors import ArgumentError, DtypeError, ImplementationError, ShapeError
from elips_torch.evaluation.recall import HitRateAtK, LabelRecallAtK, RecallAtK
from elips_torch.indexes.base import Index
from elips_torch.indexes.flat import FlatIndex
from elips_torch.lightning.gather import gather_rows
from elips_torch.lightning.retrieval_rows import RowCollection, Rows

Step = Callable[[LightningModule, Any, int], Mapping[str, Tensor]]


class RetrievalEvaluation(Callback):
    """Builds an index from the validation embeddings and logs recall@k.

    For each batch it calls ``pl_module.retrieval_step(batch, dataloader_idx)``; a module without that
    method returns the same from its ``validation_step``. It returns a dict with

    - ``embeddings (B, D)`` and ``labels (B,)``: each sample queries all others. ``val/recall@k`` is the
      fraction of samples with the same label among the first k (the Recall@k of metric learning),
      ``val/label_recall@k`` the fraction of all samples of that label found. Samples without a
      label (-1), or alone with it, do not count as queries. Or
    - ``queries (B, D)`` and ``relevant (B, R)``, document ids padded by -1; and, from the same batch or
      from another, ``documents (B, D)`` and ``ids (B,)``. ``val/recall@k`` is the fraction of the
      relevant documents found, ``val/hit_rate@k`` the fraction of queries that found any.

    Recall rises: follow it with ``ModelCheckpoint(monitor="val/recall@10", mode="max")``, since
    Lightning minimises by default.

    Batches of all dataloaders form one evaluation. The sanity check is skipped. With several
    processes each must see its part of the data: samples that Lightning's sampler repeats to give
    each process equally many count once, so the numbers are those of one process.

    Args:
        k: one or several numbers of neighbours to look at.
        index: called with D, makes the empty index. Default: ``FlatIndex(D, metric="cosine")``. An
            index that has to be fitted is fitted on the embeddings.
        step: called with the module, the batch and the dataloader's number instead of
            ``retrieval_step``.
        device: where the embeddings are kept and searched; default is where the step leaves them.
        prefix: what the logged names begin with.

    Attributes:
        history: one dict per evaluation: "epoch", "step" (of the optimiser) and what was logged,
            without the prefix. It is part of checkpoints.

    Raises:
        ElipsError: during validation, if a step returns something else, documents or queries are
            missing, or no label occurs twice.

    >>> evaluation = RetrievalEvaluation(k=(1, 5, 10))
    >>> evaluation.history
    []
    """

    def __init__(
        self,
        k: int | Sequence[int] = (1, 5, 10),
        *,
        index: Callable[[int], Index] | None = None,
        step: Step | None = None,
        device: torch.device | str | None = None,
        prefix: str = "val/",
    ) -> None:
        if isinstance(index, Index):
            raise DtypeError(
                f"index is a {type(index).__name__}, expected a callable that makes one, such as "
                "lambda dim: FlatIndex(dim)"
            )
        self.k = RecallAtK(k).k
        self.index = index
        self.step = step
        self.device = device
        self.prefix = prefix
        self.history: list[dict[str, float]] = []
        self._rows = RowCollection()

    def state_dict(self) -> dict[str, Any]:
        """Return the history."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a history."""
        self.history = list(state_dict["history"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module that Lightning would never validate."""
        if stage == "fit" and not is_overridden("validation_step", pl_module):
            raise ImplementationError(
                f"{type(pl_module).__name__} has no validation_step, so Lightning skips validation "
                "and nothing is evaluated: define one (it may return what retrieval_step would, or nothing)"
            )

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
        with trainer.precision_plugin.val_step_context():
            if self.step is not None:
                outputs = self.step(pl_module, batch, dataloader_idx)
            elif callable(step := getattr(pl_module, "retrieval_step", None)):
                outputs = step(batch, dataloader_idx)
        if outputs is None:
            raise ImplementationError(
                f"{type(pl_module).__name__} has no retrieval_step and its validation_step returns nothing: "
                "define retrieval_step(batch, dataloader_idx), or pass step= to RetrievalEvaluation"
            )
        self._rows.add(outputs, dataloader_idx, self.device)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the index, search, log, and free the embeddings."""
        if trainer.sanity_checking:
            return
        rows, self._rows = self._rows, RowCollection()
        values = self._evaluate(rows, trainer, pl_module.device)
        for name, value in values.items():
            # Equal on all ranks already; Lightning wants to be told that this is so.
            pl_module.log(self.prefix + name, value, sync_dist=trainer.world_size > 1)
        measured = {name: float(value) for name, value in values.items()}
        self.history.append({"epoch": trainer.current_epoch, "step": trainer.global_step, **measured})

    def _evaluate(self, rows: RowCollection, trainer: Trainer, device: torch.device) -> dict[str, Tensor]:
        kinds = rows.kinds()
        place = device if self.device is None else self.device
        loaders = CombinedLoader(trainer.val_dataloaders, "sequential").flattened
        samplers = [getattr(loader, "sampler", None) for loader in loaders]
        if not kinds:
            raise ArgumentError("the validation data has no batch, nothing can be evaluated")
        if kinds == {"embeddings"}:
            return self._evaluate_labels(rows.rows("embeddings", samplers, place), device)
        if "embeddings" in kinds:
            raise ArgumentError("the retrieval step returned labelled embeddings and queries or documents")
        for missing in {"queries", "documents"} - kinds:
            raise ArgumentError(f"no retrieval step returned {missing!r} during this validation")
        queries, documents = (rows.rows(kind, samplers, place) for kind in ("queries", "documents"))
        return self._evaluate_documents(queries, documents, device)

    def _evaluate_labels(self, own: Rows, device: torch.device) -> dict[str, Tensor]:
        everything = _gathered(own, device)
        labels, counts = everything.integers.unique(return_counts=True)
        if not bool((counts[labels >= 0] > 1).any()):
            raise ArgumentError(
                f"labels: no label occurs twice among {len(everything.places)} samples, so no sample has "
                "a neighbour to find"
            )
        index = self._filled(everything.vectors, everything.places)
        ids = index.search(own.vectors, max(self.k), exclude=own.places[:, None]).ids
        # Places run from 0 without gaps, and the gathered rows are in their order.
        retrieved = everything.integers[ids.clamp_min(0)].masked_fill_(ids < 0, -1)
        others = counts[torch.searchsorted(labels, own.integers)] - 1
        hit_rate, label_recall = HitRateAtK(self.k).to(ids.device), LabelRecallAtK(self.k).to(ids.device)
        hit_rate.update(retrieved, own.integers.masked_fill(others == 0, -1))
        label_recall.update(retrieved, own.integers, others)
        hits = hit_rate.compute()
        recall = {f"recall@{k}": hits[f"hit_rate@{k}"] for k in self.k}
        return {**recall, **label_recall.compute()}

    def _evaluate_documents(self, queries: Rows, documents: Rows, device: torch.device) -> dict[str, Tensor]:
        if queries.vectors.shape[1] != documents.vectors.shape[1]:
            dims = queries.vectors.shape[1], documents.vectors.shape[1]
            raise ShapeError(f"queries have dim {dims[0]}, documents have dim {dims[1]}")
        documents = _gathered(documents, device)
        index = self._filled(documents.vectors, documents.integers)
        ids = index.search(queries.vectors, max(self.k)).ids
        recall, hit_rate = RecallAtK(self.k).to(ids.device), HitRateAtK(self.k).to(ids.device)
        recall.update(ids, queries.integers)
        hit_rate.update(ids, queries.integers)
        values: dict[str, Tensor] = {**recall.compute(), **hit_rate.compute()}
        if values[f"recall@{self.k[0]}"].isnan():
            raise ArgumentError("relevant: no query has a relevant document, all entries are -1")
        return values

    def _filled(self, vectors: Tensor, ids: Tensor) -> Index:
        dim = vectors.shape[1]
        index = FlatIndex(dim, metric="cosine") if self.index is None else self.index(dim)
        index = index.to(vectors.device)
        if not index.is_trained:
            index.fit(vectors)
        index.add(vectors, ids=ids)
        return index


def _gathered(own: Rows, device: torch.device) -> Rows:
    """Return the rows of all processes in the order of their places."""
    places = gather_rows(own.places, device)
    order = places.argsort()
    vectors, integers = gather_rows(own.vectors, device), gather_rows(own.integers, device)
    return Rows(vectors[order], integers[order], places[order])
