"""A few queries with their neighbours, for people to look at."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from elips_torch.core.errors import ArgumentError, DtypeError
from elips_torch.core.validation import check_count
from elips_torch.lightning.gather import Processes
from elips_torch.lightning.neighbour_logging import Cell, Table, write_table
from elips_torch.lightning.retrieval_evaluation import RetrievalEvaluation
from elips_torch.lightning.retrieval_task import Neighbours

Payload: TypeAlias = Mapping[int, Any] | Sequence[Any] | Callable[[int], Any]


class NeighbourTable(Callback):
    """Logs a few validation queries with what they found, after every evaluation.

    It shows what a `RetrievalEvaluation` among the callbacks finds, so it costs no search: the same queries
    each time, spread evenly over the data. What stands for a query or a document is yours: a text, a label,
    a path, a picture. Where all are pictures, the table is logged as one too, with relevant documents framed
    in green and others in red.

    - TensorBoard: text (relevant documents bold) and picture.
    - CSV: ``val_neighbours.csv``, one line per document found, and pictures as ``.png``, beside
      ``metrics.csv``. The file is called after the evaluation's prefix and ``name``, with "_" for "/".
    - Weights & Biases (by its ``log_table`` and ``log_image``): table and picture.
    - Other loggers are left out, which is said once.

    Args:
        documents: what stands for each document, by id: a mapping, a sequence or a function. Documents
            evaluated by label go by their number in the validation data. Pictures are tensors or
            arrays ``(H, W)``, ``(1, H, W)`` or ``(3, H, W)``, uint8 or in [0, 1], PIL pictures, or a
            `pathlib.Path` of one. Default: the id.
        queries: the same for the queries, by their number in the validation data. Default: ``documents``
            where samples search each other, else the number.
        n_queries: number of queries.
        k: number of documents for each, at most the largest k of the evaluation.
        name: under which it is logged, after the evaluation's prefix.
        evaluation: whose neighbours to show; default: the first among the trainer's callbacks.

    Raises:
        ElipsError: an argument is wrong; when the trainer starts, if there is no evaluation.

    >>> NeighbourTable(documents={7: "the text of document 7"}, k=3).k
    3
    """

    def __init__(
        self,
        documents: Payload | None = None,
        queries: Payload | None = None,
        *,
        n_queries: int = 8,
        k: int = 5,
        name: str = "neighbours",
        evaluation: RetrievalEvaluation | None = None,
    ) -> None:
        for what, payload in (("documents", documents), ("queries", queries)):
            if not (payload is None or callable(payload) or hasattr(payload, "__getitem__")):
                raise DtypeError(
                    f"{what} is a {type(payload).__name__}, expected a mapping, a sequence or a function"
                )
        self.documents = documents
        self.queries = queries
        self.n_queries = check_count("n_queries", n_queries)
        self.k = check_count("k", k)
        self.name = name
        self.evaluation = evaluation
        self._said: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask the evaluation to keep what is shown."""
        evaluation = self._source(trainer)
        if self.k > max(evaluation.k):
            raise ArgumentError(
                f"k is {self.k}, expected at most {max(evaluation.k)}, the neighbours that the evaluation "
                "looks at"
            )
        evaluation.keep_neighbours(self.n_queries)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the table; callbacks in any order have evaluated by now."""
        if trainer.sanity_checking:
            return
        evaluation = self._source(trainer)
        found = Processes(pl_module.device).objects(evaluation.neighbours)
        parts = [part for part in found if part is not None]
        if not parts or not trainer.is_global_zero:
            return
        rows = self._rows(parts)[: self.n_queries]
        if not rows:
            return
        table = Table(evaluation.prefix + self.name, trainer.current_epoch, trainer.global_step, rows)
        for logger in trainer.loggers:
            kind = type(logger).__name__
            if not write_table(logger, table) and kind not in self._said:
                self._said.add(kind)
                rank_zero_warn(f"{kind} shows no tables: neighbours are not logged to it")

    def _source(self, trainer: Trainer) -> RetrievalEvaluation:
        if self.evaluation is not None:
            return self.evaluation
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RetrievalEvaluation):
                return callback
        raise ArgumentError(
            "there is no RetrievalEvaluation among the callbacks, whose neighbours NeighbourTable shows"
        )

    def _rows(self, parts: list[Neighbours]) -> list[tuple[Cell, list[Cell]]]:
        """Return the queries of all processes in their order."""
        of_queries = self.queries
        if of_queries is None and parts[0].itself:
            of_queries = self.documents
        numbers = torch.cat([part.queries for part in parts])
        columns = [
            torch.cat([getattr(part, name)[:, : self.k] for part in parts])
            for name in ("ids", "scores", "correct")
        ]
        rows = []
        for at in numbers.argsort().tolist():
            number = int(numbers[at])
            triples = zip(*(column[at].tolist() for column in columns), strict=True)
            found = [
                Cell(each, _payload_of(self.documents, each) if each >= 0 else None, score, correct)
                for each, score, correct in triples
            ]
            rows.append((Cell(number, _payload_of(of_queries, number)), found))
        return rows


def _payload_of(source: Payload | None, number: int) -> Any:
    """Return what stands for a number; None where the user has nothing."""
    if source is None:
        return None
    if callable(source):
        return source(number)
    try:
        return source[number]
    except (KeyError, IndexError):
        return None
