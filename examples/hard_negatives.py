"""Does mining pay? Train with and without hard negatives, over several seeds, and compare recall@1.

On the handwritten digits that ship with scikit-learn:

    python examples/hard_negatives.py

On embeddings of your own, a safetensors file with `queries`, `documents` and `relevant`:

    python examples/hard_negatives.py FILE.safetensors

Both ways start from the same weights, see the same batches and positives in the same order, and take the
positives of the other queries in the batch as negatives. "mined" adds for each query some of the wrong
answers that rank highest in a memory bank of the corpus, which every batch updates. On digits batches are
small, as large models force them to be: then few of a batch's negatives are hard by chance.

Temperature and learning rate are those at which training without mining did best, on digits with the halves
swapped and on other splits of the embeddings: of 0.2, 0.4 and 0.8, or 0.05, 0.1 and 0.2; of 1e-3 and 3e-3.
"""

import argparse
import dataclasses
import statistics
import time

import torch
from retrieval_data import Batch, DigitsData, EmbeddingsData, RetrievalData
from retriever import DigitEncoder, ResidualAdapter
from torch import Tensor, nn
from torch.nn import functional

from elips_torch import FlatIndex
from elips_torch.training import HardNegativeMiner, MemoryBank, fill


@dataclasses.dataclass(frozen=True)
class Settings:
    """How one model is trained.

    Attributes:
        epochs: passes over the queries.
        batch_size: queries per step.
        temperature: what similarities are divided by in the loss.
        learning_rate: of AdamW, at the start; it falls to zero along a cosine.
        candidates: number of wrong answers that are looked at per query.
        negatives: number drawn from them.
    """

    epochs: int
    batch_size: int
    temperature: float
    learning_rate: float
    candidates: int
    negatives: int


DIGITS = Settings(2, 4, 0.4, 1e-3, candidates=20, negatives=4)
DIGITS_DIM = 8
EMBEDDINGS = Settings(4, 256, 0.1, 1e-3, candidates=50, negatives=8)


class HardNegatives:
    """Finds wrong answers in a memory bank that holds the corpus as batches embedded it last."""

    def __init__(self, data: RetrievalData, dim: int, settings: Settings, seed: int) -> None:
        self.data = data
        self.bank = MemoryBank(dim, capacity=len(data.corpus))
        self.miner = HardNegativeMiner(
            settings.negatives, range_max=settings.candidates, sampling_strategy="random", seed=seed
        )

    def refresh(self, encoder: nn.Module) -> None:
        """Embed the whole corpus anew."""
        self.bank.reset()
        parts = [(self.data.corpus[rows], rows) for rows in torch.arange(len(self.data.corpus)).split(8192)]
        # The ids are the rows of the corpus.
        fill(self.bank, encoder, parts, batch_to_ids=lambda part: part[1])

    def draw(self, queries: Tensor, batch: Batch) -> Tensor:
        """Return rows ``(B, negatives)`` of the corpus, -1 where there are too few wrong answers."""
        return self.miner.mine(self.bank, queries, **self.data.only_negatives(batch)).ids

    def remember(self, rows: Tensor, embeddings: Tensor) -> None:
        """Put what a step has embedded in place of what the bank holds."""
        self.bank.update(rows, embeddings, momentum=0.0)


def train(
    data: RetrievalData, encoders: tuple[nn.Module, nn.Module], mine: bool, settings: Settings, seed: int
) -> None:
    """Train the encoders of queries and documents, which may be one, in place."""
    torch.manual_seed(seed)
    query_encoder, document_encoder = encoders
    parameters = list(dict.fromkeys([*query_encoder.parameters(), *document_encoder.parameters()]))
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate)
    table = data.train_dataloader().dataset
    n_batches = -(-len(table) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * n_batches)
    hard = HardNegatives(data, query_encoder.dim_out, settings, seed) if mine else None
    # Their own generator: what mining draws must not change the batches that follow.
    order = torch.Generator().manual_seed(seed)
    for _ in range(settings.epochs):
        if hard is not None:
            hard.refresh(document_encoder)
        for rows in torch.randperm(len(table), generator=order).split(settings.batch_size):
            batch = table.__getitems__(rows.tolist())
            queries = query_encoder(batch["queries"])
            positives = draw_positives(data, batch, order)
            wrong = positives.new_empty(len(positives), 0) if hard is None else hard.draw(queries, batch)
            # All documents in one pass, so that normalisation over the batch treats right and wrong alike.
            drawn = torch.cat([positives, wrong.clamp_min(0).flatten()])
            documents = document_encoder(data.corpus[drawn])
            if hard is not None:
                hard.remember(drawn, documents)
            right, found = documents[: len(queries)], documents[len(queries) :]
            own = torch.eye(len(queries), dtype=torch.bool)
            also_relevant = data.is_relevant(batch, positives) & ~own
            in_batch = (queries @ right.T).masked_fill(also_relevant, -torch.inf)
            hardest = torch.einsum("qd,qnd->qn", queries, found.unflatten(0, wrong.shape))
            scores = torch.cat([in_batch, hardest.masked_fill(wrong < 0, -torch.inf)], 1)
            loss = functional.cross_entropy(scores / settings.temperature, torch.arange(len(queries)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def draw_positives(data: RetrievalData, batch: Batch, generator: torch.Generator) -> Tensor:
    """Return a relevant row per query, drawn by a generator of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        return data.draw_positives(batch)


@torch.no_grad()
def recall_at_1(data: RetrievalData, encoders: tuple[nn.Module, nn.Module]) -> float:
    """Return the share of held-out queries whose nearest neighbour is right."""
    for encoder in encoders:
        encoder.eval()
    query_encoder, document_encoder = encoders
    index = FlatIndex(query_encoder.dim_out, metric="cosine")
    if isinstance(data, DigitsData):
        index.add(query_encoder(data.test))
        found = index.search(index.vectors, k=1, exclude_self=True).ids[:, 0]
        right = data.test_labels[found] == data.test_labels
    else:
        fill(index, document_encoder, data.corpus.split(8192))
        test = data.test.columns
        right = (index.search(query_encoder(test["queries"]), k=1).ids == test["relevant"]).any(1)
    for encoder in encoders:
        encoder.train()
    return right.float().mean().item()


def run(path: str | None, seed: int, settings: Settings) -> dict[str, float]:
    """Return recall@1 before training and after, without and with mining, for one seed."""
    data = DigitsData() if path is None else EmbeddingsData(path, seed=seed)
    results = {}
    for name in ("in-batch", "mined"):
        torch.manual_seed(seed)
        if path is None:
            encoder = DigitEncoder(data.dim, dim_out=DIGITS_DIM)
            encoders = (encoder, encoder)
        else:
            encoders = (ResidualAdapter(data.dim), ResidualAdapter(data.dim))
        results.setdefault("before", recall_at_1(data, encoders))
        train(data, encoders, name == "mined", settings, seed)
        results[name] = recall_at_1(data, encoders)
    return results


def main() -> None:
    """Run every seed and print recall@1 of each, mean and spread."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", nargs="?", help="safetensors file; without it, digits")
    parser.add_argument("--seeds", type=int, default=5, help="number of runs (default: %(default)s)")
    parser.add_argument("--epochs", type=int, help="passes over the queries (default: 2 on digits, else 4)")
    options = parser.parse_args()
    settings = DIGITS if options.path is None else EMBEDDINGS
    if options.epochs is not None:
        settings = dataclasses.replace(settings, epochs=options.epochs)
    began, rows = time.perf_counter(), []
    print(f"{'recall@1':<12}{'before':>10}{'in-batch':>10}{'mined':>10}{'gain':>10}")
    for seed in range(options.seeds):
        result = run(options.path, seed, settings)
        rows.append([*result.values(), result["mined"] - result["in-batch"]])
        print(f"{f'seed {seed}':<12}" + "".join(f"{value:>10.4f}" for value in rows[-1]), flush=True)
    columns = list(zip(*rows, strict=True))
    print(f"{'mean':<12}" + "".join(f"{statistics.mean(column):>10.4f}" for column in columns))
    if len(rows) > 1:
        print(f"{'deviation':<12}" + "".join(f"{statistics.stdev(column):>10.4f}" for column in columns))
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
