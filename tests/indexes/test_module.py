"""FlatIndex among torch's own tools for modules, gradients and files."""

import copy
import io
import os
import stat

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.optim.swa_utils import AveragedModel

from elips_torch import DtypeError, FlatIndex, ImplementationError, ParameterError, load_index


def filled(n=20, **options):
    torch.manual_seed(0)
    index = FlatIndex(4, **options)
    index.add(torch.rand(n, 4))
    return index


def test_rows_written_behind_the_back_of_the_index_are_noticed():
    model = nn.ModuleDict({"layer": nn.Linear(2, 2), "index": filled(5)})
    average = AveragedModel(model)
    model["index"].remove([0, 1, 2])
    model["index"].add(torch.rand(3, 4), ids=[9, 8, 7])
    for _ in range(2):
        average.update_parameters(model)
    copied = average.module["index"]
    assert copied.ids.tolist() == [3, 4, 9, 8, 7]
    assert 8 in copied
    torch.testing.assert_close(copied.reconstruct([8]), model["index"].reconstruct([8]))
    assert copied.add(torch.rand(1, 4)).tolist() == [10]


def test_adding_leaves_graphs_through_the_vectors_alone():
    index = filled()
    index.add(torch.rand(2, 4))
    queries = torch.rand(3, 4, requires_grad=True)
    loss = (queries @ index.vectors.T).sum()
    index.add(torch.rand(2, 4))
    loss.backward()
    assert queries.grad is not None


def test_replacing_rows_shows_in_graphs_through_the_vectors():
    index = filled()
    queries = torch.rand(3, 4, requires_grad=True)
    loss = (queries @ index.vectors.T).sum()
    index.upsert(torch.rand(1, 4), ids=[0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_small_index_reserves_little():
    index = FlatIndex(4)
    for _ in range(3):
        index.add(torch.rand(1, 4))
    file = io.BytesIO()
    torch.save(index.vectors, file)
    assert file.tell() < 10_000


# Torch scripts a function of its own when jvp is first used.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_forward_mode_and_functional_transforms_are_refused():
    index = filled()
    queries = torch.rand(3, 4)
    with pytest.raises(ImplementationError, match="reverse-mode"):
        torch.func.jvp(lambda q: index(q, 2).scores, (queries,), (torch.ones_like(queries),))
    with (
        forward_ad.dual_level(),
        pytest.raises(ImplementationError, match="reverse-mode"),
    ):
        index(forward_ad.make_dual(queries, torch.ones_like(queries)), 2)


def test_a_second_derivative_is_refused():
    index = filled()
    queries = torch.rand(3, 4, requires_grad=True)
    (slope,) = torch.autograd.grad(index(queries, 2).scores.sum(), queries, create_graph=True)
    with pytest.raises(ImplementationError, match="once, not twice"):
        slope.sum().backward()


def test_ids_are_integers_of_any_kind():
    index = filled()
    assert np.int64(3) in index
    assert torch.tensor(3) in index
    for stranger in (3.0, torch.tensor(3.7), True, None, torch.tensor([1, 2])):
        assert stranger not in index
    assert index.reconstruct(np.int64(3)).shape == (4,)


def test_hooks_and_further_buffers_load():
    class Labelled(FlatIndex):
        def __init__(self):
            super().__init__(4)
            self.register_buffer("labels", torch.zeros(3))

    index, other = Labelled(), Labelled()
    index.labels += 7
    index.add(torch.rand(5, 4))
    calls = []
    other.register_load_state_dict_pre_hook(lambda module, state, *_: calls.append(sorted(state)))
    other.load_state_dict(index.state_dict())
    assert calls == [["ids", "labels", "next_id", "vectors"]]
    assert other.labels.tolist() == [7, 7, 7]
    assert len(other) == 5


@pytest.mark.parametrize(
    "change",
    [
        {"ids": torch.ones(20, dtype=torch.bool)},
        {"ids": torch.arange(20, dtype=torch.int32)},
        {"next_id": torch.tensor(20.5)},
        {"next_id": torch.tensor(-5)},
        {"next_id": torch.arange(3)},
        {"vectors": torch.rand(20, 4).to(torch.float8_e4m3fn)},
    ],
)
@pytest.mark.parametrize("assign", [False, True])
def test_states_of_other_dtypes_are_refused(change, assign):
    index = filled()
    with pytest.raises(RuntimeError, match=next(iter(change))):
        index.load_state_dict({**index.state_dict(), **change}, assign=assign)
    assert len(index) == 20
    assert index.ids.dtype == torch.int64


def test_a_meta_index_needs_assign():
    index = FlatIndex(4, device="meta")
    with pytest.raises(RuntimeError, match="assign=True"):
        index.load_state_dict(filled().state_dict())
    assert len(index) == 0


def test_a_shallow_copy_is_independent():
    for learnable in (False, True):
        index = filled(learnable=learnable)
        twin = copy.copy(index)
        twin.add(torch.rand(2, 4))
        twin.upsert(torch.zeros(1, 4), ids=[0])
        assert len(index.vectors) == len(index.ids) == 20
        assert index.vectors[0].abs().sum() > 0


def test_only_a_change_of_size_makes_a_new_parameter():
    index = filled(learnable=True)
    parameter = index.vectors
    index.add(torch.rand(0, 4))
    index.upsert(torch.zeros(1, 4), ids=[0])
    assert index.vectors is parameter
    index.add(torch.rand(1, 4))
    assert index.vectors is not parameter


def test_copies_and_casts_made_in_inference_mode_are_ordinary():
    index = filled()
    with torch.inference_mode():
        copies = [copy.deepcopy(index), index.half()]
    for made in copies:
        assert not any(buffer.is_inference() for buffer in made.buffers())
        made.upsert(torch.rand(1, 4), ids=[0])


def test_a_cast_of_everything_spares_the_ids():
    index = FlatIndex(4)
    index.add(torch.rand(2, 4), ids=[2**40 + 1, 5])
    index.type(torch.float16)
    assert index.vectors.dtype == torch.float16
    assert index.ids.tolist() == [2**40 + 1, 5]


def test_parameters_are_checked_alike_with_and_without_gradients():
    index = filled()
    for requires_grad in (False, True):
        queries = torch.rand(2, 4, requires_grad=requires_grad)
        for value in ("2000000", True, np.int64(2**21), None):
            with pytest.raises(ParameterError, match="workspace_bytes is"):
                index(queries, 2, workspace_bytes=value)
        with pytest.raises(DtypeError, match="workspace_bytes is"):
            index(queries, 2, workspace_bytes=2e6)


def test_a_bad_default_k_is_refused():
    index = filled()
    index.k = 0
    with pytest.raises(ValueError, match="k is 0"):
        index(torch.rand(2, 4))


@pytest.mark.skipif(os.name != "posix", reason="file modes of POSIX")
def test_files_have_the_usual_mode(tmp_path):
    filled().save(tmp_path / "index")
    torch.save({}, tmp_path / "other")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("index", "other")]
    assert modes[0] == modes[1]
    with pytest.raises(FileNotFoundError, match="no folder"):
        filled().save(tmp_path / "missing" / "index")
    assert len(load_index(tmp_path / "index")) == 20


def test_a_class_of_ones_own_is_saved_and_loaded(tmp_path):
    class Mine(FlatIndex):
        pass

    index = Mine(4)
    index.add(torch.rand(3, 4))
    index.save(tmp_path / "index")
    assert type(load_index(tmp_path / "index")) is Mine


def test_k_may_be_any_integer():
    index = filled()
    assert index(torch.rand(2, 4), k=np.int64(3)).ids.shape == (2, 3)
