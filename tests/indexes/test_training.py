"""An index inside real training: checkpoints, validation that fills it, two processes, workers."""

import copy

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, TensorDataset

from elips_torch import FaissIndex, FlatIndex, prepare_for_ddp
from elips_torch.core.errors import ImplementationError

pytestmark = [
    # Advice about the number of workers, which does not matter here.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*number of training batches.*"),
    pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    # Lightning's own use of what torch deprecates.
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
]


class Model(pl.LightningModule):
    """Trains through the index and adds what it embeds."""

    def __init__(self, fill_in_validation=False):
        super().__init__()
        self.encoder = nn.Linear(6, 4)
        self.index = FlatIndex(4, "cosine", k=3)
        self.fill_in_validation = fill_in_validation

    def training_step(self, batch, _):
        embedded = self.encoder(batch[0])
        if not self.fill_in_validation:
            self.index.add(embedded)
        return self.index(embedded).scores.mean()

    def validation_step(self, batch, _):
        if self.fill_in_validation:
            self.index.add(self.encoder(batch[0]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(n=24):
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(n, 6, generator=generator)), batch_size=8)


def trainer(path, **options):
    return pl.Trainer(
        default_root_dir=path,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def test_a_checkpoint_resumes_with_its_index(tmp_path):
    model = Model()
    first = trainer(tmp_path, max_epochs=1)
    first.fit(model, loader())
    path = first.checkpoint_callback.best_model_path
    assert len(model.index) == 24

    resumed = Model()
    trainer(tmp_path, max_epochs=2).fit(resumed, loader(), ckpt_path=path, weights_only=True)
    assert len(resumed.index) == 48
    assert resumed.index.ids.tolist() == list(range(48))
    assert torch.equal(resumed.index.vectors[:24], model.index.vectors)

    loaded = Model.load_from_checkpoint(path, weights_only=True)
    queries = torch.randn(5, 4)
    assert torch.equal(loaded.index(queries).ids, model.index(queries).ids)


def test_a_model_with_an_index_moves_and_copies():
    model = Model()
    model.index.add(torch.randn(9, 4))
    queries = torch.randn(5, 4)
    expected = model.index(queries).ids
    for other in (
        copy.deepcopy(model),
        model.eval(),
        model.train(),
        model.to("cpu"),
        model.to(torch.float64),
    ):
        assert torch.equal(other.index(queries).ids, expected)
    assert model.half().index.vectors.dtype == torch.float16
    assert model.index.ids.dtype == torch.int64


@pytest.mark.parametrize("deterministic", [False, True])
def test_an_index_filled_by_validation_is_trained_through(tmp_path, deterministic):
    model = Model(fill_in_validation=True)
    runner = trainer(tmp_path, max_epochs=1, deterministic=deterministic, num_sanity_val_steps=0)
    before = model.encoder.weight.detach().clone()
    try:
        runner.validate(model, loader(), verbose=False)
        assert len(model.index) == 24
        trainer(tmp_path, max_epochs=1, deterministic=deterministic).fit(model, loader())
    finally:
        torch.use_deterministic_algorithms(False)
    assert not torch.equal(model.encoder.weight, before)


class Neighbours(Dataset):
    """A data set that searches in its workers."""

    def __init__(self, index, queries):
        self.index = index
        self.queries = queries

    def __len__(self):
        return len(self.queries)

    def __getitem__(self, item):
        return self.index(self.queries[item]).ids


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("kind", ["flat", "faiss"])
# Python 3.12 warns of forking a process with threads, which is what is tested.
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_worker_of_a_data_loader_searches(method, kind):
    torch.manual_seed(0)
    index = FlatIndex(32, k=4) if kind == "flat" else FaissIndex.from_factory(32, "HNSW8", k=4)
    index.add(torch.randn(5000, 32))
    queries = torch.randn(8, 32)
    # The parent has used every thread before it forks.
    expected = index(queries).ids
    data = DataLoader(
        Neighbours(index, queries), batch_size=4, num_workers=1, multiprocessing_context=method, timeout=60
    )
    assert torch.equal(torch.cat(list(data)), expected)


def _ddp_rank(rank, port, results):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Module()
    model.encoder = nn.Linear(6, 4)
    model.norm = nn.BatchNorm1d(4)
    model.index = FlatIndex(4, "cosine", k=3)

    def forward(inputs):
        return model.index(model.norm(model.encoder(inputs))).scores.mean()

    model.forward = forward
    torch.manual_seed(rank + 1)
    # Another number of rows on every rank: a broadcast would fail or overwrite them.
    model.index.add(torch.randn(10 + 5 * rank, 4))
    stored = model.index.vectors.clone()
    wrapped = DistributedDataParallel(prepare_for_ddp(model))
    optimiser = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        wrapped(torch.randn(8, 6)).backward()
        optimiser.step()
        model.index.add(torch.randn(2, 4))
    kept = torch.equal(model.index.vectors[: len(stored)], stored) and len(model.index) == len(stored) + 6
    weights = [torch.zeros_like(model.encoder.weight) for _ in range(2)]
    dist.all_gather(weights, model.encoder.weight.detach())
    means = [torch.zeros(4) for _ in range(2)]
    dist.all_gather(means, model.norm.running_mean)
    ignored = sorted(model._ddp_params_and_buffers_to_ignore)
    results[rank] = (kept, torch.equal(*weights), ignored)
    dist.destroy_process_group()


def test_two_processes_train_and_keep_their_own_rows():
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(_ddp_rank, args=(port, results), nprocs=2)
        for rank in (0, 1):
            kept, same_weights, ignored = results[rank]
            assert kept
            assert same_weights
            # What screens the vectors is no state of the module: nobody would broadcast it.
            assert ignored == ["index.ids", "index.vectors"]


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracing_is_refused_in_words():
    index = FlatIndex(8)
    index.add(torch.randn(50, 8))
    with pytest.raises(ImplementationError, match="use torch"):
        torch.jit.trace(lambda queries: index(queries, 3).scores, (torch.randn(2, 8),))
