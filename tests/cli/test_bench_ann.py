import json
import re

import pytest
import torch
from safetensors.torch import save_file

from elips_torch.cli import ann_contenders
from elips_torch.cli.ann_contenders import FaissLists, OurLists, quantization_error
from elips_torch.cli.datasets import clustered
from elips_torch.cli.main import main
from elips_torch.core.metric import resolve_metric
from elips_torch.engines.faiss.builds import load_installed

QUICK = ["--repeats", "2", "--threads", "1"]


def bench(*arguments):
    return main(["bench", "ann", *map(str, arguments), *QUICK])


def embeddings(path, n=400, dim=16, n_queries=20):
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "queries": torch.randn(n_queries, dim, generator=generator),
        "documents": torch.randn(n, dim, generator=generator),
    }
    save_file(tensors, path)
    return path


def rows_of(text, description):
    """Return the lines below the header of an index's searches."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if re.match(rf"{description} +k +nprobe", line))
    return [line for line in lines[start + 1 :] if line.startswith("nq")]


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_the_same_lists_give_the_same_recall(tmp_path, capsys, metric):
    out = tmp_path / "out.json"
    given = ["--index", "IVF16,Flat", "IVF16,SQ8", "--nq", 1, 40, "--k", 5, "--nprobe", 1, 16]
    assert bench("--synthetic", 2000, 24, *given, "--metric", metric, "--json", out) == 0
    captured = capsys.readouterr()
    assert "centroids: ours, given to every contender" in captured.out
    assert len(rows_of(captured.out, "IVF16,SQ8")) == 4
    written = json.loads(out.read_text())
    assert [each["index"] for each in written["indexes"]] == ["IVF16,Flat", "IVF16,SQ8"]
    assert [(cell["index"], cell["nq"], cell["k"], cell["nprobe"]) for cell in written["cells"]] == [
        (index, nq, 5, nprobe)
        for index in ("IVF16,Flat", "IVF16,SQ8")
        for nq in (1, 40)
        for nprobe in (1, 16)
    ]
    for cell in written["cells"]:
        (peer,) = (name for name in cell["contenders"] if name != "ours")
        theirs, ours = cell["contenders"][peer], cell["contenders"]["ours"]
        tolerance = 0.0 if cell["index"] == "IVF16,Flat" else 0.25 if cell["nq"] == 1 else 0.03
        assert ours["recall"] == pytest.approx(theirs["recall"], abs=tolerance + 1e-6)
        if cell["nprobe"] == 16:
            assert ours["recall"] >= (1.0 if cell["index"] == "IVF16,Flat" else 0.8)
        for facts in (theirs, ours):
            assert facts["queries_per_second"] == pytest.approx(cell["nq"] / facts["median_seconds"])
        assert cell["ratio"] == pytest.approx(theirs["median_seconds"] / ours["median_seconds"])
    for index in written["indexes"]:
        facts = list(index["contenders"].values())
        assert index["nlist"] == 16
        assert len({round(each["quantization_error"], 6) for each in facts}) == 1
        assert all(each["fit_seconds"] > 0 and each["add_seconds"] > 0 for each in facts)
        assert index["contenders"]["ours"]["memory_bytes"] > 2000 * 24
    assert written["settings"]["metric"] == metric
    assert all(build["threads"] == 1 for build in written["faiss"].values())


def test_own_centroids_are_learned_by_each(tmp_path, capsys):
    out = tmp_path / "out.json"
    given = ["--index", "IVF16,Flat", "--nq", 10, "--k", 5, "--nprobe", 4, "--own-centroids"]
    assert bench("--synthetic", 2000, 24, *given, "--json", out) == 0
    text = capsys.readouterr().out
    assert "each contender's own" in text
    assert "train s: its centroids and codes" in text
    (index,) = json.loads(out.read_text())["indexes"]
    errors = [each["quantization_error"] for each in index["contenders"].values()]
    assert len(set(errors)) == len(errors)
    assert max(errors) < 1.2 * min(errors)


def test_a_file_is_measured_with_the_defaults_that_fit(tmp_path, capsys):
    # Few vectors: libraries warn of that, the command passes it on.
    assert bench(embeddings(tmp_path / "mine.safetensors", n=300), "--index", "IVF8,PQ4x4") == 0
    captured = capsys.readouterr()
    assert [line for line in captured.err.splitlines() if line.startswith("note")] == [
        "note: --nq 1 20 instead of 1 32 1000, as the data allow",
        "note: --nprobe 1 4 8 instead of 1 4 16 64, as the data allow",
    ]
    assert "warning: IVF8,PQ4x4: vectors has 300 rows" in captured.err
    assert len(rows_of(captured.out, "IVF8,PQ4x4")) == 6


def test_without_an_index_three_are_measured(tmp_path, capsys):
    out = tmp_path / "out.json"
    assert bench("--synthetic", 1300, 10, "--nq", 4, "--k", 2, "--nprobe", 1, "--json", out) == 0
    written = json.loads(out.read_text())
    assert [each["index"] for each in written["indexes"]] == ["IVF32,Flat", "IVF32,SQ8", "IVF32,PQ2"]


def test_a_second_build_of_faiss_gets_columns_of_its_own(capsys):
    build = load_installed()
    given = ["--index", "IVF8,Flat", "--nq", 5, "--k", 3, "--nprobe", 8, "--faiss", build.folder.parent]
    assert bench("--synthetic", 500, 8, *given) == 0
    text = capsys.readouterr().out
    assert f"faiss {build.version} (2) q/s" in text
    (row,) = rows_of(text, "IVF8,Flat")
    assert row.split().count("1.0000") == 3


def test_a_picture_is_drawn(tmp_path):
    picture = tmp_path / "curves.png"
    given = ["--index", "IVF8,Flat", "IVF8,SQ8", "--nq", 3, "--k", 2, "--nprobe", 1, 4, "--png", picture]
    assert bench("--synthetic", 500, 8, *given) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_worse_recall_is_seen(tmp_path, monkeypatch):
    class Worse(OurLists):
        def search(self, n_queries, k):
            return super().search(n_queries, k).roll(1, 0)

    monkeypatch.setattr("elips_torch.cli.bench_ann.OurLists", Worse)
    out = tmp_path / "out.json"
    given = ["--index", "IVF8,Flat", "--nq", 20, "--k", 3, "--nprobe", 8, "--json", out]
    assert bench("--synthetic", 2000, 8, *given) == 0
    (cell,) = json.loads(out.read_text())["cells"]
    assert cell["contenders"]["ours"]["recall"] < 0.5
    assert cell["contenders"][cell["best_peer"]]["recall"] == 1.0


def test_faiss_is_given_the_centroids():
    dataset, metric = clustered(1000, 12, 5), resolve_metric("l2")
    ours = OurLists(dataset, metric, "IVF8,SQ8")
    theirs = FaissLists("faiss", load_installed(), dataset, metric, "IVF8,SQ8", ours.index.centroids)
    torch.testing.assert_close(theirs._file.centroids, ours.index.centroids, rtol=0, atol=0)
    for mode in theirs.variants(5, 3):
        theirs.use(mode)
        ours.nprobe = theirs.nprobe = 8
        assert (theirs.search(5, 3) == ours.search(5, 3)).float().mean() > 0.8


def test_the_quantization_error_is_that_of_the_nearest_centroid(monkeypatch):
    dataset = clustered(300, 6, 1)
    centroids = dataset.database[:7]
    wanted = torch.cdist(dataset.database.double(), centroids.double()).square().amin(1)
    found = quantization_error(dataset, resolve_metric("l2"), centroids)
    assert found == pytest.approx(float(wanted.mean()), rel=1e-5)
    monkeypatch.setattr(ann_contenders, "_SAMPLE", 100)
    assert quantization_error(dataset, resolve_metric("l2"), centroids) == pytest.approx(
        float(wanted[::3].mean()), rel=1e-5
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["no_such_file.safetensors"], "no file at 'no_such_file.safetensors'"),
        (["20000", "64"], "type: elips-torch bench ann --synthetic 20000 64"),
        (["20000"], "type --synthetic N D, as in --synthetic 20000 128"),
        (["{file}", "--index", "Flat"], "--index is 'Flat', expected lists"),
        (["{file}", "--index", "IVF8,Flat,RFlat"], "transforms and refinement are not compared here"),
        (["{file}", "--index", "PCA8,IVF8,Flat"], "transforms and refinement are not compared here"),
        (["{file}", "--index", "IVF8,Falt"], "part 2, 'Falt': no such part; expected stored vectors (Flat,"),
        (["{file}", "--index", "IVF8,PQ5"], "m is 5, which does not divide dim = 16"),
        (["{file}", "--index", "IVF500,Flat"], "there are 400 database vectors to fill its lists"),
        (["{file}", "--index", "IVF8,Flat", "--nprobe", "9"], "--nprobe is 9, but there are 8 lists"),
        (["{file}", "--nq", "21"], "--nq is 21, but there are 20 queries; type --nq 20"),
        (["{file}", "--metric", "l1"], "--metric is 'l1', expected ip, l2, cosine"),
        (["{file}", "--faiss", "no_such_folder"], "no faiss in 'no_such_folder'"),
        (["{file}", "--png", "no/such/out.png"], "no such folder to write in"),
        (["{file}", "--nprobe", "0"], "'0' is no whole number of at least 1"),
        (["{file}", "--dtype", "float16"], "unrecognized arguments: --dtype float16"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, expected):
    path = embeddings(tmp_path / "file.safetensors")
    try:
        code = main(["bench", "ann", *(argument.format(file=path) for argument in arguments)])
    except SystemExit as ended:
        code = ended.code
    captured = capsys.readouterr()
    assert code == 2
    assert expected in captured.err
    assert len(captured.err.splitlines()) == 1
