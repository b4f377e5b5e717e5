import json
import os
import sys

import pytest
import torch

from elips_torch.cli import doctor, smoke_test
from elips_torch.cli.environment import slowing_variables, versions
from elips_torch.cli.main import main
from elips_torch.core.compilation import find_cpp_compiler
from elips_torch.core.hardware import device_facts
from elips_torch.core.native import instruction_options, native_reasons
from elips_torch.engines.faiss import builds
from elips_torch.kernels.search_native import LIBRARY

CPU = torch.device("cpu")


def test_it_says_what_is_here_and_passes(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for part in ("installed", "hardware", "what serves on cpu", "environment", "smoke test on cpu"):
        assert part in text.splitlines()
    assert f"torch             {torch.__version__}" in text
    assert torch.backends.cpu.get_cpu_capability() in text
    for operation in doctor._SEARCHES:
        assert operation in text
    assert text.count("PASS") >= len(smoke_test.STEPS)
    assert "FAIL" not in text
    assert text.splitlines()[-1] == "elips_torch works here"


def test_json_holds_the_same(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is True
    assert report["versions"]["torch"] == torch.__version__
    assert report["hardware"]["cores"] == os.cpu_count()
    assert [outcome["step"] for outcome in report["smoke_test"]["cpu"]] == list(smoke_test.STEPS)
    assert report["faiss"]["version"]
    for found in report["operations"]["cpu"].values():
        assert found["chosen"] in found["reasons"]
    assert report["operations"]["cpu"]["knn, large"]["request"].startswith("4096 x 1000000 x 384")
    named = {name.split(",")[0] for name in report["operations"]["cpu"]}
    assert named == {"knn", "ivf_search", "coded_search", "range_search", "pairwise_distance"}
    assert "48 bytes a vector" in report["operations"]["cpu"]["coded_search"]["request"]
    # The text is made from nothing but the report.
    assert "elips_torch works here" in doctor.format_report(report)


def test_the_smoke_test_is_quick():
    outcomes = smoke_test.smoke_test(CPU)
    assert all(outcome.passed for outcome in outcomes)
    assert sum(outcome.seconds for outcome in outcomes) < 10


def test_a_broken_faiss_is_reported_and_the_rest_examined(capsys, monkeypatch):
    def fail():
        raise ImportError("faiss is installed and cannot be imported: why")

    monkeypatch.setattr(doctor, "load_installed", fail)
    passing = smoke_test.Outcome("add and search", True, "", 0.0)
    monkeypatch.setattr(doctor, "smoke_test", lambda device: [passing])
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.endswith("broken: faiss is installed and cannot be imported: why") for line in lines)
    assert any(line.strip().startswith("not faiss: faiss is broken; ") for line in lines)
    assert lines[-1] == "elips_torch works here, faiss does NOT: it is broken, see above"
    failing = smoke_test.Outcome("add and search", False, "why", 0.0)
    monkeypatch.setattr(doctor, "smoke_test", lambda device: [failing])
    assert doctor.format_report(doctor.examine()).endswith("elips_torch does NOT work here")


def native_line(**changes):
    """Return what is said of the C++ code, with changed findings."""
    found = {"compiled": False, "reasons": [], "instructions": "avx2", "file": "/cache/search_0.so"}
    (line,) = doctor._native_lines({**found, **changes})
    return line


def test_it_says_what_became_of_the_cpp_code():
    assert native_line().endswith(
        "will be compiled for avx2 at the first large search, once, into /cache/search_0.so"
    )
    assert native_line(compiled=True).endswith("compiled for avx2, /cache/search_0.so")
    reasons = ["no compiler", "no instructions"]
    assert native_line(reasons=reasons).endswith("not available: no compiler; no instructions")


def test_what_is_said_of_the_cpp_code_is_so(monkeypatch):
    facts = device_facts("cpu")
    found = doctor._native()
    assert found["reasons"] == native_reasons(facts)
    assert found["compiled"] == os.path.exists(found["file"])
    if not found["reasons"]:
        assert f"-m{found['instructions']}" in instruction_options(facts)
    monkeypatch.setattr(LIBRARY, "_loaded", {instruction_options(facts): None})
    failed = doctor._native()
    assert failed["compiled"] is False
    assert failed["reasons"] == (native_reasons(facts) or ["its C++ code does not compile here; see the log"])


def broken_search(index, queries, k=None, **options):
    scores, ids = torch.zeros(len(queries), k), torch.zeros(len(queries), k, dtype=torch.int64)
    return scores, ids


def test_wrong_results_fail(capsys, monkeypatch):
    monkeypatch.setattr(smoke_test.FlatIndex, "search", broken_search)
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "FAIL  add and search" in text
    assert "ids differ from the reference" in text
    assert text.splitlines()[-1] == "elips_torch does NOT work here"


def test_an_error_fails_its_step_alone(monkeypatch):
    def fail(index, path):
        raise OSError("no space left")

    monkeypatch.setattr(smoke_test.FlatIndex, "save", fail)
    outcomes = {outcome.step: outcome for outcome in smoke_test.smoke_test(CPU)}
    assert [step for step, outcome in outcomes.items() if not outcome.passed] == ["save and load"]
    assert outcomes["save and load"].detail == "OSError: no space left"


def test_scores_without_gradient_fail(monkeypatch):
    original = smoke_test.FlatIndex.forward

    def forward(index, queries, k=None):
        scores, ids = original(index, queries, k)
        return scores.detach().requires_grad_(), ids

    monkeypatch.setattr(smoke_test.FlatIndex, "forward", forward)
    outcomes = {outcome.step: outcome for outcome in smoke_test.smoke_test(CPU)}
    assert outcomes["gradient"].detail == "the scores carry no gradient"


def test_rows_that_stay_fail(monkeypatch):
    monkeypatch.setattr(smoke_test.FlatIndex, "remove", lambda index, ids: 0)
    outcomes = {outcome.step: outcome for outcome in smoke_test.smoke_test(CPU)}
    assert "400 vectors are left" in outcomes["remove"].detail


def test_wrong_lists_fail(monkeypatch):
    monkeypatch.setattr(smoke_test.IVFFlatIndex, "search", broken_search)
    outcomes = {outcome.step: outcome for outcome in smoke_test.smoke_test(CPU)}
    assert [step for step, outcome in outcomes.items() if not outcome.passed] == ["inverted lists"]
    assert outcomes["inverted lists"].detail == "l2: ids differ from the reference"


def test_listed_rows_that_stay_fail(monkeypatch):
    monkeypatch.setattr(smoke_test.IVFFlatIndex, "remove", lambda index, ids: 0)
    outcomes = {outcome.step: outcome for outcome in smoke_test.smoke_test(CPU)}
    assert outcomes["inverted lists"].detail == "400 vectors are left, expected 200"


@pytest.fixture
def without_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    # A process looks for its compiler once.
    find_cpp_compiler.cache_clear()
    yield
    find_cpp_compiler.cache_clear()


@pytest.mark.usefixtures("without_compiler")
def test_a_machine_without_faiss_and_compiler(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert builds.is_installed() is False
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "faiss             not installed" in text
    assert "none found: nothing can be compiled for the CPU" in text
    assert "C++ search        not available: " in text


def test_variables_that_slow_things_are_named(capsys, monkeypatch):
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    assert main(["doctor"]) == 0
    assert "warning: OPENBLAS_CORETYPE=Haswell replaces" in capsys.readouterr().out


@pytest.mark.parametrize("variables", [{}, {"PATH": "/bin", "OPENBLAS_NUM_THREADS": "2"}])
def test_other_variables_are_left_alone(variables):
    assert slowing_variables(variables) == []


def test_what_is_missing_has_no_version(monkeypatch):
    assert versions()["elips_torch"] is not None
    monkeypatch.setattr("elips_torch.cli.environment._PACKAGES", {"nothing": "no-such-distribution"})
    assert versions()["nothing"] is None


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_smoke_test_passes_on_a_gpu():
    assert [outcome for outcome in smoke_test.smoke_test(torch.device("cuda")) if not outcome.passed] == []
