"""What the callback adds to embedding and searching; `python -m pytest -m slow -s` prints it."""

import statistics
import time

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from elips_torch import FlatIndex
from elips_torch.lightning import RetrievalEvaluation

N_DOCUMENTS, N_QUERIES, DIM, BATCH = 50_000, 5_000, 64, 1_000

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
]


class Batches:
    """A dataset of whole batches, so that loading costs both sides next to nothing."""

    def __init__(self, **columns):
        names, tensors = columns.keys(), [column.split(BATCH) for column in columns.values()]
        self.batches = [dict(zip(names, parts, strict=True)) for parts in zip(*tensors, strict=True)]

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, number):
        return self.batches[number]


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, DIM))

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        return {name: self.encoder(x) if name in ("queries", "documents") else x for name, x in batch.items()}


class Without(LightningModule):
    """The same, with embedding and search written by hand and nothing measured."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def on_validation_epoch_start(self):
        self.queries, self.documents, self.ids = [], [], []

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        outputs = self.model.validation_step(batch, batch_idx)
        if "documents" in outputs:
            self.documents.append(outputs["documents"])
            self.ids.append(outputs["ids"])
        else:
            self.queries.append(outputs["queries"])

    def on_validation_epoch_end(self):
        index = FlatIndex(DIM, "cosine")
        index.add(torch.cat(self.documents), ids=torch.cat(self.ids))
        index.search(torch.cat(self.queries), 10)


@pytest.mark.slow
def test_the_callback_costs_little_beside_embedding_and_search(tmp_path):
    torch.manual_seed(0)
    documents = Batches(documents=torch.randn(N_DOCUMENTS, 128), ids=torch.randperm(N_DOCUMENTS))
    relevant = torch.randint(0, N_DOCUMENTS, (N_QUERIES, 3))
    queries = Batches(queries=torch.randn(N_QUERIES, 128), relevant=relevant)
    loaders = [DataLoader(table, batch_size=None) for table in (queries, documents)]
    model = Model()
    seconds = {"with": [], "without": []}
    for _ in range(12):
        for name, module, callbacks in (
            ("without", Without(model), []),
            ("with", model, [RetrievalEvaluation(k=(1, 5, 10))]),
        ):
            run = Trainer(
                callbacks=callbacks,
                default_root_dir=tmp_path,
                accelerator="cpu",
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                enable_checkpointing=False,
            )
            # The processor's time: that of the wall counts what else the machine does.
            start = time.process_time()
            run.validate(module, loaders, verbose=False)
            seconds[name].append(time.process_time() - start)
    # The two of a round meet the same machine; a single quick or slow one decides nothing.
    ratio = statistics.median(w / p for p, w in zip(seconds["without"], seconds["with"], strict=True))
    print(f"\nwithout {min(seconds['without']):.3f} s, with {min(seconds['with']):.3f} s: {ratio:.3f} of it")
    assert ratio <= 1.2
