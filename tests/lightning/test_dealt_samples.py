import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, SequentialSampler

from elips_torch import DuplicateIdError, index_factory
from elips_torch.lightning import RetrievalEvaluation, dealt_samples
from elips_torch.lightning.dealt_samples import places_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # The data is small on purpose.
    pytest.mark.filterwarnings("ignore:vectors has .* rows to fit"),
    # Lightning uses what newer torch deprecates.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
]

N = 37


class Samples(Dataset):
    def __len__(self):
        return N

    def __getitem__(self, row):
        generator = torch.Generator().manual_seed(row)
        return {"x": torch.randn(4, generator=generator), "label": row % 5, "row": row}


class Model(LightningModule):
    def validation_step(self, batch, batch_idx):
        pass


class OwnBatches(BatchSampler):
    """What Lightning gives a sampler of its own, and puts into the loader as a whole."""


class OwnOrder(BatchSampler):
    """Batches of other sizes, in the order of the sampler."""

    def __iter__(self):
        rows = list(self.sampler)
        cut = len(rows) // 3
        yield from (rows[:cut], rows[cut : 2 * cut], rows[2 * cut :])


def plain(module, batch, dataloader_idx):
    return {"embeddings": batch["x"], "labels": batch["label"]}


def two_views(module, batch, dataloader_idx):
    return {
        "embeddings": torch.cat([batch["x"], batch["x"].flip(1)]),
        "labels": torch.cat([batch["label"]] * 2),
    }


def woven_views(module, batch, dataloader_idx):
    views = torch.stack([batch["x"], batch["x"].flip(1)], 1)
    return {"embeddings": views.flatten(0, 1), "labels": batch["label"].repeat_interleave(2)}


def triplets(module, batch, dataloader_idx):
    return {
        "queries": batch["x"],
        "relevant": batch["row"],
        "documents": torch.cat([batch["x"].flip(1), batch["x"] ** 2]),
        "ids": torch.cat([batch["row"], batch["row"] + 1000]),
    }


STEPS = {"plain": plain, "views": two_views, "woven": woven_views, "triplets": triplets}


class Reporting(Callback):
    def __init__(self, folder):
        self.folder = str(folder)

    def on_validation_end(self, trainer, pl_module):
        logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
        report = {name: value for name, value in logged.items() if not name.endswith("seconds")}
        Path(self.folder, f"{trainer.world_size}-{trainer.global_rank}.json").write_text(json.dumps(report))


def quiet_trainer(tmp_path, *callbacks, **options):
    return Trainer(
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        **options,
    )


def one_of_six_lists(dim):
    return index_factory(dim, "IVF6,Flat", "cosine", nprobe=1)


@pytest.mark.parametrize("batches", [OwnBatches, OwnOrder])
def test_repeats_are_dropped_whatever_a_step_makes_of_a_sample(tmp_path, batches):
    data = Samples()
    for options in ({}, {"devices": 2, "strategy": "ddp_spawn"}):
        loader = DataLoader(data, batch_sampler=batches(SequentialSampler(data), 8, False))
        evaluations = [
            # What an index of lists learns depends on the order of the rows, and so do its numbers.
            RetrievalEvaluation(k=(1, 5), index=index, step=step, prefix=f"{name}/{kind}/")
            for name, step in STEPS.items()
            for kind, index in {"flat": None, "lists": one_of_six_lists}.items()
        ]
        quiet_trainer(tmp_path, *evaluations, Reporting(tmp_path), **options).validate(
            Model(), loader, verbose=False
        )
    one, *ranks = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    for name in STEPS:
        assert 0 < one[f"{name}/flat/recall@5"] < 1
        assert 0 < one[f"{name}/lists/index_recall@5"] < 1
    assert all(rank == one for rank in ranks)


class Pair:
    """Two processes in one: what both exchange is known beforehand, call by call."""

    count = 2

    def __init__(self, rank, told):
        self.rank, self.told, self.calls = rank, told, 0

    def _exchanged(self, value):
        calls = self.told.setdefault(self.calls, {})
        calls[self.rank] = value
        self.calls += 1
        return [calls.get(rank, value) for rank in range(2)]

    def objects(self, value):
        return self._exchanged(value)

    def rows(self, value):
        return torch.cat(self._exchanged(value))


def dealt(batches_of, n=5, size=2, unique=False, name="rows"):
    """Return the places of the rows of two processes; each answers until both know all."""
    told = {}
    for _ in range(4):
        found = []
        for rank in range(2):
            sampler = DistributedSampler(range(n), num_replicas=2, rank=rank, shuffle=False)
            loader = DataLoader(range(n), batch_size=size, sampler=sampler)
            batches = [(i, batches_of(batch)) for i, batch in enumerate(loader)]
            found.append(places_of(batches, len(batches), loader, Pair(rank, told), name=name, unique=unique))
    return found


def test_each_row_has_the_place_that_one_process_gives_it():
    (first, total), (second, _) = dealt(lambda batch: torch.cat([batch, batch]))
    # Each process has two samples and then one; view by view.
    assert total == 10
    assert first.tolist() == [0, 4, 1, 5, 8, 9]
    assert second[:4].tolist() == [2, 6, 3, 7]
    assert (second[4:] >= total).all()
    (first, total), (second, _) = dealt(lambda batch: batch.repeat_interleave(2))
    assert first.tolist() == [0, 1, 4, 5, 8, 9]
    assert second[:4].tolist() == [2, 3, 6, 7]
    assert (second[4:] >= total).all()


def test_an_id_of_a_repeated_sample_counts_once():
    (first, total), (second, _) = dealt(lambda batch: torch.cat([batch, batch + 10]), unique=True)
    assert total == 10
    # By id: 0 to 4, 10 to 14.
    assert first.tolist() == [0, 2, 5, 7, 4, 9]
    assert second[:4].tolist() == [1, 3, 6, 8]
    assert (second[4:] >= total).all()


def test_ids_of_samples_dealt_once_are_all_kept():
    """An id that the user gave twice is refused later, it is no repeat."""
    (first, total), (second, _) = dealt(lambda batch: batch // 2, unique=True)
    assert total == 5
    assert sorted(first.tolist() + second[:2].tolist()) == list(range(5))
    assert second[2] == total


def test_repeats_that_cannot_be_told_are_warned_of_once(monkeypatch):
    monkeypatch.setattr(dealt_samples, "_warnings", type(dealt_samples._warnings)())
    with pytest.warns(UserWarning, match="the data sampler repeats samples .* and the rows do not") as caught:
        found = dealt(lambda batch: torch.arange(len(batch) + int(batch[0])))
    assert len(caught) == 1
    assert all(total == sum(len(places) for places, _ in found) for _, total in found)


def test_ids_that_the_user_repeats_are_still_refused(tmp_path):
    def step(module, batch, dataloader_idx):
        ids = batch["row"] // 2
        return {"queries": batch["x"], "relevant": ids, "documents": batch["x"], "ids": ids}

    evaluation = RetrievalEvaluation(step=step)
    with pytest.raises(DuplicateIdError, match="more than once"):
        quiet_trainer(tmp_path, evaluation).validate(
            Model(), DataLoader(Samples(), batch_size=8), verbose=False
        )
