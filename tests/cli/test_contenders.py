"""Every contender finds what is there."""

import pytest
import torch

from elips_torch.cli import contenders
from elips_torch.cli.contenders import FaissBruteForce, FaissGpu, Ours, TorchTopk, make_index, peer_vectors
from elips_torch.cli.datasets import clustered
from elips_torch.core.dispatch import Explanation
from elips_torch.core.metric import resolve_metric
from elips_torch.core.results import SearchResult
from elips_torch.engines.faiss.brute_force import SETTINGS, current_settings
from elips_torch.engines.faiss.builds import load_installed
from elips_torch.evaluation.ground_truth import exact_neighbours

METRICS = ("ip", "l2", "cosine")


def scaled(metric):
    """Return data whose norms differ, so that the three metrics disagree."""
    data = clustered(300, 16, 9)
    return data.__class__(
        data.name, "", data.queries * 3.0, data.database * torch.linspace(1, 2, 300)[:, None]
    )


@pytest.mark.parametrize("metric", METRICS)
def test_torch_finds_the_neighbours_with_every_block(metric):
    data, kind = scaled(metric), resolve_metric(metric)
    wanted = exact_neighbours(data.queries, data.database, 4, metric)
    contender = TorchTopk(data, kind)
    for block in (1, 4, 9, 100):
        contender.use(block)
        assert torch.equal(contender.search(9, 4), wanted)
        assert torch.equal(contender.search(2, 4), wanted[:2])


def test_torch_never_makes_more_scores_than_fit(monkeypatch):
    contender = TorchTopk(scaled("ip"), resolve_metric("ip"))
    assert contender.variants(4096, 10) == [4096, 512, 128]
    assert contender.variants(1, 10) == [1]
    monkeypatch.setattr(contenders, "_SCORE_BYTES", 300 * 4 * 50)
    assert contender.variants(4096, 10) == [50]


@pytest.mark.parametrize("metric", METRICS)
def test_faiss_finds_the_neighbours_with_every_setting(metric):
    data, kind, build = scaled(metric), resolve_metric(metric), load_installed()
    before = current_settings(build)
    wanted = exact_neighbours(data.queries, data.database, 4, metric)
    contender = FaissBruteForce("faiss", build, data, kind)
    try:
        for setting in SETTINGS:
            contender.use(setting)
            assert contender.setting == str(setting)
            assert torch.equal(contender.search(9, 4), wanted)
    finally:
        contender.use(SETTINGS[0])
    # The first setting is what the build came with, whatever was tried before.
    assert current_settings(build) == before


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_ours_finds_the_neighbours(metric, dtype):
    data = scaled(metric).to(torch.device("cpu"), dtype)
    ours = Ours(data, resolve_metric(metric), "none")
    assert ours.index.dtype == dtype
    wanted = exact_neighbours(data.queries, data.database, 4, metric)
    assert torch.equal(ours.search(9, 4), wanted)


def test_what_serves_is_asked_without_printing(capsys):
    ours = Ours(scaled("ip"), resolve_metric("ip"), "none")
    explanation = ours.explain(2, 5)
    assert capsys.readouterr().out == ""
    assert explanation.chosen in explanation.reasons
    assert ours.variants(2, 5) == ["auto"]


@pytest.mark.parametrize(
    ("device", "reasons", "asked"),
    [
        ("cuda", {"triton": [], "eager": []}, "triton"),
        ("cuda", {"triton": ["needs Triton"], "eager": []}, "auto"),
        ("cuda", {"eager": []}, "auto"),
        ("cpu", {"triton": [], "eager": []}, "auto"),
    ],
)
def test_a_gpu_is_measured_with_its_own_kernels(device, reasons, asked):
    # A stand-in for an index on a GPU: it says what could serve and notes what it was asked for.
    calls = []

    class Index:
        def __init__(self):
            self.device = torch.device(device)

        def explain(self, queries, k, *, implementation):
            return Explanation("knn", "triton", reasons, "a search")

        def search(self, queries, k, *, implementation):
            calls.append(implementation)
            return SearchResult(torch.zeros(len(queries), k), torch.zeros(len(queries), k, dtype=torch.int64))

    ours = Ours(scaled("ip"), resolve_metric("ip"), "none")
    ours.index = Index()
    (variant,) = ours.variants(2, 3)
    ours.use(variant)
    ours.search(2, 3)
    assert (variant, ours.setting, calls) == (asked, asked, [asked])


def test_the_index_takes_the_screen(monkeypatch):
    given = {}

    class Index:
        def __init__(self, dim, metric, **options):
            given.update(options, dim=dim, metric=metric)

        def add(self, vectors):
            given["rows"] = len(vectors)

    monkeypatch.setattr(contenders, "FlatIndex", Index)
    make_index(scaled("ip").to(torch.device("cpu"), torch.float16), resolve_metric("dot"), "int8")
    assert given == {
        "dim": 16,
        "metric": "ip",
        "screen": "int8",
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "rows": 300,
    }


def test_peers_hold_the_rounded_values_as_float32():
    data = scaled("ip").to(torch.device("cpu"), torch.bfloat16)
    queries, database = peer_vectors(data, resolve_metric("ip"))
    assert queries.dtype == database.dtype == torch.float32
    assert torch.equal(database, data.database.float())
    _, unit = peer_vectors(data, resolve_metric("cosine"))
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(300))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("metric", METRICS)
def test_contenders_on_a_gpu_find_the_neighbours(metric):
    data = scaled(metric).to(torch.device("cuda"), torch.float32)
    build = load_installed()
    if not build.has_gpu:
        pytest.skip("needs a faiss with GPU code")
    wanted = exact_neighbours(data.queries, data.database, 4, metric)
    torch_topk = TorchTopk(data, resolve_metric(metric))
    torch_topk.use(9)
    assert torch.equal(torch_topk.search(9, 4), wanted)
    assert torch.equal(FaissGpu("faiss", build, data, resolve_metric(metric)).search(9, 4), wanted)
    ours = Ours(data, resolve_metric(metric), "none")
    ours.use(ours.variants(9, 4)[0])
    assert torch.equal(ours.search(9, 4), wanted)
