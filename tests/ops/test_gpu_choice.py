"""Which implementation serves on GPUs that need not be there: requests and facts are plain data."""

import pytest
import torch

from elips_torch import IVFFlatIndex
from elips_torch.core import compilation, dispatch, triton_support
from elips_torch.core.dispatch import Request, choose
from elips_torch.core.errors import ImplementationError
from elips_torch.core.hardware import DeviceFacts
from elips_torch.core.metric import resolve_metric
from elips_torch.ops import explain as explaining
from elips_torch.ops import ivf_search
from elips_torch.ops import knn as knn_module
from elips_torch.ops.coded_search import CodedRequest

LARGE = (512, 1_000_000, 384)
SMALL = (1, 1000, 16)


def request(sizes=LARGE, screen="int8", dtype=torch.float32, metric="l2"):
    return Request(torch.device("cuda"), dtype, dtype, *sizes, resolve_metric(metric), 10, screen)


@pytest.fixture
def machine(monkeypatch):
    """Makes up a machine: its GPU, and what its launcher lacks."""

    def make(capability="sm_90", missing=()):
        facts = DeviceFacts("cuda", "a GPU", capability, 80 * 2**30)
        for module in (knn_module, dispatch):
            monkeypatch.setattr(module, "device_facts", lambda device: facts)
        monkeypatch.setattr(knn_module, "launcher_reasons", lambda: tuple(missing))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    return make


def verdict(call, requested="auto"):
    """Return the name that is chosen, after a check that explaining and choosing agree."""
    explanation = explaining.explain_request("knn", call, requested)
    assert choose("knn", knn_module.IMPLEMENTATIONS, call, requested).name == explanation.chosen
    return explanation


@pytest.mark.parametrize("capability", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("metric", ["l2", "cosine", "l1", "jensenshannon"])
def test_triton_serves_where_it_can(machine, capability, metric):
    machine(capability)
    for sizes in (LARGE, SMALL):
        screen = "int8" if metric in ("l2", "cosine") else "none"
        assert verdict(request(sizes, screen, metric=metric)).chosen == "triton"


def test_gpus_too_old_for_the_kernels_run_what_torch_compiles(machine):
    machine("sm_75")
    explanation = verdict(request())
    assert explanation.chosen == "compiled"
    assert explanation.reasons["triton"] == [
        "the kernels are made for sm_80 and newer, this GPU (a GPU) is sm_75"
    ]
    assert "sm_75" in str(explanation)
    assert "compiled     chosen" in str(explanation)


def test_small_searches_and_those_without_a_plane_run_eager_there(machine):
    machine("sm_75")
    assert verdict(request(SMALL)).chosen == "eager"
    explanation = verdict(request(screen="none"))
    assert explanation.chosen == "eager"
    assert "no screening plane" in explanation.reasons["compiled"][0]


@pytest.mark.parametrize(
    "lacks", ["Triton is not installed", "Triton builds its launcher with a C compiler and finds none"]
)
def test_without_triton_nothing_is_compiled_for_a_gpu(machine, lacks):
    machine("sm_90", [lacks])
    explanation = verdict(request())
    assert explanation.chosen == "eager"
    assert lacks in explanation.reasons["triton"]
    assert lacks in explanation.reasons["compiled"]
    for name in ("triton", "compiled"):
        with pytest.raises(ImplementationError, match=lacks):
            choose("knn", knn_module.IMPLEMENTATIONS, request(), name)


def test_forked_processes_run_eager_where_triton_cannot(machine, monkeypatch):
    machine("sm_75")
    monkeypatch.setitem(compilation._state, "forked", True)
    assert verdict(request()).chosen == "eager"


def test_float64_vectors_are_no_case_for_triton(machine):
    machine()
    explanation = verdict(request(dtype=torch.float64, screen="none"))
    assert explanation.chosen == "eager"
    assert explanation.reasons["triton"] == ["the kernels take float32, bfloat16 and float16 vectors"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA GPU")
def test_a_gpu_that_is_not_there_is_a_reason_and_no_crash():
    explanation = verdict(request())
    assert explanation.chosen == "eager"
    assert (
        triton_support.gpu_reasons(DeviceFacts("cuda", "cuda", "unknown"))[0] in explanation.reasons["triton"]
    )
    assert "there is no CUDA device" in explanation.reasons["compiled"]


@pytest.mark.parametrize(
    ("metric", "n_queries", "parts", "chosen"),
    [("l2", 1, 0, "triton"), ("cosine", 512, 0, "triton"), ("l1", 512, 0, "eager"), ("ip", 512, 8, "triton")],
)
def test_kernels_serve_lists_where_they_can(machine, metric, n_queries, parts, chosen):
    machine()
    facts = (
        torch.device("cuda"),
        torch.float32,
        torch.float32,
        n_queries,
        10**6,
        96,
        resolve_metric(metric),
        10,
    )
    call = CodedRequest(*facts, parts=parts) if parts else Request(*facts)
    assert choose("ivf_search", ivf_search.IMPLEMENTATIONS, call, "auto").name == chosen


def test_few_queries_look_up_parts_of_lists(machine):
    machine()
    facts = torch.device("cuda"), torch.float32, torch.float32, 4, 10**6, 96, resolve_metric("ip"), 10
    call = CodedRequest(*facts, parts=8)
    assert choose("ivf_search", ivf_search.IMPLEMENTATIONS, call, "auto").name == "tables"
    assert choose("ivf_search", ivf_search.IMPLEMENTATIONS, call, "triton").name == "triton"


def test_a_cpu_runs_no_kernels_for_lists():
    index = IVFFlatIndex(4, 2).fit(torch.randn(100, 4))
    index.add(torch.randn(100, 4))
    with pytest.raises(
        ImplementationError, match="Triton kernels run on CUDA and ROCm, the tensors are on cpu"
    ):
        index.search(torch.randn(2, 4), 3, implementation="triton")
