"""Data to train a retriever on: labelled samples, or queries with their relevant documents."""

import os
from abc import ABC, abstractmethod
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from safetensors import SafetensorError, safe_open
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Batch = dict[str, Tensor]


class TableDataset(Dataset[Batch]):
    """Tensors of equal length by name; a batch is one indexing of each."""

    def __init__(self, **columns: Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(next(iter(self.columns.values())))

    def __getitems__(self, rows: list[int]) -> Batch:
        """Return the rows as a batch; torch's DataLoader prefers this over one row at a time."""
        return {name: column[rows] for name, column in self.columns.items()}

    def loader(self, batch_size: int, *, shuffle: bool = False) -> DataLoader[Batch]:
        """Return a DataLoader of whole batches."""
        return DataLoader(self, batch_size, shuffle=shuffle, collate_fn=_as_is)


def _as_is(batch: Batch) -> Batch:
    return batch


class RetrievalData(LightningDataModule, ABC):
    """Queries, and a corpus that training draws positives and negatives from.

    Attributes:
        dim: size of a sample, before the encoder.
        corpus: ``(N, dim)``; the row number is the id.
    """

    dim: int
    corpus: Tensor

    @abstractmethod
    def is_relevant(self, batch: Batch, rows: Tensor) -> Tensor:
        """Return bool ``(B, M)``: which rows ``(M,)`` of the corpus are relevant to each query."""

    @abstractmethod
    def draw_positives(self, batch: Batch) -> Tensor:
        """Return ``(B,)``, for each query the row of a relevant member of the corpus."""

    @abstractmethod
    def only_negatives(self, batch: Batch) -> dict[str, Any]:
        """Return the keywords that keep a search away from what is relevant."""


class DigitsData(RetrievalData):
    """The handwritten digits that ship with scikit-learn, 8 x 8 pixels.

    Trained on the first half of the file and tested on the second, unshuffled, so that samples
    recorded together mostly stay on one side. Held-out classes are more usual in metric learning, but
    ten are too few: trained on five digits, the model finds the other five worse than before.

    Args:
        batch_size: queries per step.
    """

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size
        digits = load_digits()
        pixels = torch.tensor(digits.data, dtype=torch.float32) / 16
        labels = torch.tensor(digits.target, dtype=torch.int64)
        half = len(pixels) // 2
        self.dim = pixels.shape[1]
        self.corpus, self.corpus_labels = pixels[:half], labels[:half]
        self.test, self.test_labels = pixels[half:], labels[half:]

    def __str__(self) -> str:
        """Return what there is to learn from, in words."""
        return f"{len(self.corpus)} digits to train on, {len(self.test)} held out"

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return batches of queries: the corpus itself."""
        table = TableDataset(
            queries=self.corpus, labels=self.corpus_labels, rows=torch.arange(len(self.corpus))
        )
        return table.loader(self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the samples kept apart: each will query the others."""
        return TableDataset(embeddings=self.test, labels=self.test_labels).loader(512)

    def is_relevant(self, batch: Batch, rows: Tensor) -> Tensor:
        """Return where the labels are equal."""
        return batch["labels"][:, None] == self.corpus_labels.to(rows.device)[rows]

    def draw_positives(self, batch: Batch) -> Tensor:
        """Return another sample of the same label, all equally likely."""
        rows = torch.arange(len(self.corpus), device=batch["rows"].device)
        others = self.is_relevant(batch, rows) & (rows != batch["rows"][:, None])
        return torch.multinomial(others.float(), 1)[:, 0]

    def only_negatives(self, batch: Batch) -> dict[str, Any]:
        """Return a mask of the samples with other labels."""
        rows = torch.arange(len(self.corpus), device=batch["rows"].device)
        return {"mask": ~self.is_relevant(batch, rows)}


class EmbeddingsData(RetrievalData):
    """Embeddings of queries and documents from a safetensors file.

    A fifth of the relevant documents is drawn, and the queries whose (first) relevant document is
    one of them are held out: what is tested was never a positive in training. All documents stay in
    the database.

    Args:
        path: file with ``queries (Q, D)``, ``documents (N, D)`` and ``relevant (Q,)`` or ``(Q, R)``:
            for each query the row numbers of its documents, padded by -1.
        held_out: fraction of the relevant documents whose queries are held out.
        batch_size: queries per step.
        seed: of the split.
    """

    def __init__(
        self, path: str | os.PathLike[str], held_out: float = 0.2, batch_size: int = 256, seed: int = 0
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        queries, self.corpus, relevant = read_embeddings(path)
        self.dim = queries.shape[1]
        answered = relevant[:, 0].unique()
        drawn = torch.randperm(len(answered), generator=torch.Generator().manual_seed(seed))
        tested = torch.isin(relevant[:, 0], answered[drawn[: round(held_out * len(answered))]])
        if tested.all() or not tested.any():
            raise ValueError(f"held_out is {held_out}, which leaves no query to train on or none to test")
        self.train = TableDataset(queries=queries[~tested], relevant=relevant[~tested])
        self.test = TableDataset(queries=queries[tested], relevant=relevant[tested])

    def __str__(self) -> str:
        """Return what there is to learn from, in words."""
        steps = -(-len(self.train) // self.batch_size)
        return (
            f"{len(self.train)} queries to train on ({steps} steps per epoch), {len(self.test)} held out, "
            f"{len(self.corpus)} documents"
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return batches of queries that are not held out."""
        return self.train.loader(self.batch_size, shuffle=True)

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """Return the held-out queries, and all documents."""
        documents = TableDataset(documents=self.corpus, ids=torch.arange(len(self.corpus)))
        return [self.test.loader(4096), documents.loader(8192)]

    def is_relevant(self, batch: Batch, rows: Tensor) -> Tensor:
        """Return where a row is among the query's documents."""
        return (batch["relevant"][:, :, None] == rows).any(1)

    def draw_positives(self, batch: Batch) -> Tensor:
        """Return one of the relevant documents, all equally likely."""
        column = torch.multinomial((batch["relevant"] >= 0).float(), 1)
        return batch["relevant"].gather(1, column)[:, 0]

    def only_negatives(self, batch: Batch) -> dict[str, Any]:
        """Return the relevant documents as exclusions."""
        return {"exclude": batch["relevant"]}


def read_embeddings(path: str | os.PathLike[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries ``(Q, D)``, documents ``(N, D)`` and relevant ``(Q, R)`` of a file.

    Raises:
        ValueError: the file or one of its tensors is not what `EmbeddingsData` describes.
    """
    try:
        with safe_open(path, "pt") as file:
            held = list(file.keys())
            missing = [name for name in ("queries", "documents", "relevant") if name not in held]
            if missing:
                raise ValueError(f"{path} has no {', '.join(map(repr, missing))}, it has {', '.join(held)}")
            queries, documents = file.get_tensor("queries").float(), file.get_tensor("documents").float()
            relevant = file.get_tensor("relevant")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as a safetensors file: {error}") from error
    if queries.ndim != 2 or documents.ndim != 2 or queries.shape[1] != documents.shape[1]:
        shapes = f"queries {tuple(queries.shape)} and documents {tuple(documents.shape)}"
        raise ValueError(f"{path} has {shapes}, expected (Q, D) and (N, D) with the same D")
    relevant = relevant[:, None] if relevant.ndim == 1 else relevant
    if relevant.is_floating_point() or relevant.ndim != 2 or len(relevant) != len(queries):
        got = f"{relevant.dtype} of shape {tuple(relevant.shape)}"
        raise ValueError(f"{path} has 'relevant' {got}, expected int64 ({len(queries)},) or with R columns")
    relevant = relevant.long()
    if int(relevant.min()) < -1 or int(relevant.max()) >= len(documents) or bool((relevant[:, 0] < 0).any()):
        raise ValueError(
            f"{path} has 'relevant' outside 0 to {len(documents) - 1}, or a query without a document; "
            "only later columns may hold -1"
        )
    return queries, documents, relevant
