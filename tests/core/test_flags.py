"""Flags are True or False everywhere: a string such as 'false' would count as True."""

import inspect

import faiss
import pytest
import torch

import elips_torch
from elips_torch import evaluation, lightning, training
from elips_torch.core.errors import DtypeError

INNER = elips_torch.FlatIndex(2)
# What a class wants beside its flags.
NEEDS = {
    "FaissIndex": (faiss.IndexFlatL2(2),),
    "HardNegativeRefresh": ("index", []),
    "IVFFlatIndex": (2, 1),
    "IVFPQIndex": (2, 1, 1),
    "IVFSQIndex": (2, 1),
    "IndexRefresh": ("index", []),
    "KMeans": (1,),
    "MemoryBank": (2, 4),
    "PCA": (2, 1),
    "PQIndex": (2, 1),
    "PreTransformIndex": (elips_torch.RandomRotation(2, 2), INNER),
    "RefineIndex": (INNER,),
    "RetrievalMetrics": (),
}
CLASSES = {
    name: each
    for module in (elips_torch, training, evaluation, lightning)
    for name in dir(module)
    if inspect.isclass(each := getattr(module, name)) and each.__module__.startswith("elips_torch")
}


def flags_of(function):
    parameters = inspect.signature(function).parameters.values()
    return [each.name for each in parameters if isinstance(each.default, bool)]


def cases():
    for name, each in CLASSES.items():
        # Counts come from the library.
        if inspect.isabstract(each) or issubclass(each, (tuple, Exception)) or name == "EngineStats":
            continue
        yield from (pytest.param(each, flag, id=f"{name}-{flag}") for flag in flags_of(each))


@pytest.mark.parametrize(("made", "flag"), list(cases()))
@pytest.mark.parametrize("value", ["false", 0.5, None])
def test_a_flag_of_a_class_is_true_or_false(made, flag, value):
    needs = NEEDS.get(made.__name__, (2,))
    if made.__name__ == "GpuOptions":
        needs = ()
    with pytest.raises(DtypeError, match=f"{flag} is {value!r}, expected True or False"):
        made(*needs, **{flag: value})


def test_flags_of_calls_are_true_or_false():
    queries = torch.zeros(1, 2)
    index = elips_torch.FlatIndex(2)
    index.add(torch.ones(3, 2), [4, 5, 6])
    calls = {
        "ref_includes_query": lambda flag: training.IndexKNN(elips_torch.FlatIndex)(
            queries, 1, queries, ref_includes_query=flag
        ),
        "exclude_self": lambda flag: training.HardNegativeMiner(1)(
            index, queries, torch.tensor([4]), exclude_self=flag
        ),
        "progress": lambda flag: elips_torch.training.fill(
            index, torch.nn.Identity(), [queries], progress=flag
        ),
        "shift_ids": lambda flag: elips_torch.merge_faiss_shards(["a", "b"], "c", shift_ids=flag),
        "mmap": lambda flag: elips_torch.read_fvecs("there is no such file", mmap=flag),
    }
    for name, call in calls.items():
        with pytest.raises(DtypeError, match=f"{name} is 'false', expected True or False"):
            call("false")
