import pytest
import torch
import torch.distributed
from torch._subclasses.fake_tensor import FakeTensorMode

from elips_torch.core.errors import ArgumentError, ShapeError
from elips_torch.training import gather

GLOO, NCCL, BOTH, MPI = "cpu:gloo,cuda:gloo", "cuda:nccl", "cpu:gloo,cuda:nccl", "cpu:mpi,cuda:mpi"


@pytest.fixture
def group(monkeypatch):
    """Two processes with the same batch, of a backend that takes tensors where it says."""

    def start(config, exchanges_on):
        def all_gather(parts, own):
            assert {own.device.type, *(part.device.type for part in parts)} == {exchanges_on}
            for part in parts:
                part.copy_(own)

        for name, stand_in in {
            "is_initialized": lambda: True,
            "get_backend_config": lambda: config,
            "get_world_size": lambda: 2,
            "get_rank": lambda: 1,
            "all_gather": all_gather,
        }.items():
            monkeypatch.setattr(torch.distributed, name, stand_in)

    return start


@pytest.mark.parametrize(
    ("config", "device", "expected"),
    [
        (GLOO, "cpu", "cpu"),
        (GLOO, "cuda:3", "cpu"),
        (NCCL, "cuda:3", "cuda:3"),
        (NCCL, "cpu", "cuda"),
        (BOTH, "cpu", "cpu"),
        (BOTH, "cuda:3", "cuda:3"),
        (MPI, "cuda:3", "cuda:3"),
        ("xpu:xccl", "cpu", "xpu"),
    ],
)
def test_where_tensors_are_exchanged(group, config, device, expected):
    group(config, None)
    assert gather.exchange_device(torch.device(device)) == torch.device(expected)


@pytest.mark.parametrize(
    ("config", "exchanges_on", "held_on"),
    [(GLOO, "cpu", "cuda"), (NCCL, "cuda", "cpu"), (BOTH, "cuda", "cuda"), (GLOO, "cpu", "cpu")],
)
def test_a_batch_goes_where_the_group_exchanges_and_comes_back(
    group, monkeypatch, config, exchanges_on, held_on
):
    if "cuda" in (exchanges_on, held_on) and not torch.backends.cuda.is_built():
        pytest.skip("this torch is built without CUDA: not even fake tensors move there")
    group(config, exchanges_on)
    # Of tensors that are fake there are no numbers.
    sizes_on = []
    monkeypatch.setattr(
        gather, "_gather_sizes", lambda size, place: sizes_on.append(place.type) or [size, size]
    )
    with FakeTensorMode():
        columns = torch.ones(3, 4, device=held_on), torch.ones(3, dtype=torch.int64, device=held_on)
        gathered, own = gather.gather_batch(columns, None, columns[0].device)
        assert [(column.device.type, column.shape[0]) for column in gathered] == [(held_on, 6)] * 2
        assert [column.dtype for column in gathered] == [torch.float32, torch.int64]
    assert sizes_on == [exchanges_on]
    assert own == slice(3, 6)


def test_rows_keep_their_order_and_a_fault_reaches_all(group):
    group(GLOO, "cpu")
    batch = torch.arange(6.0).reshape(3, 2)
    (rows,), own = gather.gather_batch((batch,), None, batch.device)
    assert torch.equal(rows, torch.cat([batch, batch]))
    assert torch.equal(rows[own], batch)
    with pytest.raises(ShapeError, match="mine"):
        gather.gather_batch((batch,), ShapeError("mine"), batch.device)
    with pytest.raises(ArgumentError, match="the batch of rank 0 was refused there"):
        gather.gather_batch(None, None, batch.device)
