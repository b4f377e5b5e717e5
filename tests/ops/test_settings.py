"""Results do not depend on settings of torch, on the split of the queries, or on the run."""

from contextlib import contextmanager

import pytest
import torch

from elips_torch import knn, pairwise_distance, range_search


@contextmanager
def setting(get, change, value):
    before = get()
    change(value)
    try:
        yield
    finally:
        change(before)


@contextmanager
def product_precision(value):
    backend = torch.backends.mkldnn.matmul
    with setting(lambda: backend.fp32_precision, lambda v: setattr(backend, "fp32_precision", v), value):
        yield


@contextmanager
def matmul_precision(value):
    backend = torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    with setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, value):
        yield
    backend.fp32_precision = before


SETTINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "default dtype": lambda: setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "default device": lambda: torch.device("meta"),
    "high": lambda: matmul_precision("high"),
    "medium": lambda: matmul_precision("medium"),
    "bf16 product": lambda: product_precision("bf16"),
    "deterministic": lambda: setting(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "one thread": lambda: setting(torch.get_num_threads, torch.set_num_threads, 1),
    "the same again": torch.enable_grad,
}


def search_all(metric, grad):
    generator = torch.Generator().manual_seed(0)
    q = torch.rand(12, 20, generator=generator, device="cpu", dtype=torch.float32).requires_grad_(grad)
    x = torch.rand(300, 20, generator=generator, device="cpu", dtype=torch.float32)
    radius = {"l2": 3.0, "cosine": 0.8, "canberra": 6.0}[metric]
    found = [*knn(q, x, 9, metric=metric), *knn(q, x, 200, metric=metric)]
    found += range_search(q, x, radius, metric=metric)
    found.append(pairwise_distance(q, x, metric=metric))
    if grad and found[0].requires_grad:
        found += torch.autograd.grad(found[0].sum() + found[-1].sum(), q)
    return [each.detach() for each in found]


# Torch 2.9 advises against the settings that are tested here.
@pytest.mark.filterwarnings("ignore:Please use the new API settings to control TF32")
@pytest.mark.parametrize("metric", ["l2", "cosine", "canberra"])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_change_nothing(name, metric):
    for grad in (False, True):
        expected = search_all(metric, grad)
        with SETTINGS[name]():
            found = search_all(metric, grad)
        for got, want in zip(found, expected[: len(found)], strict=True):
            assert got.dtype == want.dtype
            assert torch.equal(got.clone(), want)


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine", "l1", "jensenshannon"])
def test_the_split_of_the_queries_changes_nothing(metric):
    generator = torch.Generator().manual_seed(0)
    q, x = torch.rand(15, 31, generator=generator), torch.rand(800, 31, generator=generator)
    x[400:] = x[:400]
    whole, dense = knn(q, x, 9, metric=metric), pairwise_distance(q, x, metric=metric)
    radius = float(dense.median())
    within = range_search(q, x, radius, metric=metric)
    for step in (1, 7):
        parts = [knn(part, x, 9, metric=metric) for part in q.split(step)]
        assert torch.equal(torch.cat([part.scores for part in parts]), whole.scores)
        assert torch.equal(torch.cat([part.ids for part in parts]), whole.ids)
        parts = [pairwise_distance(part, x, metric=metric) for part in q.split(step)]
        assert torch.equal(torch.cat(parts), dense)
        parts = [range_search(part, x, radius, metric=metric) for part in q.split(step)]
        assert torch.equal(torch.cat([part.ids for part in parts]), within.ids)
        assert torch.equal(torch.cat([part.scores for part in parts]), within.scores)
