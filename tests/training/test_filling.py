import collections

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from elips_torch import (
    ArgumentError,
    DtypeError,
    DuplicateIdError,
    FlatIndex,
    IVFFlatIndex,
    NotFittedError,
    PreTransformIndex,
    RandomRotation,
    ShapeError,
)
from elips_torch.testing.contract import unchanged
from elips_torch.training import MemoryBank, fill


def samples(n=10):
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(0))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))
        self.seen = []

    def forward(self, inputs):
        out = self.layers(inputs)
        self.seen.append((self.training, torch.is_grad_enabled(), out.dtype))
        return out


def test_everything_is_embedded_in_eval_mode_and_without_gradients():
    encoder, index = Encoder(), FlatIndex(4)
    encoder.layers[2].eval()
    ids = fill(index, encoder, DataLoader(samples(), batch_size=4))
    assert ids.tolist() == list(range(10))
    assert {seen[:2] for seen in encoder.seen} == {(False, False)}
    # Each part is in the mode it was in.
    assert encoder.training
    assert encoder.layers[1].training
    assert not encoder.layers[2].training
    torch.testing.assert_close(index.vectors, encoder.eval()(samples()).detach())


def test_what_the_index_holds_stays():
    index = FlatIndex(4)
    index.add(torch.ones(2, 4))
    assert fill(index, Encoder(), DataLoader(samples(), batch_size=4)).tolist() == list(range(2, 12))
    assert len(index) == 12


def test_ids_and_inputs_come_from_the_batch():
    index = FlatIndex(4)
    dataset = TensorDataset(torch.arange(10) * 3, samples())
    ids = fill(
        index,
        Encoder(),
        DataLoader(dataset, batch_size=3),
        batch_to_inputs=lambda batch: batch[1],
        batch_to_ids=lambda batch: batch[0],
    )
    assert ids.tolist() == index.ids.tolist() == [3 * i for i in range(10)]


Pair = collections.namedtuple("Pair", ["left", "right"])


@pytest.mark.parametrize(
    ("batch", "encoder"),
    [
        ([samples(), torch.arange(10)], lambda x: x[:, :4]),
        ({"pixels": samples(), "names": ["a"]}, lambda x: x["pixels"][:, :4]),
        (Pair(samples(), [samples()]), lambda x: x.right[0][:, :4]),
    ],
)
def test_batches_of_many_kinds(batch, encoder):
    index = FlatIndex(4)
    fill(index, encoder, [batch])
    assert torch.equal(index.vectors, samples()[:, :4])


def test_inputs_are_moved():
    encoder = Encoder()
    seen = []
    with pytest.raises(DtypeError, match="the encoder returned a NoneType"):
        fill(FlatIndex(4), lambda x: seen.append(x["a"][0].device.type), [{"a": [samples()]}], device="meta")
    assert seen == ["meta"]
    encoder.to("meta")
    with pytest.raises(NotImplementedError, match="meta"):
        fill(FlatIndex(4), encoder, [samples()])


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_autocast(autocast):
    encoder, index = nn.Linear(6, 4), FlatIndex(4)
    seen = []
    encoder.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    fill(index, encoder, [samples()], autocast=autocast)
    assert seen == [autocast or torch.float32]
    assert index.dtype == torch.float32
    seen.clear()
    # The caller's own holds too.
    with torch.autocast("cpu", torch.bfloat16):
        fill(index, encoder, [samples()])
    assert seen == [torch.bfloat16]


def test_progress(capsys):
    fill(FlatIndex(4), Encoder(), DataLoader(samples(), batch_size=4), progress=True)
    assert "filling the index: 100%" in capsys.readouterr().err


class Stream(IterableDataset):
    def __iter__(self):
        return iter(samples())


def test_a_stream_has_no_length(capsys):
    index = FlatIndex(4)
    fill(index, Encoder(), DataLoader(Stream(), batch_size=4), progress=True)
    assert len(index) == 10
    assert "3batch" in capsys.readouterr().err


@pytest.mark.parametrize("loader", [[], DataLoader(samples()[:0]), iter(())])
def test_a_loader_that_yields_nothing(loader):
    encoder, index = Encoder(), FlatIndex(4)
    with unchanged(index), pytest.raises(ArgumentError, match="loader yields no batch, so nothing was added"):
        fill(index, encoder, loader)
    assert encoder.training


def test_a_failure_changes_nothing():
    encoder = Encoder()

    def breaking():
        yield samples()
        raise OSError("the disk is gone")

    for index in (FlatIndex(4), MemoryBank(4, capacity=3)):
        for loader, error in ((breaking(), OSError), ([samples(), samples()[:, :3]], RuntimeError)):
            with pytest.raises(error):
                fill(index, encoder, loader)
            assert len(index) == 0
        assert encoder.training
    index = FlatIndex(4)
    with pytest.raises(DuplicateIdError):
        fill(index, encoder, [samples()] * 2, batch_to_ids=lambda batch: torch.arange(10))
    assert len(index) == 0
    with pytest.raises(ShapeError, match="vectors has dim 6"):
        fill(index, nn.Identity(), [samples()])


@pytest.mark.parametrize("in_state_dict", [True, False])
def test_what_a_failure_drove_out_of_a_bank_comes_back(in_state_dict):
    bank = MemoryBank(4, capacity=6, index_in_state_dict=in_state_dict)
    bank.enqueue(samples(6)[:, :4], torch.arange(6))
    queries = samples(3)[:, :4]
    before = bank.search(queries, 3)
    with unchanged(bank), pytest.raises(ShapeError):
        fill(bank, nn.Identity(), [samples()[:4, :4], samples()[4:8, :4], samples()[:2]])
    assert bank.index_in_state_dict == in_state_dict
    assert bank.ids.tolist() == bank.labels.tolist() == list(range(6))
    assert bank.ages.tolist() == [0] * 6
    assert torch.equal(bank.search(queries, 3).ids, before.ids)
    # Ids go on as if nothing had been tried.
    assert bank.enqueue(queries).tolist() == [6, 7, 8]


def test_a_bank_inside_another_index_comes_back_too():
    bank = MemoryBank(4, capacity=6)
    index = PreTransformIndex(RandomRotation(4, 4), bank)
    index.add(samples(6)[:, :4])
    queries = samples(3)[:, :4].requires_grad_()
    before = index.search(queries, 3)
    with unchanged(index), pytest.raises(ShapeError):
        fill(index, nn.Identity(), [samples()[:4, :4], samples()[4:8, :4], samples()[:2]])
    assert torch.equal(index.search(queries, 3).ids, before.ids)
    # What was searched before goes back through the rows as they were.
    before.scores.sum().backward()
    assert queries.grad.abs().sum() > 0


def test_an_index_must_be_fitted_first():
    with pytest.raises(NotFittedError, match="IVFFlatIndex must be fitted before it is filled"):
        fill(IVFFlatIndex(4, nlist=2), Encoder(), [samples()])


def test_what_is_no_index_is_refused():
    with pytest.raises(DtypeError, match="index is a Encoder, expected an Index"):
        fill(Encoder(), FlatIndex(4), [samples()])
