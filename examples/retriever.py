"""An embedding model trained with hard negatives from an index that it refreshes."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from retrieval_data import Batch, RetrievalData
from torch import Tensor, nn
from torch.nn import functional

from elips_torch import FlatIndex, prepare_for_ddp


class DigitEncoder(nn.Module):
    """Embeds small square pictures by two convolutions.

    Args:
        dim: number of pixels, a square.
        dim_out: size of an embedding.
    """

    def __init__(self, dim: int, dim_out: int = 32) -> None:
        super().__init__()
        side = round(dim**0.5)
        self.dim_out = dim_out
        self.layers = nn.Sequential(
            nn.Unflatten(1, (1, side, side)),
            nn.Conv2d(1, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * ((side + 1) // 2) ** 2, dim_out),
        )

    def forward(self, pixels: Tensor) -> Tensor:  # (B, dim) -> (B, dim_out)
        """Return embeddings of length one."""
        return functional.normalize(self.layers(pixels), dim=1)


class ResidualAdapter(nn.Module):
    """Corrects given embeddings by a learned linear map; before training it changes nothing.

    Args:
        dim: size of an embedding.
        dropout: probability with which a feature does not take part in the correction.
    """

    def __init__(self, dim: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.dim_out = dim
        self.dropout = nn.Dropout(dropout)
        self.correction = nn.Linear(dim, dim)
        nn.init.zeros_(self.correction.weight)
        nn.init.zeros_(self.correction.bias)

    def forward(self, embeddings: Tensor) -> Tensor:  # (B, dim) -> (B, dim)
        """Return corrected embeddings of length one."""
        embeddings = functional.normalize(embeddings, dim=1)
        return functional.normalize(embeddings + self.correction(self.dropout(embeddings)), dim=1)


class Retriever(LightningModule):
    """Pulls queries to what is relevant and pushes them from what an index finds instead.

    Every ``refresh_every`` epochs the index takes the embeddings of the corpus as the model sees it
    then. Each step searches it for the wrong answers nearest to the queries and draws
    ``negatives`` of them per query; the positives of the other queries serve as negatives too.

    Args:
        dim: size of a sample; the command line takes it from the data.
        query_encoder: makes the encoder of queries from ``dim``; it has an attribute ``dim_out``.
        document_encoder: the same for the corpus. Default: queries and corpus share one encoder.
        temperature: what similarities are divided by in the loss.
        candidates: number of wrong answers that a search returns per query.
        negatives: number drawn from them.
        refresh_every: epochs between two refreshes of the index.
        learning_rate: of AdamW, at the start; it falls to zero along a cosine.
    """

    def __init__(
        self,
        dim: int,
        query_encoder: Callable[[int], nn.Module] = DigitEncoder,
        document_encoder: Callable[[int], nn.Module] | None = None,
        temperature: float = 0.1,
        candidates: int = 50,
        negatives: int = 8,
        refresh_every: int = 1,
        learning_rate: float = 1e-3,
    ) -> None:
        super().__init__()
        self.query_encoder = query_encoder(dim)
        self.document_encoder = self.query_encoder if document_encoder is None else document_encoder(dim)
        self.temperature = temperature
        self.candidates = candidates
        self.negatives = negatives
        self.refresh_every = refresh_every
        self.learning_rate = learning_rate
        # The index follows from the weights and the data: a checkpoint needs no copy of it.
        self.index = FlatIndex(self.query_encoder.dim_out, metric="cosine", index_in_state_dict=False)
        prepare_for_ddp(self)

    @property
    def data(self) -> RetrievalData:
        """The data that the trainer runs on."""
        return self.trainer.datamodule

    def on_train_epoch_start(self) -> None:
        """Refresh the index when it is due, or empty because a run was resumed."""
        if self.current_epoch % self.refresh_every == 0 or not len(self.index):
            self.refresh_index()

    @torch.no_grad()
    def refresh_index(self) -> None:
        """Replace what the index holds by the embeddings of the corpus under the present weights."""
        self.document_encoder.eval()
        parts = [self.document_encoder(part.to(self.device)) for part in self.data.corpus.split(8192)]
        self.document_encoder.train()
        self.index.reset()
        # Automatic ids would go on after those of the last epoch; these are rows of the corpus.
        self.index.add(torch.cat(parts), ids=torch.arange(len(self.data.corpus), device=self.device))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the contrastive loss of a batch of queries."""
        queries = self.query_encoder(batch["queries"])
        positive_rows = self.data.draw_positives(batch)
        negative_rows = self.draw_negatives(queries.detach(), batch)
        positives = self.embed_corpus(positive_rows)
        negatives = self.embed_corpus(negative_rows.clamp_min(0))

        in_batch = queries @ positives.T
        own = torch.eye(len(queries), dtype=torch.bool, device=self.device)
        also_relevant = self.data.is_relevant(batch, positive_rows) & ~own
        mined = torch.einsum("qd,qnd->qn", queries, negatives)
        scores = torch.cat(
            [
                in_batch.masked_fill(also_relevant, -torch.inf),
                # A corpus with few wrong answers leaves places empty.
                mined.masked_fill(negative_rows < 0, -torch.inf),
            ],
            dim=1,
        )
        target = torch.arange(len(queries), device=self.device)
        loss = functional.cross_entropy(scores / self.temperature, target)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def draw_negatives(self, queries: Tensor, batch: Batch) -> Tensor:  # (B, negatives)
        """Return rows of the corpus that are near the queries and wrong."""
        found = self.index.search(queries, self.candidates, **self.data.only_negatives(batch)).ids
        columns = torch.rand(found.shape, device=found.device).argsort(dim=1)[:, : self.negatives]
        return found.gather(1, columns)

    def embed_corpus(self, rows: Tensor) -> Tensor:  # (...) -> (..., dim_out)
        """Return the embeddings of rows of the corpus, with gradients."""
        samples = self.data.corpus[rows.flatten().cpu()].to(self.device)
        return self.document_encoder(samples).unflatten(0, rows.shape)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Batch:
        """Return the embeddings of a batch; `RetrievalEvaluation` measures them."""
        encoders = {
            "embeddings": self.query_encoder,
            "queries": self.query_encoder,
            "documents": self.document_encoder,
        }
        return {name: encoders[name](x) if name in encoders else x for name, x in batch.items()}

    def configure_optimizers(self) -> dict[str, Any]:
        """Return AdamW with a cosine schedule over all steps."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
