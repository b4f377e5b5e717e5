import json
import pathlib
import shutil
import subprocess
import sys

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

import elips_torch
from elips_torch import (
    FlatIndex,
    IVFFlatIndex,
    RefineIndex,
    index_factory,
    load_index,
    write_fvecs,
    write_ivecs,
)
from elips_torch.cli.main import main
from elips_torch.evaluation import RetrievalMetrics, index_recall

CONFIGS = pathlib.Path(elips_torch.__file__).parent.parent / "configs"
N, Q, D = 900, 60, 8


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*arguments):
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as ended:
        return ended.code


def data():
    generator = torch.Generator().manual_seed(0)
    documents = torch.randn(N, D, generator=generator)
    queries = documents[:Q] + 0.3 * torch.randn(Q, D, generator=generator)
    # One, two or no relevant documents each; the first query has none.
    relevant = torch.stack([torch.arange(Q), torch.arange(Q) + 100], 1)
    relevant[::3, 1] = -1
    relevant[0] = -1
    return documents, queries, relevant


def write_npy():
    for name, tensor in zip(("documents", "queries", "relevant"), data(), strict=True):
        np.save(f"{name}.npy", tensor.numpy())
    return "documents.npy", "queries.npy", "relevant.npy"


def write_safetensors():
    save_file(dict(zip(("documents", "queries", "relevant"), data(), strict=True)), "data.safetensors")
    return "data.safetensors:documents", "data.safetensors:queries", "data.safetensors:relevant"


def write_vecs():
    documents, queries, relevant = data()
    write_fvecs(documents, "documents.fvecs")
    write_fvecs(queries, "queries.fvecs")
    write_ivecs(relevant.int(), "relevant.ivecs")
    return "documents.fvecs", "queries.fvecs", "relevant.ivecs"


def tables():
    documents, queries, relevant = data()
    lists = [row[row >= 0].tolist() for row in relevant]
    kind = pa.list_(pa.float32())
    return (
        pa.table({"embedding": pa.array(list(documents.numpy()), kind)}),
        pa.table({"embedding": pa.array(list(queries.numpy()), kind), "positives": lists}),
    )


def write_parquet():
    for name, table in zip(("documents", "queries"), tables(), strict=True):
        pq.write_table(table, f"{name}.parquet", row_group_size=100)
    return "documents.parquet", "queries.parquet:embedding", "queries.parquet:positives"


def write_arrow():
    for name, table in zip(("documents", "queries"), tables(), strict=True):
        with pa.OSFile(f"{name}.arrow", "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
            out.write_table(table, max_chunksize=100)
    return "documents.arrow", "queries.arrow:embedding", "queries.arrow:positives"


FORMATS = [write_npy, write_safetensors, write_vecs, write_parquet, write_arrow]


def read_found(path):
    if path.endswith(".parquet"):
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


@pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__)
def test_the_commands_do_what_the_library_does_from_every_format(write, capsys):
    vectors, queries, relevant = write()
    documents, asked, wanted = data()

    built = run(
        "build",
        "--vectors",
        vectors,
        "--factory",
        "IVF8,SQ8",
        "--metric",
        "cosine",
        "--output",
        "i.safetensors",
    )
    assert built == 0
    expected = index_factory(D, "IVF8,SQ8", "cosine").fit(documents)
    expected.add(documents)
    index = load_index("i.safetensors")
    assert torch.equal(index.ids, expected.ids)
    found = expected.search(asked, 7)
    assert torch.equal(index.search(asked, 7).ids, found.ids)

    for output in ("found.jsonl", "found.parquet"):
        options = "--index", "i.safetensors", "--queries", queries, "--k", 7, "--batch-rows", 25
        assert run("search", *options, "--output", output) == 0
        rows = read_found(output)
        assert [row["query"] for row in rows] == list(range(Q))
        assert [row["ids"] for row in rows] == found.ids.tolist()
        assert torch.equal(torch.tensor([row["scores"] for row in rows]), found.scores)

    options = "--index", "i.safetensors", "--queries", queries, "--database", vectors, "--target-recall", 0.9
    files = "--json", "curve.json", "--png", "curve.png", "--output", "tuned.safetensors"
    assert run("tune", *options, *files) == 0
    curve = json.loads(pathlib.Path("curve.json").read_text())
    best = curve["best"]
    assert f"nprobe={best['parameters']['nprobe']} reaches recall@10" in capsys.readouterr().out
    tuned = load_index("tuned.safetensors")
    assert tuned.nprobe == best["parameters"]["nprobe"]
    assert index_recall(tuned, asked, 10, database=documents) == best["recall"] >= 0.9
    assert pathlib.Path("curve.png").read_bytes().startswith(b"\x89PNG")

    options = "--index", "tuned.safetensors", "--queries", queries, "--relevant", relevant
    assert run("evaluate", *options, "--json", "scores.json", "--batch-rows", 25) == 0
    metrics = RetrievalMetrics(k=(1, 3, 5, 10, 100))
    metrics.update(tuned.search(asked, 100).ids, wanted)
    known = {name.replace("hit_rate", "accuracy"): float(value) for name, value in metrics.compute().items()}
    written = json.loads(pathlib.Path("scores.json").read_text())
    assert written == pytest.approx(known, rel=1e-6)
    # Without what a double of a float32 has behind its seven digits.
    assert all(value == float(f"{value:.7g}") for value in written.values())
    assert f"{Q - 1} of {Q} queries" in capsys.readouterr().out


def test_evaluation_has_the_keys_of_an_evaluator():
    vectors, queries, relevant = write_npy()
    run("build", "--vectors", vectors, "--output", "i.safetensors")
    options = "--index", "i.safetensors", "--queries", queries, "--relevant", relevant, "--name", "cosine"
    assert run("evaluate", *options, "--json", "scores.json") == 0
    scores = json.loads(pathlib.Path("scores.json").read_text())
    expected = {f"cosine_{name}@{k}" for name in ("accuracy", "precision", "recall") for k in (1, 3, 5, 10)}
    assert expected | {"cosine_ndcg@10", "cosine_mrr@10", "cosine_map@100"} <= set(scores)
    assert all(isinstance(value, float) for value in scores.values())


def test_evaluation_agrees_with_trec_eval(capsys):
    import pytrec_eval

    vectors, queries, relevant = write_npy()
    run("build", "--vectors", vectors, "--factory", "IVF8,Flat", "--output", "i.safetensors")
    options = "--index", "i.safetensors", "--queries", queries, "--relevant", relevant
    run("evaluate", *options, "--json", "scores.json", "--k", 5)
    run("search", *options[:4], "--k", 5, "--output", "found.jsonl")
    runs = {
        str(row["query"]): {str(i): -j for j, i in enumerate(row["ids"])} for row in read_found("found.jsonl")
    }
    wanted = {str(i): {str(j): 1 for j in row.tolist() if j >= 0} for i, row in enumerate(data()[2])}
    oracle = pytrec_eval.RelevanceEvaluator(
        {query: ids for query, ids in wanted.items() if ids}, {"recall.5", "P.5", "ndcg_cut.5", "map_cut.5"}
    ).evaluate(runs)
    scores = json.loads(pathlib.Path("scores.json").read_text())
    names = {"recall_5": "recall@5", "P_5": "precision@5", "ndcg_cut_5": "ndcg@5", "map_cut_5": "map@5"}
    for theirs, ours in names.items():
        mean = sum(each[theirs] for each in oracle.values()) / len(oracle)
        assert scores[ours] == pytest.approx(mean, abs=1e-6)


def test_an_index_is_described_by_class_and_keywords():
    write_npy()
    options = "--vectors", "documents.npy", "--output", "i.safetensors"
    keywords = "--index.nlist", 8, "--index.nprobe", 3, "--index.metric", "ip", "--index.dtype", "float16"
    assert run("build", *options, "--index", "IVFFlatIndex", *keywords) == 0
    index = load_index("i.safetensors")
    assert isinstance(index, IVFFlatIndex)
    assert (index.nprobe, index.metric, index.dtype, index.ntotal) == (3, "ip", torch.float16, N)


def test_options_of_a_description_reach_its_parts():
    write_npy()
    options = "--vectors", "documents.npy", "--output", "i.safetensors", "--factory", "IVF8,Flat"
    assert run("build", *options, "--options.dtype", "float16", "--options.nprobe", 3) == 0
    index = load_index("i.safetensors")
    assert (index.dtype, index.nprobe) == (torch.float16, 3)


def test_an_index_inside_another_is_described_too():
    write_npy()
    options = "--vectors", "documents.npy", "--output", "i.safetensors", "--index", "RefineIndex"
    assert (
        run("build", *options, "--index.index", "SQIndex", "--index.index.dim", D, "--index.k_factor", 3) == 0
    )
    index = load_index("i.safetensors")
    assert isinstance(index, RefineIndex)
    assert (index.k_factor, index.ntotal) == (3, N)


def test_without_a_description_what_suits_is_built(capsys):
    write_npy()
    assert run("build", "--vectors", "documents.npy", "--output", "i.safetensors") == 0
    assert isinstance(load_index("i.safetensors"), FlatIndex)
    assert "900 vectors are few enough" in capsys.readouterr().out


def test_vectors_are_added_in_parts_and_training_takes_a_sample(monkeypatch):
    write_npy()
    sizes = {"fit": [], "add": []}
    for name in sizes:
        method = getattr(IVFFlatIndex, name)

        def noted(self, vectors, *args, _name=name, _method=method, **kwargs):
            sizes[_name].append(len(vectors))
            return _method(self, vectors, *args, **kwargs)

        monkeypatch.setattr(IVFFlatIndex, name, noted)
    options = "--factory", "IVF4,Flat", "--train-rows", 300, "--batch-rows", 250
    assert run("build", "--vectors", "documents.npy", "--output", "i.safetensors", *options) == 0
    assert sizes == {"fit": [300], "add": [250, 250, 250, 150]}


def test_ids_come_from_a_column():
    documents, queries, _ = data()
    ids = torch.arange(N).flip(0) * 3
    columns = {"v": pa.array(list(documents.numpy()), pa.list_(pa.float32())), "id": ids.numpy()}
    pq.write_table(pa.table(columns), "documents.parquet")
    options = "--vectors", "documents.parquet", "--ids", "documents.parquet:id", "--batch-rows", 400
    assert run("build", *options, "--output", "i.safetensors") == 0
    expected = FlatIndex(D)
    expected.add(documents, ids=ids)
    assert torch.equal(load_index("i.safetensors").search(queries, 5).ids, expected.search(queries, 5).ids)


def test_files_of_faiss_are_written_and_read():
    write_npy()
    queries = data()[1]
    assert run("build", "--vectors", "documents.npy", "--factory", "IVF8,Flat", "--output", "i.faiss") == 0
    index = faiss.read_index("i.faiss")
    index.nprobe = 8
    assert index.ntotal == N
    options = "--queries", "queries.npy", "--k", 4, "--parameters.nprobe", 8, "--output", "found.jsonl"
    assert run("search", "--index", "i.faiss", *options) == 0
    assert [row["ids"] for row in read_found("found.jsonl")] == index.search(queries.numpy(), 4)[1].tolist()


def test_a_family_that_only_faiss_has_is_served_by_it(capsys):
    vectors, queries, relevant = write_npy()
    documents, asked, _ = data()
    graph = faiss.IndexHNSWFlat(D, 8)
    graph.add(documents.numpy())
    faiss.write_index(graph, "graph.faiss")
    options = "--index", "graph.faiss", "--queries", queries
    search = "--k", 4, "--parameters.efSearch", 50, "--output", "found.jsonl"
    assert run("search", *options, *search) == 0
    graph.hnsw.efSearch = 50
    assert [row["ids"] for row in read_found("found.jsonl")] == graph.search(asked.numpy(), 4)[1].tolist()
    goal = "--target-recall", 0.9, "--database", vectors
    for output in ("tuned.index", "tuned.safetensors"):
        assert run("tune", *options, *goal, "--output", output) == 0
        assert run("evaluate", "--index", output, "--queries", queries, "--relevant", relevant) == 0
    assert "r_precision" in capsys.readouterr().out
    assert isinstance(faiss.read_index("tuned.index"), faiss.IndexHNSWFlat)
    pathlib.Path("graph.faiss").write_bytes(pathlib.Path("graph.faiss").read_bytes()[:-5])
    assert run("search", *options, *search) == 2
    assert "graph.faiss" in capsys.readouterr().err


def test_what_was_not_found_is_left_out():
    write_npy()
    np.save("few.npy", data()[0][:3].numpy())
    run("build", "--vectors", "few.npy", "--output", "i.safetensors")
    for output in ("found.jsonl", "found.parquet"):
        run("search", "--index", "i.safetensors", "--queries", "queries.npy", "--k", 5, "--output", output)
        assert {len(row["ids"]) for row in read_found(output)} == {
            len(row["scores"]) for row in read_found(output)
        }
        assert all(sorted(row["ids"]) == [0, 1, 2] for row in read_found(output))


@pytest.mark.parametrize("coded", [False, True])
def test_true_neighbours_save_the_exact_search(coded, monkeypatch):
    write_npy()
    documents, queries, _ = data()
    exact = FlatIndex(D)
    exact.add(documents)
    write_ivecs(exact.search(queries, 10).ids.int(), "truth.ivecs")
    description = "IVF8,SQ4" if coded else "IVF8,Flat"
    run("build", "--vectors", "documents.npy", "--factory", description, "--output", "i.safetensors")
    files = ["--database", "documents.npy"] if coded else []
    curves = []
    for truth in ([], ["--ground-truth", "truth.ivecs"]):
        grid = "--parameters.nprobe", "[1,8]", "--target-recall", 0.3, "--json", "curve.json"
        assert run("tune", "--index", "i.safetensors", "--queries", "queries.npy", *files, *truth, *grid) == 0
        points = json.loads(pathlib.Path("curve.json").read_text())["points"]
        curves.append([(point["parameters"], point["recall"]) for point in points])
    assert curves[0] == curves[1]


def test_a_recall_out_of_reach_ends_with_one(capsys):
    write_npy()
    run("build", "--vectors", "documents.npy", "--factory", "PQ2x4", "--output", "i.safetensors")
    options = "--index", "i.safetensors", "--queries", "queries.npy", "--database", "documents.npy"
    assert run("tune", *options, "--output", "tuned.safetensors") == 1
    assert "recall@10 0.95 is out of reach" in capsys.readouterr().out
    assert not pathlib.Path("tuned.safetensors").exists()


def test_the_examples_of_configurations_run(capsys):
    write_npy()
    for config in ("build_coded", "build_ivf"):
        options = "--config", CONFIGS / f"{config}.yaml", "--vectors", "documents.npy"
        assert run("build", *options, "--output", "docs.safetensors") == 0
    assert load_index("docs.safetensors").nlist == 64
    assert run("search", "--config", CONFIGS / "search.yaml", "--queries", "queries.npy") == 0
    assert run("tune", "--config", CONFIGS / "tune.yaml", "--queries", "queries.npy") == 0
    options = "--config", CONFIGS / "evaluate.yaml", "--queries", "queries.npy", "--relevant", "relevant.npy"
    assert run("evaluate", *options) == 0
    assert "cosine_ndcg@10" in json.loads(pathlib.Path("scores.json").read_text())
    written = {"found.jsonl", "curve.json", "curve.png", "tuned.safetensors", "scores.json"}
    assert written <= {path.name for path in pathlib.Path().iterdir()}


def test_what_is_typed_wins_over_a_configuration():
    write_npy()
    pathlib.Path("mine.yaml").write_text(
        "index: {class_path: IVFFlatIndex, init_args: {nlist: 4, nprobe: 2}}\n"
    )
    options = "--config", "mine.yaml", "--vectors", "documents.npy", "--output", "i.safetensors"
    assert run("build", *options, "--index.nprobe", 3) == 0
    index = load_index("i.safetensors")
    assert (index.nlist, index.nprobe) == (4, 3)


def test_the_configuration_that_is_printed_builds_the_same(capsys):
    write_npy()
    typed = (
        "--vectors",
        "documents.npy",
        "--index",
        "IVFFlatIndex",
        "--index.nlist",
        4,
        "--index.dtype",
        "float16",
    )
    assert run("build", *typed, "--print_config") == 0
    pathlib.Path("printed.yaml").write_text(capsys.readouterr().out)
    assert run("build", "--config", "printed.yaml", "--output", "i.safetensors") == 0
    index = load_index("i.safetensors")
    assert (index.nlist, index.dtype) == (4, torch.float16)


# What is typed after a command, where GOOD stands for arguments that are right, and what is said of it. Of an
# option that comes twice, the last counts.
GOOD = {
    "build": "--vectors documents.npy --output o.safetensors",
    "search": "--index i.safetensors --queries queries.npy --output o.jsonl",
    "tune": "--index i.safetensors --queries queries.npy",
    "evaluate": "--index i.safetensors --queries queries.npy",
}
BAD = {
    "build": [
        ("", "--vectors and --output must be given"),
        ("GOOD --vectors nix.npy", "no file at 'nix.npy'"),
        ("GOOD --output o.txt", "expected a file that ends in .safetensors or"),
        ("--vectors data.safetensors:a --output data.safetensors", "is read and would be replaced"),
        ("GOOD --output nix/o.faiss", "there is no folder"),
        ("GOOD --vectors bad.npy", "bad.npy has NaN, infinity or values"),
        ("GOOD --vectors empty.npy", "expected at least one vector"),
        ("GOOD --output o.faiss --factory SQ8 --metric l1", "faiss searches"),
        ("GOOD --factory Flut", "no such part"),
        ("GOOD --metric nix", "metric is 'nix'"),
        ("GOOD --options.nix 3 --factory Flat", "'nix'"),
        ("GOOD --index Nix", "--index is 'Nix', expected a class: F"),
        ("GOOD --index IVFFlatIndex", "nlist"),
        ("GOOD --index FlatIndex --index.nix 3", "'nix' is not"),
        ("GOOD --index FlatIndex --index.dtype nix", "is no dtype to store"),
        ("GOOD --index FlatIndex --metric ip", "--index.metric"),
        ("GOOD --device nix", "--device is 'nix'"),
        ("GOOD --ids relevant.npy", "expected one for each of the 900"),
        ("GOOD --ids same.npy", "more than once"),
        ("--config nix.yaml", "does not exist"),
        ("GOOD --factory Flat --options.dtype nix", "is no dtype to store"),
        ("--nix", "recognized arguments: --nix"),
        ("documents.npy", "files are named by options, such as --vectors FILE"),
        ("GOOD --nprobe 3", "written --options.nprobe or, beside --index, --index.nprobe"),
    ],
    "search": [
        ("GOOD --index nix.safetensors", "elips-torch build makes one"),
        ("GOOD --index queries.npy", "--index is 'queries.npy'"),
        ("GOOD --index other.safetensors", "not an elips_torch index"),
        ("GOOD --queries v.parquet --output ./v.parquet", "is read and would be replaced"),
        ("GOOD --queries wide.npy", "wide.npy has vectors of dim 9, the index"),
        ("GOOD --output o.csv", "expected a file that ends in .parquet or .jsonl"),
        ("GOOD --k 0", "--k"),
        ("GOOD --nprobe=3", "search parameters are written --parameters.nprobe"),
        ("GOOD --parameters.nix 1", "no search parameter 'nix'"),
        ("GOOD --parameters.nprobe three", "--parameters.nprobe is 'three', expected a number"),
        ("GOOD --parameters.nprobe [1,2]", "--parameters.nprobe is [1, 2], expected a number"),
        ("GOOD --parameters.nprobe true", "--parameters.nprobe is True, expected a number"),
        ("GOOD --parameters nprobe=3", "--parameters is nprobe=3, expected names and values, as in"),
        ("GOOD --queries bad.npy --batch-rows 10", "row 57"),
        ("GOOD --queries bad.npy --output o.parquet --batch-rows 10", "row 57"),
    ],
    "tune": [
        ("--index i.safetensors", "--queries must be given"),
        ("GOOD --target-recall 2", "--target-recall"),
        ("GOOD --database queries.npy", "what the index was built from"),
        ("GOOD --ground-truth documents.npy", "expected whole numbers"),
        ("GOOD --ground-truth same.npy", "has 900 rows"),
        ("GOOD --database data.safetensors:a --output data.safetensors", "is read and would be replaced"),
        ("GOOD --png o.txt", "--png is 'o.txt'"),
        (
            "GOOD --parameters.nprobe [1,x]",
            "--parameters.nprobe is [1, 'x'], expected a number, or several as",
        ),
        ("GOOD --parameters 4", "--parameters is 4, expected names and values, as in --parameters.nprobe 16"),
    ],
    "evaluate": [
        ("GOOD", "--relevant must be given"),
        ("GOOD --relevant same.npy", "expected one for each of the 60"),
        ("GOOD --relevant nothing.npy", "no relevant id for any"),
        ("GOOD --relevant unknown.npy", "none of the 60 relevant ids"),
        ("GOOD --relevant relevant.npy --k 0", "--k"),
        ("GOOD --relevant relevant.npy --json o.txt", "--json is"),
    ],
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with good and bad files."""
    folder = tmp_path_factory.mktemp("prepared")
    documents, queries, relevant = data()
    np.save(folder / "documents.npy", documents.numpy())
    np.save(folder / "queries.npy", queries.numpy())
    np.save(folder / "relevant.npy", relevant.numpy())
    np.save(folder / "wide.npy", np.zeros((3, D + 1), "f4"))
    np.save(folder / "empty.npy", np.zeros((0, D), "f4"))
    np.save(folder / "same.npy", np.zeros(N, int))
    np.save(folder / "nothing.npy", np.full(Q, -1))
    np.save(folder / "unknown.npy", np.full(Q, N + 5))
    queries[57, 1] = torch.nan
    np.save(folder / "bad.npy", queries.numpy())
    save_file({"a": torch.zeros(1)}, folder / "other.safetensors")
    save_file({"a": documents}, folder / "data.safetensors")
    pq.write_table(pa.table({"v": list(documents.numpy())}), folder / "v.parquet")
    index = FlatIndex(D)
    index.add(documents)
    index.save(folder / "i.safetensors")
    return folder


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [(command, *case) for command, cases in BAD.items() for case in cases],
    ids=[f"{command}-{i}" for command, cases in BAD.items() for i in range(len(cases))],
)
def test_bad_input_is_one_line_and_writes_nothing(capsys, prepared, tmp_path, command, arguments, message):
    folder = tmp_path / "copy"
    shutil.copytree(prepared, folder)
    typed = arguments.replace("GOOD", GOOD[command]).split()
    before = sorted(path.name for path in folder.iterdir())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(command, *typed) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("elips-torch")
    assert message in line
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("program", ["elips-torch", "__main__.py"])
def test_a_wrong_keyword_of_the_class_is_said_alike_by_every_program(capsys, monkeypatch, program):
    monkeypatch.setattr("sys.argv", [program])
    write_npy()
    options = "--vectors", "documents.npy", "--output", "o.safetensors", "--index", "IVFFlatIndex"
    assert run("build", *options, "--index.nlists", 4) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("elips-torch build: --index: ")
    assert line.endswith("(see elips-torch build --help)")


def test_a_failed_command_leaves_an_older_file_alone(prepared):
    shutil.copytree(prepared, ".", dirs_exist_ok=True)
    pathlib.Path("o.jsonl").write_text("older")
    assert run("search", "--index", "i.safetensors", "--queries", "bad.npy", "--output", "o.jsonl") == 2
    assert pathlib.Path("o.jsonl").read_text() == "older"


def test_relevant_ids_that_the_index_lacks_are_noted(capsys):
    write_npy()
    np.save("some.npy", np.where(np.arange(Q) < 3, N + 1, np.arange(Q)))
    run("build", "--vectors", "documents.npy", "--output", "i.safetensors")
    capsys.readouterr()
    assert (
        run("evaluate", "--index", "i.safetensors", "--queries", "queries.npy", "--relevant", "some.npy") == 0
    )
    assert capsys.readouterr().err == "note: 3 of 60 relevant ids are not in the index\n"


def test_progress_is_shown_where_it_is_wanted(capsys):
    write_npy()
    options = "--vectors", "documents.npy", "--output", "i.safetensors", "--factory", "IVF4,Flat"
    assert run("build", *options, "--batch-rows", 300) == 0
    assert capsys.readouterr().err == ""
    assert run("build", *options, "--batch-rows", 300, "--progress", "true") == 0
    shown = capsys.readouterr().err
    assert "reading" in shown
    assert "adding: 100%" in shown
    assert "3/3" in shown


def test_warnings_of_the_library_are_one_line(capsys):
    write_npy()
    assert run("build", "--vectors", "documents.npy", "--factory", "PQ2", "--output", "i.safetensors") == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: vectors has 900 rows to learn 256 centroids")


@pytest.mark.parametrize("command", ["build", "search", "tune", "evaluate"])
def test_help_explains_every_option(capsys, command):
    assert run(command, "--help") == 0
    text = capsys.readouterr().out
    assert "examples:\n  elips-torch" in text
    assert "FILE:NAME" in text
    assert f"--config configs/{command if command != 'build' else 'build_ivf'}" in text
    assert "(type:" not in text
    assert "default: null" not in text


def test_the_keywords_of_a_class_are_listed(capsys):
    assert run("build", "--index.help", "IVFFlatIndex") == 0
    text = capsys.readouterr().out
    assert "--index.nlist" in text
    assert "--index.dim " not in text


def test_without_jsonargparse_the_other_commands_work_and_these_say_what_to_install():
    program = """
import sys
sys.modules["jsonargparse"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "jsonargparse" else find(name, *rest)
from elips_torch.cli.main import main
print(main(["build", "--help"]))
try:
    main(["doctor", "--help"])
except SystemExit as ended:
    print(ended.code)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=CONFIGS.parent, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert (lines[0], lines[-1]) == ("2", "0")
    assert (
        done.stderr == 'elips-torch: elips-torch build needs jsonargparse: pip install "elips-torch[cli]"\n'
    )


def test_other_commands_import_neither_jsonargparse_nor_pyarrow():
    program = """
import sys
from elips_torch.cli.main import main
try:
    main(["--help"])
except SystemExit:
    print([name for name in ("jsonargparse", "pyarrow") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=CONFIGS.parent, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
