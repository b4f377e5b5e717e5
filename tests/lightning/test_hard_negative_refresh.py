import json
import types
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset

from elips_torch import ArgumentError, DtypeError, FlatIndex, ShapeError
from elips_torch.lightning import HardNegativeRefresh, IndexRefresh
from elips_torch.training import HardNegativeMiner

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # A resumed run writes where the first one did.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
    # Lightning uses what newer torch deprecates.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
]

N, Q = 40, 19


class Rows(Dataset):
    """Training samples; once it has negatives, a sample brings its own along."""

    def __init__(self, **columns):
        self.columns, self.negatives = columns, None

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, row):
        own = {} if self.negatives is None else {"negatives": self.negatives[row]}
        return {name: column[row] for name, column in self.columns.items()} | own

    def set_negatives(self, negatives):
        assert negatives.device.type == "cpu"
        self.negatives = negatives


class Data(LightningDataModule):
    def __init__(self, workers=0, persistent=False):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.documents = Rows(documents=torch.randn(N, 6, generator=generator))
        self.relevant = torch.randint(-1, N, (Q, 3), generator=generator)
        rows = torch.randn(Q, 6, generator=generator)
        self.train = Rows(queries=rows, relevant=self.relevant, row=torch.arange(Q))
        self.options = {"num_workers": workers, "persistent_workers": persistent}
        self.tables = []

    def set_negatives(self, negatives):
        self.tables.append(negatives.clone())
        self.train.set_negatives(negatives)

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=4, shuffle=True, **self.options)

    def in_order(self):
        return DataLoader(self.train, batch_size=4)

    def corpus(self):
        return DataLoader(self.documents, batch_size=7)


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.map = nn.Linear(6, 4, bias=False)
        nn.init.normal_(self.map.weight, generator=torch.Generator().manual_seed(3))
        self.index = FlatIndex(4, "cosine", index_in_state_dict=False)
        self.seen = []

    def retrieval_step(self, batch):
        return {name: self.map(x) if name in ("queries", "documents") else x for name, x in batch.items()}

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch["row"].clone(), batch["negatives"].clone()))
        return self.map(batch["queries"]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Still(Model):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def refreshes(data, **options):
    return [
        IndexRefresh("index", data.corpus()),
        HardNegativeRefresh("index", data.in_order(), **{"miner": 5, **options}),
    ]


def trainer(tmp_path, *callbacks, **options):
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(each, ModelCheckpoint) for each in callbacks),
        "default_root_dir": tmp_path,
        "max_epochs": 2,
    }
    return Trainer(callbacks=list(callbacks), **{**quiet, **options})


def expected(model, data, m=5):
    with torch.no_grad():
        queries = nn.functional.normalize(model.map(data.train.columns["queries"]).double())
        documents = nn.functional.normalize(model.map(data.documents.columns["documents"]).double())
    scores = queries @ documents.T
    for row, wanted in enumerate(data.relevant.tolist()):
        scores[row, [each for each in wanted if each >= 0]] = -2
    return scores.topk(m).indices


@pytest.mark.parametrize("workers", [0, 1])
def test_training_sees_the_negatives_of_each_epoch(tmp_path, workers):
    data, model = Data(workers), Model()
    before = expected(model, data)
    trainer(tmp_path, *refreshes(data)).fit(model, data)
    assert len(data.tables) == 2
    assert torch.equal(data.tables[0], before)
    assert not torch.equal(data.tables[0], data.tables[1])
    # Samples come shuffled; each with the row that belongs to it, also from a worker.
    assert {epoch for epoch, _, _ in model.seen} == {0, 1}
    for epoch, rows, negatives in model.seen:
        assert torch.equal(negatives, data.tables[epoch][rows])
    assert not (data.tables[1][:, :, None] == data.relevant[:, None, :]).any()


def test_negatives_are_mined_every_n_epochs(tmp_path):
    data = Data()
    callbacks = refreshes(data, every_n_epochs=2)
    trainer(tmp_path, *callbacks, max_epochs=5).fit(Model(), data)
    assert callbacks[1].refreshes == len(data.tables) == 3


def test_a_resumed_run_has_negatives_again(tmp_path):
    data = Data()
    callbacks = [*refreshes(data, every_n_epochs=4), ModelCheckpoint(tmp_path, save_last=True)]
    trainer(tmp_path, *callbacks, max_epochs=2).fit(Model(), data)
    again, model = Data(), Model()
    callbacks = [*refreshes(again, every_n_epochs=4), ModelCheckpoint(tmp_path, save_last=True)]
    trainer(tmp_path, *callbacks, max_epochs=3).fit(
        model, again, ckpt_path=tmp_path / "last.ckpt", weights_only=True
    )
    assert {epoch for epoch, _, _ in model.seen} == {2}
    assert len(again.tables) == 1
    assert not torch.equal(again.tables[0], data.tables[0])


def two_of_each(model, data, tables):
    def negatives(n, name):
        return HardNegativeRefresh(
            "index", data.in_order(), every_n_epochs=n, receiver=tables.append, name=name
        )

    return [
        IndexRefresh("index", data.corpus()),
        IndexRefresh(model.memory, data.corpus(), every_n_epochs=3),
        negatives(1, "often"),
        negatives(2, "rarely"),
    ]


def test_two_of_each_keep_their_own_state(tmp_path):
    counts = []
    for epochs, checkpoint in ((3, None), (4, tmp_path / "last.ckpt")):
        data, model = Data(), Model()
        data.train.set_negatives(torch.zeros(Q, 1))
        model.memory = FlatIndex(4, "cosine")
        callbacks = two_of_each(model, data, [])
        run = trainer(tmp_path, *callbacks, ModelCheckpoint(tmp_path, save_last=True), max_epochs=epochs)
        run.fit(model, data, ckpt_path=checkpoint, weights_only=None if checkpoint is None else True)
        counts.append([callback.refreshes for callback in callbacks])
    # The second run is of epoch 3 alone; at its start the first index is empty, and there are no negatives.
    assert counts == [[3, 1, 3, 2], [4, 2, 4, 3]]


def test_two_that_would_share_their_state_are_refused(tmp_path):
    data = Data()
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        trainer(tmp_path, *refreshes(data), *refreshes(data))


def test_samples_of_the_same_label_are_no_negatives(tmp_path):
    generator = torch.Generator().manual_seed(4)
    rows, labels = torch.randn(30, 6, generator=generator), torch.arange(30) % 4
    received = []
    refresh = HardNegativeRefresh(
        "index",
        DataLoader(Rows(queries=rows, labels=labels), batch_size=4),
        miner=30,
        labels=labels,
        receiver=received.append,
    )
    data = Data()
    data.train.set_negatives(torch.zeros(Q, 1))
    corpus = DataLoader(Rows(documents=rows), batch_size=8)
    trainer(tmp_path, IndexRefresh("index", corpus), refresh, max_epochs=1).fit(Model(), data)
    (table,) = received
    for row, found in enumerate(table.tolist()):
        others = [other for other in range(30) if labels[other] != labels[row]]
        # Fewer than asked for: marked by -1.
        assert sorted(each for each in found if each >= 0) == others
        assert found[len(others) :] == [-1] * (30 - len(others))


def test_a_miner_gets_positives(tmp_path):
    data, model = Data(), Model()
    wanted = expected(model, data, 6)[:, 3:]
    miner = HardNegativeMiner(3, range_min=3)
    trainer(tmp_path, *refreshes(data, miner=miner), max_epochs=1).fit(model, data)
    assert torch.equal(data.tables[0], wanted)


def test_a_miner_gets_labels(tmp_path):
    def step(module, batch):
        return {"queries": module.map(batch["queries"]), "labels": batch["row"] % 3}

    tables = []
    labels = torch.arange(N) % 3
    data = Data()
    data.train.set_negatives(torch.zeros(Q, 1))
    for miner in (6, HardNegativeMiner(3, range_min=3)):
        options = {"miner": miner, "step": step, "labels": labels, "receiver": tables.append}
        trainer(tmp_path, *refreshes(data, **options), max_epochs=1).fit(Model(), data)
    assert torch.equal(tables[1], tables[0][:, 3:])
    assert (labels[tables[0]] != torch.arange(Q)[:, None] % 3).all()


def test_samples_without_any_negative_are_named(tmp_path):
    data = Data()
    data.train.columns["relevant"] = torch.arange(N).expand(Q, N)
    with pytest.warns(UserWarning, match=f"{Q} of {Q} training samples have no negative"):
        trainer(tmp_path, *refreshes(data), max_epochs=1).fit(Model(), data)
    assert (data.tables[0] == -1).all()


class Report(Callback):
    def __init__(self, folder):
        self.folder = str(folder)

    def on_train_end(self, trainer, pl_module):
        tables = [table.tolist() for table in trainer.datamodule.tables]
        Path(self.folder, f"{trainer.world_size}-{trainer.global_rank}.json").write_text(json.dumps(tables))


def mine_five(index, queries, positives):
    return HardNegativeMiner(5).mine(index, queries, positives)


def test_two_processes_mine_what_one_would(tmp_path):
    for options in ({}, {"devices": 2, "strategy": "ddp_spawn"}):
        data = Data()
        callbacks = refreshes(data, miner=mine_five)
        trainer(tmp_path, *callbacks, Report(tmp_path), **options).fit(Still(), data)
    one, *ranks = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert len(one) == 2
    assert all(rank == one for rank in ranks)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"miner": 0}, ArgumentError, "miner is 0"),
        ({"receiver": 3}, DtypeError, "receiver is a int without set_negatives"),
        (
            {"miner": lambda index, queries, positives: index.search(queries[0], 3)},
            ShapeError,
            r"the miner found \(3,\) ids, expected \(4, M\)",
        ),
        ({"step": lambda module, batch: module.map(batch["queries"])}, ArgumentError, "neither 'relevant'"),
        (
            {"step": lambda module, batch: {"queries": module.map(batch["queries"]), "labels": batch["row"]}},
            ArgumentError,
            "labels= of the documents is not given",
        ),
    ],
)
def test_what_cannot_be_mined_is_refused(tmp_path, options, error, words):
    data = Data()
    with pytest.raises(error, match=words):
        trainer(tmp_path, *refreshes(data, **options)).fit(Model(), data)


def test_an_empty_loader_is_refused(tmp_path):
    data = Data()
    refresh = HardNegativeRefresh("index", [])
    with pytest.raises(ArgumentError, match="queries yields nothing"):
        trainer(tmp_path, IndexRefresh("index", data.corpus()), refresh).fit(Model(), data)


def test_queries_that_run_dry_leave_the_negatives(tmp_path):
    data = Data()
    queries = iter([data.in_order(), []])
    refresh = HardNegativeRefresh("index", lambda trainer: next(queries), miner=3)
    with pytest.warns(UserWarning, match="the negatives that were mined before stay"):
        trainer(tmp_path, IndexRefresh("index", data.corpus()), refresh).fit(Model(), data)
    assert refresh.refreshes == len(data.tables) == 1


# The index is empty when it is searched first.
@pytest.mark.filterwarnings("ignore:.* training samples have no negative")
def test_the_wrong_order_is_warned_of(tmp_path):
    data = Data()
    with pytest.warns(UserWarning, match="comes before the IndexRefresh of its index"):
        trainer(tmp_path, *reversed(refreshes(data)), max_epochs=1).fit(Model(), data)


def test_any_mapping_is_mined_for(tmp_path):
    def step(module, batch):
        output = module.retrieval_step(batch)
        return types.MappingProxyType(output) if "queries" in output else output

    tables = []
    for options in ({}, {"step": step}):
        data = Data()
        trainer(tmp_path, *refreshes(data, **options), max_epochs=1).fit(Model(), data)
        tables.append(data.tables[0])
    assert torch.equal(*tables)


def test_nobody_to_take_the_negatives_is_said(tmp_path):
    data = Data()
    with pytest.raises(ArgumentError, match="set_negatives"):
        trainer(tmp_path, *refreshes(data)).fit(Model(), data.train_dataloader())


def test_workers_that_would_never_see_new_negatives_are_refused(tmp_path):
    data = Data(workers=1, persistent=True)
    with pytest.raises(ArgumentError, match="persistent_workers=True"):
        trainer(tmp_path, *refreshes(data)).fit(Model(), data)
