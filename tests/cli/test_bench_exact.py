import json

import pytest
import torch
from safetensors.torch import save_file

from elips_torch.cli import bench_exact
from elips_torch.cli.bench_exact import make_cell
from elips_torch.cli.equal_terms import equal_terms
from elips_torch.cli.exact_report import format_cells
from elips_torch.cli.main import main
from elips_torch.cli.roofline import Roofline
from elips_torch.cli.timing import Timing
from elips_torch.engines.faiss.brute_force import current_settings
from elips_torch.engines.faiss.builds import get_threads, load_installed

QUICK = ["--repeats", "2", "--threads", "1"]


def bench(*arguments):
    return main(["bench", "exact", *map(str, arguments), *QUICK])


def embeddings(path, n=300, dim=16, n_queries=20, **other):
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "queries": torch.randn(n_queries, dim, generator=generator),
        "documents": torch.randn(n, dim, generator=generator),
    }
    save_file(tensors | other, path)
    return path


def table_of(text):
    """Return the rows below the header as dictionaries; columns are two or more spaces apart."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("dataset"))
    rows = []
    for line in lines[start + 1 :]:
        if not line:
            break
        rows.append(line)
    return lines[start], rows


@pytest.mark.parametrize("metric", ["ip", "l2", "cosine", "euclidean"])
def test_a_made_up_dataset_is_measured_and_every_result_is_right(tmp_path, capsys, metric):
    report = tmp_path / "times.json"
    code = bench("--synthetic", 500, 24, "--nq", 1, 7, "--k", 3, 40, "--metric", metric, "--json", report)
    assert code == 0
    header, rows = table_of(capsys.readouterr().out)
    assert len(rows) == 4
    assert {len(row) for row in rows} == {len(header)}
    assert all(row.endswith("yes") for row in rows)

    written = json.loads(report.read_text())
    assert [(cell["nq"], cell["k"]) for cell in written["cells"]] == [(1, 3), (1, 40), (7, 3), (7, 40)]
    for cell in written["cells"]:
        names = list(cell["contenders"])
        assert names[0] == "torch"
        assert names[-1] == "ours"
        assert any(name.startswith("faiss ") for name in names)
        for name, timing in cell["contenders"].items():
            assert len(timing["seconds"]) == 2
            assert 0 < min(timing["seconds"]) <= timing["q20_seconds"] <= timing["median_seconds"]
            assert timing["median_seconds"] <= timing["q80_seconds"] <= max(timing["seconds"])
            assert timing["first_call_seconds"] > 0
            assert timing["recall"] == pytest.approx(1.0, abs=0.02)
            assert ("exact" in timing) == (name == "ours")
        assert cell["contenders"]["ours"]["exact"] is True
        assert cell["contenders"]["ours"]["recall"] == 1.0
        assert cell["implementation"] in cell["reasons"]
        assert cell["reasons"][cell["implementation"]] == []
        peers = [timing["median_seconds"] for name, timing in cell["contenders"].items() if name != "ours"]
        assert cell["ratio"] == pytest.approx(min(peers) / cell["contenders"]["ours"]["median_seconds"])
        assert cell["contenders"][cell["best_peer"]]["median_seconds"] == min(peers)
    assert written["settings"]["metric"] == {"euclidean": "l2"}.get(metric, metric)
    assert written["settings"]["threads"] == 1
    assert all(build["threads"] == 1 for build in written["faiss"].values())
    assert written["versions"]["torch"] == torch.__version__
    assert written["hardware"]["capability"] == torch.backends.cpu.get_cpu_capability()
    assert written["dataset"] | {"description": ""} == {
        "name": "clustered 500x24",
        "description": "",
        "n": 500,
        "dim": 24,
    }
    assert "5 centres" in written["dataset"]["description"]


def test_a_file_is_measured_with_the_sizes_that_fit(tmp_path, capsys):
    path = embeddings(tmp_path / "mine.safetensors", n=50)
    assert bench(path, "--dtype", "float16") == 0
    captured = capsys.readouterr()
    assert [line for line in captured.err.splitlines() if line.startswith("note")] == [
        "note: --nq 1 20 instead of 1 32 512 4096, as the data allow",
        "note: --k 10 50 instead of 10 100, as the data allow",
    ]
    _, rows = table_of(captured.out)
    assert [row.split()[:3] for row in rows] == [
        ["mine", "1", "10"],
        ["mine", "1", "50"],
        ["mine", "20", "10"],
        ["mine", "20", "50"],
    ]
    assert all(row.endswith("yes") for row in rows)


def test_tensors_of_other_names(tmp_path, capsys):
    path = embeddings(tmp_path / "mine.safetensors", q=torch.randn(4, 8), x=torch.randn(30, 8))
    assert bench(path, "--queries-key", "q", "--database-key", "x", "--nq", 4, "--k", 2) == 0
    assert "30 x 8, 4 queries" in capsys.readouterr().out


def test_a_second_build_of_faiss_gets_a_column_of_its_own(capsys):
    build = load_installed()
    folder = build.folder.parent
    assert bench("--synthetic", 200, 8, "--nq", 1, 5, "--k", 3, "--faiss", folder) == 0
    captured = capsys.readouterr()
    header, rows = table_of(captured.out)
    assert f"faiss {build.version} ms" in header
    assert f"faiss {build.version} (2) ms" in header
    assert [row.split().count("1.0000") for row in rows] == [4, 4]
    assert captured.err.count("measured") == 2


def test_a_picture_is_drawn(tmp_path):
    picture = tmp_path / "times.png"
    assert bench("--synthetic", 100, 8, "--nq", 1, "--k", 2, "--png", picture) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_picture_without_matplotlib_is_refused_before_anything_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert bench("--synthetic", 100, 8, "--nq", 1, "--k", 2, "--png", tmp_path / "times.png") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert 'pip install "elips-torch[viz]"' in captured.err


@pytest.mark.parametrize("variable", ["OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"])
def test_variables_that_slow_peers_are_named(capsys, monkeypatch, variable, tmp_path):
    for other in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(variable, "1")
    report = tmp_path / "times.json"
    assert bench("--synthetic", 100, 8, "--nq", 1, "--k", 2, "--json", report) == 0
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert f"{variable}=1" in warning
    assert f"unset {variable}" in warning
    assert json.loads(report.read_text())["warnings"] == [warning.removeprefix("warning: ")]


def test_a_wrong_result_is_seen(capsys, monkeypatch):
    class Wrong(bench_exact.Ours):
        def search(self, n_queries, k):
            # The right neighbours in a wrong order.
            return super().search(n_queries, k).flip(1)

    monkeypatch.setattr(bench_exact, "Ours", Wrong)
    assert bench("--synthetic", 200, 8, "--nq", 5, "--k", 4) == 0
    _, (row,) = table_of(capsys.readouterr().out)
    assert row.split()[-2:] == ["1.0000", "NO"]


def timing(ids, seconds=(1.0, 3.0, 2.0)):
    return Timing(list(seconds), 9.0, "defaults", ids)


def test_recall_counts_what_was_found():
    truth = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    found = torch.tensor([[0, 1, 2, 9], [-1, -1, -1, 4]])
    cell = make_cell(2, 4, {"peer": timing(found, [4.0]), "ours": timing(truth)}, truth)
    assert cell["contenders"]["peer"]["recall"] == 0.5
    assert cell["contenders"]["ours"]["recall"] == 1.0
    assert cell["contenders"]["ours"]["exact"] is True
    assert cell["contenders"]["ours"]["median_seconds"] == 2.0
    assert cell["contenders"]["ours"]["q20_seconds"] == pytest.approx(1.4)
    assert cell["contenders"]["ours"]["q80_seconds"] == pytest.approx(2.6)
    assert (cell["best_peer"], cell["ratio"]) == ("peer", 2.0)


def test_one_wrong_id_is_not_exact():
    truth = torch.tensor([[0, 1, 2, 3]])
    cell = make_cell(1, 4, {"ours": timing(torch.tensor([[0, 1, 2, 8]]))}, truth)
    assert cell["contenders"]["ours"]["exact"] is False
    assert cell["contenders"]["ours"]["recall"] == 0.75
    assert cell["best_peer"] is None
    assert cell["ratio"] is None


def test_threads_and_settings_are_equal_during_a_run_and_as_before_after_it():
    build = load_installed()
    before = torch.get_num_threads(), get_threads(build), current_settings(build)
    # More than there were, or fewer: either way a change.
    wanted = 1 if before[0] > 1 else 2
    with equal_terms(wanted, [build]):
        assert torch.get_num_threads() == wanted
        assert get_threads(build) == wanted
        build.module.cvar.distance_compute_blas_threshold = 5
    assert (torch.get_num_threads(), get_threads(build), current_settings(build)) == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["no_such_file.safetensors"], "no file at 'no_such_file.safetensors'"),
        (["{file}", "--queries-key", "q"], "has no 'q', it has 'documents', 'queries'"),
        (["{file}", "--database-key", "x"], "has no 'x'"),
        (["{file}", "--database-key", "narrow"], "'queries' has dim 16, 'narrow' has dim 8"),
        (["{file}", "--database-key", "flat"], "'flat' has shape (5,), expected (N, D)"),
        (["{file}", "--database-key", "whole"], "'whole' has dtype torch.int64"),
        (["{file}", "--database-key", "empty"], "expected a row in each"),
        (["{file}", "--database-key", "broken", "--nq", "1", "--k", "1"], "NaN or infinity in row 2"),
        (["{damaged}"], "cannot be read as a safetensors file"),
        (["{file}", "--k", "301"], "--k is 301, but there are 300 database vectors; type --k 300"),
        (["{file}", "--nq", "21"], "--nq is 21, but there are 20 queries; type --nq 20"),
        (["{file}", "--nq", "1", "32", "512"], "--nq is 512, but there are 20 queries; type --nq 1 20"),
        (
            ["20000", "64"],
            "20000 64 is no file; for made-up vectors type: elips-torch bench exact --synthetic 20000 64",
        ),
        (
            ["20000"],
            "no file at '20000'; for made-up vectors type --synthetic N D, as in --synthetic 20000 384",
        ),
        (["{file}", "20000"], "unrecognized arguments: 20000"),
        (["{file}", "--synthetic", "10", "4"], "both a file and --synthetic"),
        (["{file}", "--metric", "manhattan"], "--metric is 'manhattan', expected ip, l2, cosine"),
        (["{file}", "--metric", "nonsense"], "metric is 'nonsense', expected one of"),
        (["{file}", "--faiss", "no_such_folder"], "no faiss in 'no_such_folder'"),
        (["{file}", "--json", "no/such/out.json"], "no such folder to write in"),
        (["{file}", "--k", "0"], "'0' is no whole number of at least 1"),
        (["{file}", "--seconds", "-1"], "'-1' is no number of seconds above 0"),
        (["{file}", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["{file}", "--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, expected):
    broken = torch.ones(5, 16)
    broken[2, 3] = torch.nan
    other = {
        "narrow": torch.ones(5, 8),
        "flat": torch.ones(5),
        "whole": torch.ones(5, 16, dtype=torch.int64),
        "empty": torch.ones(0, 16),
        "broken": broken,
    }
    names = {"file": embeddings(tmp_path / "file.safetensors"), "damaged": tmp_path / "damaged.safetensors"}
    names["damaged"].write_bytes(b"nothing of the kind")
    if "'documents', 'queries'" not in expected:
        embeddings(names["file"], **other)
    given = [argument.format(**names) for argument in arguments]
    try:
        code = main(["bench", "exact", *given])
    except SystemExit as ended:
        code = ended.code
    captured = capsys.readouterr()
    assert code == 2
    assert expected in captured.err
    assert len(captured.err.splitlines()) == 1


def test_shares_of_the_device_are_shown_where_they_were_measured():
    # Made up: what a GPU would have reached.
    report = {"dataset": {"name": "d", "n": 1000, "dim": 10}}
    truth = torch.tensor([[0, 1]])
    cell = make_cell(1, 2, {"torch": timing(truth), "ours": timing(truth)}, truth)
    bench_exact.add_shares(
        cell, Roofline(bytes_per_second=40_000.0, flops_per_second=1e5, dtype=torch.float32), 1000, 10
    )
    header, (row,) = table_of(format_cells(report | {"cells": [cell]}))
    assert header.split()[-2:] == ["bandwidth", "products"]
    # 40 kB and 20 kflop in the median of two seconds.
    assert row.split()[-2:] == ["50%", "10%"]
    assert "bandwidth" not in format_cells(
        report | {"cells": [make_cell(1, 2, {"ours": timing(truth)}, truth)]}
    )


def test_where_a_roofline_is_measured_every_search_has_its_share(tmp_path, capsys, monkeypatch):
    # The whole command on a CPU, as it runs where a GPU's rates were measured.
    rates = Roofline(bytes_per_second=2e9, flops_per_second=4e12, dtype=torch.float32)
    monkeypatch.setattr(bench_exact, "_roofline", lambda device, dtype: rates)
    report = tmp_path / "times.json"
    assert bench("--synthetic", 500, 24, "--nq", 1, 7, "--k", 3, "--json", report) == 0
    text = capsys.readouterr().out
    assert "measured  2 GB/s in a copy, 4.0 TFLOP/s in a float32 product" in text
    header, rows = table_of(text)
    assert header.split()[-2:] == ["bandwidth", "products"]
    written = json.loads(report.read_text())
    assert written["roofline"] == {"bytes_per_second": 2e9, "flops_per_second": 4e12}
    for cell, row in zip(written["cells"], rows, strict=True):
        seconds = cell["contenders"]["ours"]["median_seconds"]
        assert cell["bandwidth_share"] == pytest.approx(500 * 24 * 4 / seconds / 2e9)
        assert cell["matrix_share"] == pytest.approx(2 * cell["nq"] * 500 * 24 / seconds / 4e12)
        assert row.split()[-2:] == [f"{cell['bandwidth_share']:.0%}", f"{cell['matrix_share']:.0%}"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA GPU")
def test_a_gpu_that_is_not_there(capsys):
    assert bench("--synthetic", 100, 8, "--device", "cuda") == 2
    assert "no CUDA GPU" in capsys.readouterr().err


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_is_measured(tmp_path, capsys):
    report = tmp_path / "times.json"
    assert bench("--synthetic", 5000, 64, "--nq", 1, 32, "--k", 10, "--device", "cuda", "--json", report) == 0
    written = json.loads(report.read_text())
    assert written["roofline"]["bytes_per_second"] > 0
    for cell in written["cells"]:
        assert cell["contenders"]["ours"]["recall"] > 0.99
        assert cell["bandwidth_share"] > 0
        assert cell["matrix_share"] > 0
    assert "bandwidth" in table_of(capsys.readouterr().out)[0]
