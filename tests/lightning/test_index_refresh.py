import json
import threading
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from elips_torch import ArgumentError, DtypeError, FlatIndex, IVFFlatIndex, index_factory, prepare_for_ddp
from elips_torch.lightning import IndexRefresh

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # The data is small on purpose.
    pytest.mark.filterwarnings("ignore:vectors has .* rows to (fit|learn)"),
    # A resumed run writes where the first one did.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
    # Lightning uses what newer torch deprecates.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
]

N = 37


def corpus_rows():
    return torch.randn(N, 6, generator=torch.Generator().manual_seed(1))


class Corpus:
    def __init__(self, rows, ids=None):
        self.rows, self.ids = rows, ids

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        return {"documents": self.rows[row]} | ({} if self.ids is None else {"ids": self.ids[row]})


class Model(LightningModule):
    """Its weights change at each step, and it notes which generation of the corpus each step finds."""

    def __init__(self, index=None):
        super().__init__()
        self.map = nn.Linear(6, 4, bias=False)
        nn.init.constant_(self.map.weight, 1.0)
        self.dropout = nn.Dropout(0.5)
        self.index = FlatIndex(4, "ip", index_in_state_dict=False) if index is None else index
        self.seen = []
        prepare_for_ddp(self)

    def training_step(self, batch, batch_idx):
        self.seen.append(self.index.reconstruct(self.index.ids[:1])[0, 0].item())
        assert self.dropout.training
        return self.map(batch).mean()

    def retrieval_step(self, batch):
        assert not torch.is_grad_enabled()
        return {name: self.dropout(self.map(x)) if name == "documents" else x for name, x in batch.items()}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(ids=None, **options):
    return DataLoader(Corpus(corpus_rows(), ids), batch_size=4, **options)


def steps(n):
    return DataLoader(torch.ones(n, 6), batch_size=1)


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


def changes(seen):
    """Return at which steps another generation is seen than at the step before."""
    return [step for step in range(1, len(seen)) if seen[step] != seen[step - 1]]


def test_the_index_holds_the_corpus_as_the_model_embeds_it(tmp_path):
    ids = torch.randperm(1000)[:N]
    model = Model()
    refresh = IndexRefresh("index", loader(ids))
    trainer(tmp_path, refresh).fit(model, steps(5))
    assert changes(model.seen) == [5]
    assert refresh.refreshes == 2
    assert torch.equal(model.index.ids, ids)
    fresh = Model()
    fresh.map.weight.data -= 0.1 * 5 / 4
    expected = fresh.map(corpus_rows()).detach()
    torch.testing.assert_close(model.index.vectors, expected)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"every_n_steps": 3}, [3, 6, 9]), ({"every_n_epochs": 2}, [10]), ({"every_n_steps": 100}, [])],
)
def test_refreshes_come_when_they_are_due(tmp_path, options, expected):
    model = Model()
    trainer(tmp_path, IndexRefresh("index", loader(), **options), max_epochs=3).fit(model, steps(5))
    assert [step for step in changes(model.seen) if step < 12] == expected
    assert torch.equal(model.index.ids, torch.arange(N))


def test_accumulated_gradients_do_not_repeat_a_refresh(tmp_path):
    refresh = IndexRefresh("index", loader(), every_n_steps=1)
    trainer(tmp_path, refresh, max_epochs=1, accumulate_grad_batches=4).fit(Model(), steps(8))
    assert refresh.refreshes == 2


class Gate(Callback):
    """Lets the background thread embed once training has come to a step."""

    def __init__(self, at):
        self.at, self.open, self.threads = at, threading.Event(), set()

    def step(self, module, batch):
        self.threads.add(threading.current_thread().name)
        if threading.current_thread() is not threading.main_thread():
            self.open.wait(20)
        return module.map(batch["documents"])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.at:
            self.open.set()


def test_in_the_background_training_sees_the_old_until_the_new_is_whole(tmp_path):
    gate = Gate(at=7)
    refresh = IndexRefresh("index", loader(), step=gate.step, every_n_steps=4, background=True)
    model = Model()

    class Patient(Callback):
        """Waits at a step for what the gate has let through."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 9:
                refresh._running.exception(20)

    trainer(tmp_path, gate, Patient(), refresh, max_epochs=1).fit(model, steps(12))
    (first, *_) = changes(model.seen)
    assert 7 <= first <= 9
    # What it sees is the model of the fourth step, not that of the step at which it was taken over.
    snapshot = Model()
    snapshot.map.weight.data -= 0.1 * 4 / 4
    assert model.seen[first] == pytest.approx(snapshot.map(corpus_rows())[0, 0].item(), abs=1e-5)
    assert any(name.startswith("index-refresh") for name in gate.threads)
    # A refresh that was under way at the end was waited for; no thread is left.
    assert refresh._running is None
    assert not [each for each in threading.enumerate() if each.name.startswith("index-refresh")]


def test_a_failure_in_the_background_ends_training_with_its_message(tmp_path):
    def step(module, batch):
        if threading.current_thread() is threading.main_thread():
            return module.map(batch["documents"])
        raise OSError("the disk is gone")

    refresh = IndexRefresh("index", loader(), step=step, every_n_steps=2, background=True)
    with pytest.raises(OSError, match="the disk is gone"):
        trainer(tmp_path, refresh).fit(Model(), steps(5))


@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("description", ["IVF4,Flat", "PCA3,IVF4,SQ8", "IVF4,PQ2x4,RFlat"])
def test_any_index_can_be_refreshed(tmp_path, description, refit):
    index = index_factory(4, description, "ip", index_in_state_dict=False)
    learned = []

    class Watch(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            states = [part.centroids for part in index.modules() if hasattr(part, "centroids")]
            learned.append(states[0].clone())

    model = Model(index)
    nn.init.normal_(model.map.weight)
    trainer(tmp_path, IndexRefresh("index", loader(), refit=refit), Watch()).fit(model, steps(3))
    assert len(index) == N
    assert torch.equal(learned[0], learned[1]) != refit
    assert not any("vectors" in name for name in model.state_dict())


def test_a_tuned_parameter_survives(tmp_path):
    model = Model(IVFFlatIndex(4, 4, "ip", nprobe=3))
    trainer(tmp_path, IndexRefresh("index", loader())).fit(model, steps(2))
    assert model.index.nprobe == 3


def test_a_resumed_run_goes_on_where_it_was(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    model, refresh = Model(FlatIndex(4, "ip")), IndexRefresh("index", loader(), every_n_steps=5)
    trainer(tmp_path, refresh, checkpoint, max_epochs=1).fit(model, steps(8))
    resumed, again = Model(FlatIndex(4, "ip")), IndexRefresh("index", loader(), every_n_steps=5)
    trainer(tmp_path, again, ModelCheckpoint(tmp_path, save_last=True), max_epochs=2).fit(
        resumed, steps(8), ckpt_path=tmp_path / "last.ckpt", weights_only=True
    )
    assert refresh.refreshes == 2
    # Steps 10 and 15; what the checkpoint holds needs no refresh.
    assert again.refreshes == 4
    assert changes(resumed.seen) == [2, 7]
    assert resumed.seen[0] == model.seen[-1]


def test_a_resumed_run_fills_an_index_that_the_checkpoint_lacks(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, IndexRefresh("index", loader()), checkpoint, max_epochs=1).fit(Model(), steps(3))
    resumed = Model()
    again = IndexRefresh("index", loader(), every_n_epochs=5)
    trainer(tmp_path, again, ModelCheckpoint(tmp_path, save_last=True), max_epochs=2).fit(
        resumed, steps(3), ckpt_path=tmp_path / "last.ckpt", weights_only=True
    )
    assert len(resumed.index) == N
    assert changes(resumed.seen) == []


def test_embedding_leaves_the_random_numbers_of_training_alone(tmp_path):
    drawn = []

    class Drawing(Model):
        def training_step(self, batch, batch_idx):
            drawn.append(torch.rand(()).item())
            return super().training_step(batch, batch_idx)

    for n in (1, 2):
        torch.manual_seed(0)
        trainer(tmp_path, IndexRefresh("index", loader(), every_n_steps=n)).fit(Drawing(), steps(4))
    assert drawn[:8] == drawn[8:]


class Report(Callback):
    def __init__(self, folder):
        self.folder = str(folder)

    def on_train_end(self, trainer, pl_module):
        index = pl_module.index
        report = {"ids": index.ids.tolist(), "vectors": index.vectors.tolist()}
        Path(self.folder, f"{trainer.world_size}-{trainer.global_rank}.json").write_text(json.dumps(report))


class Still(Model):
    """Learns nothing, so that one process and two embed alike."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize(
    "options", [{}, {"background": True, "every_n_steps": 2}], ids=["plain", "background"]
)
def test_two_processes_hold_what_one_would(tmp_path, options):
    torch.manual_seed(0)
    weights = torch.randn(4, 6)
    for world in (1, 2):
        model = Still()
        model.map.weight.data = weights.clone()
        more = {"devices": 2, "strategy": "ddp_spawn"} if world == 2 else {}
        refresh = IndexRefresh("index", loader(), **options)
        trainer(tmp_path, refresh, Report(tmp_path), **more).fit(model, steps(4))
    one, *ranks = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert one["ids"] == list(range(N))
    assert all(rank == one for rank in ranks)


def test_two_processes_can_share_the_rows_out(tmp_path):
    refresh = IndexRefresh("index", loader(), shard=True)
    run = trainer(tmp_path, refresh, Report(tmp_path), devices=2, strategy="ddp_spawn")
    run.fit(Still(), steps(4))
    first, second = (json.loads((tmp_path / f"2-{rank}.json").read_text())["ids"] for rank in range(2))
    assert sorted(first + second) == list(range(N))
    assert first[:8] == [0, 1, 2, 3, 8, 9, 10, 11]


def test_progress_is_shown_where_the_trainer_shows_its_own(tmp_path, capsys):
    run = trainer(tmp_path, IndexRefresh("index", loader()), enable_progress_bar=True, max_epochs=1)
    run.fit(Model(), steps(2))
    shown = capsys.readouterr()
    assert "refreshing the index" in shown.out + shown.err


def test_a_corpus_that_runs_dry_leaves_the_index(tmp_path):
    corpora = iter([loader(), []])
    model, refresh = Model(), IndexRefresh("index", lambda trainer: next(corpora))
    with pytest.warns(UserWarning, match=f"corpus yields nothing: .* keeps what it holds, {N} vectors"):
        trainer(tmp_path, refresh).fit(model, steps(3))
    assert changes(model.seen) == []
    assert refresh.refreshes == 1


@pytest.mark.parametrize("name", ["IVF4,Flat", "", "memory..index"])
def test_what_can_be_no_name_is_refused_at_once(name):
    with pytest.raises(ArgumentError, match="expected the name of the module's attribute"):
        IndexRefresh(name, loader())


@pytest.mark.parametrize(
    ("refresh", "error", "words"),
    [
        (
            lambda: IndexRefresh("indx", loader()),
            ArgumentError,
            "'indx', and Model has no attribute 'indx'; did you mean 'index'?",
        ),
        (lambda: IndexRefresh("memory", loader()), ArgumentError, "'memory'.*; its indexes are 'index'"),
        (lambda: IndexRefresh("index.inner", loader()), ArgumentError, "has no attribute 'inner'"),
        (lambda: IndexRefresh("map", loader()), ArgumentError, "'map', which in Model is a Linear"),
        (lambda: IndexRefresh("index", []), ArgumentError, "corpus yields nothing"),
        (lambda: IndexRefresh("index", loader(shuffle=True)), ArgumentError, "shuffles"),
        (lambda: IndexRefresh(3, loader()), DtypeError, "index is a int"),
        (lambda: IndexRefresh("index", loader(), every_n_steps=0), ArgumentError, "every_n_steps is 0"),
        (
            lambda: IndexRefresh("index", loader(), every_n_steps=1, every_n_epochs=1),
            ArgumentError,
            "both given",
        ),
        (lambda: IndexRefresh("index", loader(torch.zeros(N))), DtypeError, "ids is torch.float32"),
    ],
)
def test_what_cannot_be_refreshed_is_refused(tmp_path, refresh, error, words):
    with pytest.raises(error, match=words):
        trainer(tmp_path, refresh()).fit(Model(), steps(2))
