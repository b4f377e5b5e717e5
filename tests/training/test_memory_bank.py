import copy
import io
from typing import ClassVar

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st

from elips_torch import (
    ArgumentError,
    DtypeError,
    FlatIndex,
    NonFiniteError,
    PreTransformIndex,
    RandomRotation,
    RefineIndex,
    ShapeError,
    UnknownIdError,
    load_index,
)
from elips_torch.testing import IndexContract
from elips_torch.testing.contract import assert_same, unchanged
from elips_torch.training import MemoryBank


class TestMemoryBankIsAnIndex(IndexContract):
    index_class = MemoryBank
    options: ClassVar = {"capacity": 4096}


def rows(n, seed=0, dim=4):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def test_the_oldest_leave_first():
    bank = MemoryBank(4, capacity=5)
    assert bank.enqueue(rows(3), torch.tensor([10, 11, 12])).tolist() == [0, 1, 2]
    assert bank.enqueue(rows(4, 1), torch.tensor([13, 14, 15, 16])).tolist() == [3, 4, 5, 6]
    assert bank.ids.tolist() == [2, 3, 4, 5, 6]
    assert bank.labels.tolist() == [12, 13, 14, 15, 16]
    assert bank.ages.tolist() == [1, 0, 0, 0, 0]
    torch.testing.assert_close(bank.vectors, torch.cat([rows(3)[2:], rows(4, 1)]), rtol=0, atol=0)
    assert 1 not in bank


def test_a_batch_beyond_the_capacity_keeps_its_end():
    bank = MemoryBank(4, capacity=3)
    assert bank.enqueue(rows(8), torch.arange(8)).tolist() == list(range(8))
    assert bank.ids.tolist() == bank.labels.tolist() == [5, 6, 7]
    assert bank.enqueue(rows(1)).tolist() == [8]
    bank.add(rows(5), ids=[100, 90, 80, 70, 60])
    assert bank.ids.tolist() == [80, 70, 60]
    assert bank.enqueue(rows(1)).tolist() == [101]


@settings(max_examples=40, deadline=None)
@given(
    capacity=st.integers(1, 12),
    steps=st.lists(
        st.tuples(st.sampled_from(["enqueue", "add", "own", "remove", "search"]), st.integers(0, 9)),
        max_size=25,
    ),
    screen=st.sampled_from(["none", "int8", "auto"]),
)
def test_a_bank_is_the_end_of_a_list(capacity, steps, screen):
    """Whatever is done, it holds and finds what an index of the last vectors does."""
    bank = MemoryBank(4, capacity, "l2", screen=screen)
    held, largest = [], -1
    for number, (verb, n) in enumerate(steps):
        new = rows(n, number)
        if verb == "remove":
            gone = [entry[0] for entry in held[: n // 2]]
            bank.remove(gone)
            held = held[n // 2 :]
            continue
        if verb != "search":
            # Own ids descend, so that the map of ids has work to do.
            own = [largest + n - j for j in range(n)] if verb == "own" else None
            ids = bank.enqueue(new) if verb == "enqueue" else bank.add(new, ids=own)
            held = (held + list(zip(ids.tolist(), new, strict=True)))[-capacity:]
            largest = max([largest, *ids.tolist()])
        assert bank.ids.tolist() == [entry[0] for entry in held]
        other = FlatIndex(4, "l2")
        if held:
            other.add(torch.stack([entry[1] for entry in held]), ids=bank.ids)
        queries = rows(3, 99)
        assert_same(bank.search(queries, 5), other.search(queries, 5))
        assert_same(
            bank.search(queries, 5, exclude=bank.ids[None, :2].expand(3, -1)),
            other.search(queries, 5, exclude=bank.ids[None, :2].expand(3, -1)),
        )


def test_enqueueing_costs_no_copy_of_the_bank():
    bank = MemoryBank(4, capacity=100, screen="none")
    moves, address = 0, None
    for step in range(60):
        bank.enqueue(rows(10, step))
        moves += bank.vectors.untyped_storage().data_ptr() != address
        address = bank.vectors.untyped_storage().data_ptr()
    # Every hundred vectors, not every ten.
    assert moves <= 6
    assert bank.vectors.untyped_storage().nbytes() == 2 * bank.vectors.nbytes


def test_a_graph_through_the_vectors_themselves_stays_right():
    bank = MemoryBank(4, capacity=10)
    bank.enqueue(rows(10))
    for step in range(30):
        queries, now = rows(2, 5).requires_grad_(), bank.vectors.clone()
        loss = (queries @ bank.vectors.T).square().sum()
        for seed in range(4):
            bank.enqueue(rows(3, 50 + 4 * step + seed))
        loss.backward()
        torch.testing.assert_close(queries.grad, 2 * queries.detach() @ now.T @ now)


@pytest.mark.parametrize("change", ["enqueue", "update"])
def test_changes_before_the_backward_pass_change_no_gradient(change):
    def gradient(act):
        bank = MemoryBank(4, capacity=20)
        bank.enqueue(rows(20))
        queries = rows(3, 5).requires_grad_()
        loss = bank.search(queries, 4).scores.logsumexp(1).sum()
        if act and change == "enqueue":
            for seed in range(4):
                bank.enqueue(rows(20, seed + 7))
        elif act:
            bank.update(bank.ids, rows(20, 8), momentum=0.0)
        loss.backward()
        return queries.grad

    torch.testing.assert_close(gradient(act=True), gradient(act=False), rtol=0, atol=0)


def test_enqueued_vectors_carry_no_history():
    bank = MemoryBank(4, capacity=20)
    vectors = rows(3).requires_grad_()
    bank.enqueue(vectors * 2)
    assert not bank.vectors.requires_grad
    with torch.inference_mode():
        bank.enqueue(rows(30))
    queries = rows(2, 3).requires_grad_()
    bank(queries, 2).scores.sum().backward()
    assert queries.grad.abs().sum() > 0


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_momentum_moves_rows(metric):
    bank = MemoryBank(4, capacity=6, metric=metric)
    old, new = rows(6), rows(2, 1)
    bank.enqueue(old, torch.arange(6))
    bank.enqueue(rows(0))
    bank.enqueue(rows(1, 3))
    bank.update(torch.tensor([5, 2]), new, momentum=0.75)
    expected = 0.75 * old[[5, 2]] + 0.25 * new
    if metric == "cosine":
        mixed = 0.75 * old[[5, 2]] / old[[5, 2]].norm(dim=1, keepdim=True)
        mixed += 0.25 * new / new.norm(dim=1, keepdim=True)
        expected = mixed / mixed.norm(dim=1, keepdim=True)
    torch.testing.assert_close(bank.reconstruct([5, 2]), expected)
    torch.testing.assert_close(bank.reconstruct([1, 3, 4]), old[[1, 3, 4]], rtol=0, atol=0)
    assert bank.labels.tolist() == [1, 2, 3, 4, 5, -1]
    assert bank.ages.tolist() == [1, 0, 1, 1, 0, 0]
    assert bank.search(expected, 1).ids.tolist() == [[5], [2]]


def test_the_last_of_repeated_updates_counts():
    bank = MemoryBank(4, capacity=6)
    bank.enqueue(rows(3))
    bank.update([1, 0, 1], rows(3, 1), momentum=0.0)
    expected = torch.nn.functional.normalize(rows(3, 1)[[1, 2]])
    torch.testing.assert_close(bank.vectors[:2], expected)


def test_a_checkpoint_resumes_exactly():
    bank = MemoryBank(4, capacity=6)
    for seed in range(4):
        bank.enqueue(rows(4, seed), torch.full((4,), seed))
    file = io.BytesIO()
    torch.save(bank.state_dict(), file)
    file.seek(0)
    other = MemoryBank(4, capacity=6)
    other.load_state_dict(torch.load(file, weights_only=True))
    for each in (bank, other, copy.deepcopy(bank)):
        each.update([14], rows(1, 7))
        assert each.enqueue(rows(3, 9), torch.tensor([5, 5, 5])).tolist() == [16, 17, 18]
    for name, tensor in bank.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=0, atol=0, msg=name)
    assert other.ages.tolist() == bank.ages.tolist() == [1, 1, 1, 0, 0, 0]
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in bank.state_dict().values())


def test_files_keep_labels(tmp_path):
    bank = MemoryBank(4, capacity=6, metric="ip")
    bank.enqueue(rows(9), torch.arange(9))
    bank.save(tmp_path / "bank.safetensors")
    other = load_index(tmp_path / "bank.safetensors")
    assert isinstance(other, MemoryBank)
    assert (other.capacity, other.metric) == (6, "ip")
    assert other.labels.tolist() == [3, 4, 5, 6, 7, 8]


def test_a_state_beyond_the_capacity_is_refused():
    bank, small = MemoryBank(4, capacity=6), MemoryBank(4, capacity=5)
    bank.enqueue(rows(6))
    with unchanged(small), pytest.raises(RuntimeError, match="got 6 rows, expected at most the capacity 5"):
        small.load_state_dict(bank.state_dict())


def test_upsert_keeps_labels():
    bank = MemoryBank(4, capacity=4)
    bank.enqueue(rows(3), torch.tensor([7, 8, 9]))
    bank.upsert(rows(3, 1), [2, 50, 60])
    assert bank.ids.tolist() == [1, 2, 50, 60]
    assert bank.labels.tolist() == [8, 9, -1, -1]


def test_moves_and_casts_keep_integers():
    bank = MemoryBank(4, capacity=4)
    bank.enqueue(rows(6), torch.arange(6) + 2**40 + 1)
    bank.half()
    bank.enqueue(rows(1), torch.tensor([3]))
    assert bank.vectors.dtype == torch.float16
    assert bank.labels.tolist() == [2**40 + 4, 2**40 + 5, 2**40 + 6, 3]
    assert bank.ages.tolist() == [1, 1, 1, 0]


def test_bad_input_changes_nothing():
    bank = MemoryBank(4, capacity=4)
    bank.enqueue(rows(3))
    poor = rows(2)
    poor[1, 2] = torch.nan
    cases = [
        (lambda: bank.enqueue(poor), NonFiniteError, "row 1"),
        (lambda: bank.enqueue(rows(2, dim=5)), ShapeError, "dim 5"),
        (lambda: bank.enqueue(rows(2), torch.zeros(2)), DtypeError, "labels is torch.float32"),
        (lambda: bank.enqueue(rows(2), torch.zeros(3, dtype=torch.int64)), ShapeError, r"expected \(2,\)"),
        (lambda: bank.enqueue(rows(2), torch.tensor([0, -2])), ArgumentError, "labels has -2"),
        (lambda: bank.update([7], rows(1)), UnknownIdError, "ids has 7"),
        (lambda: bank.update([0, 1], rows(1)), ShapeError, "2 entries, expected 1"),
        (lambda: bank.update([0], rows(1), momentum=1.5), ArgumentError, "momentum is 1.5"),
    ]
    for call, error, message in cases:
        with unchanged(bank), pytest.raises(error, match=message):
            call()
    with pytest.raises(ArgumentError, match="capacity is 0"):
        MemoryBank(4, capacity=0)


def test_originals_are_not_kept_beside_a_queue():
    for bank in (MemoryBank(4, capacity=4), PreTransformIndex(RandomRotation(4), MemoryBank(4, capacity=4))):
        with pytest.raises(ArgumentError, match="a MemoryBank, which drops vectors by itself"):
            RefineIndex(bank)


def test_a_compiled_model_sees_the_bank_change():
    bank = MemoryBank(4, capacity=8)
    bank.enqueue(rows(8))
    search = torch.compile(lambda q: bank.search(q, 3), backend="aot_eager", fullgraph=True)
    for seed in range(3):
        bank.enqueue(rows(5, seed))
        assert_same(search(rows(2, 9)), bank.search(rows(2, 9), 3))
    torch._dynamo.reset()


def train_two(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    bank = MemoryBank(4, capacity=7)
    ids = []
    # Uneven and empty batches, and more than the bank holds.
    for step, sizes in enumerate([(2, 3), (0, 2), (4, 1), (0, 0), (6, 5)]):
        own = rows(sizes[rank], 10 * step + rank)
        ids.append(bank.enqueue(own, torch.full((sizes[rank],), 2 * step + rank)).tolist())
    bank.update(bank.ids[-1 - rank :].clone(), rows(1 + rank, 70 + rank))
    before = {name: tensor.clone() for name, tensor in bank.state_dict().items()}
    words = ""
    try:
        bank.enqueue(rows(2), None if rank else torch.tensor([-5, 0]))
    except ArgumentError as error:
        words = str(error)
    unchanged = all(torch.equal(before[name], tensor) for name, tensor in bank.state_dict().items())
    alone = MemoryBank(4, capacity=7, all_processes=False)
    alone.enqueue(rows(1 + rank))
    torch.save(
        {"state": bank.state_dict(), "ids": ids, "words": words, "unchanged": unchanged, "alone": len(alone)},
        f"{folder}/{rank}.pt",
    )
    torch.distributed.destroy_process_group()


def test_two_processes_hold_the_same_bank(tmp_path):
    torch.multiprocessing.spawn(train_two, (str(tmp_path),), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, tensor in one["state"].items():
        torch.testing.assert_close(two["state"][name], tensor, rtol=0, atol=0, msg=name)
    assert one["ids"] == [[0, 1], [], [7, 8, 9, 10], [], [12, 13, 14, 15, 16, 17]]
    assert two["ids"] == [[2, 3, 4], [5, 6], [11], [], [18, 19, 20, 21, 22]]
    # The same as one process that is given the batches of both, rank 0 first.
    bank = MemoryBank(4, capacity=7)
    for step, sizes in enumerate([(2, 3), (0, 2), (4, 1), (0, 0), (6, 5)]):
        both = torch.cat([rows(n, 10 * step + rank) for rank, n in enumerate(sizes)])
        bank.enqueue(both, torch.tensor([2 * step] * sizes[0] + [2 * step + 1] * sizes[1]).long())
    # Rank 1 comes last, and names the last id too.
    bank.update(bank.ids[-2:].clone(), rows(2, 71))
    for name, tensor in bank.state_dict().items():
        torch.testing.assert_close(one["state"][name], tensor, rtol=0, atol=0, msg=name)
    assert "labels has -5" in one["words"]
    assert "the batch of rank 0 was refused there" in two["words"]
    assert one["unchanged"]
    assert two["unchanged"]
    assert (one["alone"], two["alone"]) == (1, 2)
