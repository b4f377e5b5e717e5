import json
import os
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from elips_torch import FlatIndex, ProcessError
from elips_torch.lightning import IndexRefresh
from elips_torch.lightning.gather import Processes


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.map = nn.Linear(6, 4)
        self.index = FlatIndex(4, index_in_state_dict=False)

    def training_step(self, batch, batch_idx):
        return self.map(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def breaks_in_the_background(module, batch):
    if threading.current_thread() is not threading.main_thread() and torch.distributed.get_rank() == 1:
        raise OSError("the disk is gone")
    return module.map(batch)


def breaks_at_once(module, batch):
    if torch.distributed.get_rank() == 1:
        raise OSError("the disk is gone")
    return module.map(batch)


def never_breaks(module, batch):
    return module.map(batch)


STEPS = {
    "in the background": breaks_in_the_background,
    "at once": breaks_at_once,
    "not at all": never_breaks,
}


def groups():
    return len(torch.distributed.distributed_c10d._world.pg_map)


class Counting(IndexRefresh):
    """Notes the process groups before and after it cleans up."""

    counts = ()

    def _give_up(self):
        before = groups()
        super()._give_up()
        self.counts = (*self.counts, before, groups())


def train(rank, port, folder):
    """Train as one of two processes that something else has started."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="0",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        GROUP_RANK="0",
    )
    reports = {case: train_once(step, folder) for case, step in STEPS.items()}
    Path(folder, f"{rank}.json").write_text(json.dumps(reports))


def train_once(step, folder):
    corpus = DataLoader(torch.randn(30, 6), batch_size=2)
    refresh = Counting("index", corpus, step=step, every_n_steps=2, background=True)
    run = Trainer(
        callbacks=[refresh],
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
    )
    error = None
    try:
        run.fit(Model(), DataLoader(torch.ones(40, 6), batch_size=1))
    except (ProcessError, OSError) as raised:
        error = f"{type(raised).__name__}: {raised}"
    threads = [each.name for each in threading.enumerate() if each.name.startswith("index-refresh")]
    return {"error": error, "groups": refresh.counts, "threads": threads}


def test_what_fails_on_one_process_fails_on_all(tmp_path):
    torch.multiprocessing.start_processes(
        train, (find_free_network_port(), str(tmp_path)), nprocs=2, start_method="spawn"
    )
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    told = "ProcessError: process 1 failed while embedding the corpus: OSError: the disk is gone"
    for case in STEPS:
        errors = [rank[case]["error"] for rank in ranks]
        assert errors == ([None, None] if case == "not at all" else [told, "OSError: the disk is gone"])
        # The group of the refresh is gone, that of the run is left; no thread waits for what never comes.
        assert all(rank[case]["groups"][:2] == [2, 1] for rank in ranks)
        assert all(rank[case]["threads"] == [] for rank in ranks)


def test_one_process_agrees_with_itself():
    processes = Processes(torch.device("cpu"))
    with processes.agreeing("while testing"):
        assert processes.objects(3) == [3]
    with pytest.raises(OSError, match="own words"), processes.agreeing("while testing"):
        raise OSError("own words")
