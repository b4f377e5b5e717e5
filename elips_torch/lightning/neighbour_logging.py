"""Writing a table of neighbours where a logger shows it."""

import csv
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elips_torch.lightning.neighbour_picture import EMPTY, QUERY, RIGHT, WRONG, as_picture, grid, png

_LONGEST_TEXT = 200


@dataclasses.dataclass(frozen=True)
class Cell:
    """A query, or a document that was found.

    Attributes:
        id: number of the query, or id of the document; -1 for nothing found.
        payload: what the user has for it; None for nothing.
        score: of a document.
        correct: whether a document is relevant.
    """

    id: int
    payload: Any
    score: float = 0.0
    correct: bool = False

    @property
    def text(self) -> str:
        """The payload in words."""
        if self.id < 0:
            return ""
        shown = str(self.id)
        if self.payload is not None and not (isinstance(self.payload, Tensor) and self.payload.numel() > 1):
            value = self.payload.item() if isinstance(self.payload, Tensor) else self.payload
            text = os.fspath(value) if isinstance(value, os.PathLike) else str(value)
            shown = text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 3] + "..."
        return shown


@dataclasses.dataclass(frozen=True)
class Table:
    """Queries, each with what it found.

    Attributes:
        name: under which it is logged.
        epoch: of training.
        step: of the optimiser.
        rows: each query with its documents, best first, all equally many.
    """

    name: str
    epoch: int
    step: int
    rows: list[tuple[Cell, list[Cell]]]

    def picture(self) -> Tensor | None:
        """Return uint8 ``(3, H, W)`` if every payload is a picture, else None."""
        lines = []
        for query, found in self.rows:
            line = [(as_picture(query.payload), QUERY)]
            for cell in found:
                frame = EMPTY if cell.id < 0 else RIGHT if cell.correct else WRONG
                line.append((as_picture(cell.payload) if cell.id >= 0 else None, frame))
            if any(picture is None and frame is not EMPTY for picture, frame in line):
                return None
            lines.append(line)
        return grid(lines) if lines else None

    def records(self) -> list[dict[str, Any]]:
        """Return one record per document found."""
        return [
            {
                "epoch": self.epoch,
                "step": self.step,
                "query": query.id,
                "query_text": query.text,
                "rank": rank,
                "id": cell.id,
                "score": cell.score,
                "correct": cell.correct,
                "text": cell.text,
            }
            for query, found in self.rows
            for rank, cell in enumerate(found, 1)
            if cell.id >= 0
        ]

    def markdown(self) -> str:
        """Return the table for a reader; what is relevant is bold."""
        width = len(self.rows[0][1])
        lines = [["query", *(str(rank) for rank in range(1, width + 1))], ["---"] * (width + 1)]
        for query, found in self.rows:
            cells = [f"{_escaped(cell.text)} ({cell.score:.3f})" if cell.id >= 0 else "" for cell in found]
            bold = [f"**{text}**" if cell.correct else text for text, cell in zip(cells, found, strict=True)]
            lines.append([_escaped(query.text), *bold])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_table(logger: Any, table: Table) -> bool:
    """Write a table to a logger of a known kind and return whether it is one.

    Kinds are told by the names of classes, so that none has to be installed: TensorBoard's, CSV's, and what
    has a ``log_table`` as that of Weights & Biases.
    """
    names = {kind.__name__ for kind in type(logger).__mro__}
    writers: tuple[tuple[bool, Callable[[Any, Table], None]], ...] = (
        ("TensorBoardLogger" in names, _to_tensorboard),
        ("CSVLogger" in names, _to_csv),
        (callable(getattr(logger, "log_table", None)), _to_wandb),
    )
    for fits, write in writers:
        if fits:
            write(logger, table)
            return True
    return False


def _to_tensorboard(logger: Any, table: Table) -> None:
    picture = table.picture()
    if picture is not None:
        logger.experiment.add_image(table.name, picture, table.step)
    logger.experiment.add_text(table.name, table.markdown(), table.step)


def _to_csv(logger: Any, table: Table) -> None:
    folder = Path(logger.log_dir)
    folder.mkdir(parents=True, exist_ok=True)
    # Names may have slashes, as those of metrics do.
    stem = table.name.replace("/", "_")
    path, records = folder / f"{stem}.csv", table.records()
    if records:
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(records[0]))
            if new:
                writer.writeheader()
            writer.writerows(records)
    picture = table.picture()
    if picture is not None:
        (folder / f"{stem}-{table.step}.png").write_bytes(png(picture))


def _to_wandb(logger: Any, table: Table) -> None:
    records = table.records()
    if records:
        data = [list(record.values()) for record in records]
        logger.log_table(table.name, columns=list(records[0]), data=data, step=table.step)
    picture = table.picture()
    if picture is not None and callable(getattr(logger, "log_image", None)):
        # As an array (H, W, 3), which its pictures are made of.
        array = picture.permute(1, 2, 0).contiguous().to(torch.uint8).numpy()
        logger.log_image(f"{table.name}_picture", [array], step=table.step)


def _escaped(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
