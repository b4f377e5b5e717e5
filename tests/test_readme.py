"""What the README shows runs."""

import re
import shlex
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from elips_torch.cli.main import main

README = Path(__file__).parent.parent / "README.md"


def blocks():
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_example_of_screens_runs(capsys):
    (block,) = (block for block in blocks() if 'screen="int8")  # on bare tensors' in block)
    exec(block, {})
    assert "chosen" in capsys.readouterr().out


def test_the_first_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    exec(blocks()[0], names)
    assert len(blocks()[0].splitlines()) <= 12
    assert names["queries"].grad.abs().sum() > 0
    assert (names["even"].ids % 2 == 0).all()
    assert (tmp_path / "index.safetensors").stat().st_size > 0


def test_the_approximate_example_runs(capsys):
    torch.manual_seed(0)
    names = {}
    (block,) = (block for block in blocks() if "suggest_index(" in block)
    exec(block, names)
    assert (names["even"].ids % 2 == 0).all()
    assert (names["found"][:, 0] == names["ids"][:100]).all()
    assert (names["even"].ids >= 0).all()
    assert names["small"].is_trained
    # With 8 bytes a vector to screen by where the machine multiplies int8 fast.
    assert re.match(r"IVF4096,SQ8 1(67|75)\d{6} ", capsys.readouterr().out)


def test_the_example_of_indexes_of_faiss_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    (block,) = (block for block in blocks() if "write_faiss(" in block)
    exec(block, names)
    queries = names["vectors"][:9]
    assert torch.equal(names["same"].search(queries, 5).ids, names["index"].search(queries, 5).ids)
    assert names["index"].ntotal == faiss.read_index("index.faiss").ntotal
    assert (names["found"].ids % 2 == 0).all()
    assert torch.equal(names["again"].ids, names["graph"].ids)
    found = names["there"].search(queries.numpy(), 5)[1]
    assert found.min() >= 5_000
    for index in (names["lists"], names["mine"]):
        assert found.tolist() == index.search(queries, 5).ids.tolist()


def test_the_example_of_searches_by_faiss_runs(capsys):
    names = {}
    (block,) = (block for block in blocks() if "faiss_stats" in block)
    exec(block, names)
    assert names["ids"].shape == (8, 10)
    assert "searches=" in capsys.readouterr().out


def test_the_training_example_runs():
    names = {}
    (block,) = (block for block in blocks() if "class Retriever" in block)
    exec(block.replace("fullgraph=True", "fullgraph=True, backend='aot_eager'"), names)
    model = names["model"]
    model.index.add(torch.randn(50, 64))
    model(torch.randn(4, 784)).backward()
    assert model.encoder.weight.grad.abs().sum() > 0
    torch._dynamo.reset()


def test_the_example_of_callbacks_runs():
    names = {"texts": ["a", "b"], "corpus_loader": [torch.zeros(1, 4)], "train_loader": [torch.zeros(1, 4)]}
    (block,) = (block for block in blocks() if "IndexRefresh(" in block)
    exec(block, names)
    kinds = ["RetrievalEvaluation", "NeighbourTable", "IndexRefresh", "HardNegativeRefresh"]
    assert [type(callback).__name__ for callback in names["callbacks"]] == kinds


def test_the_example_of_miners_and_banks_runs():
    torch.manual_seed(0)
    names = {}
    (block,) = (block for block in blocks() if "HardNegativeMiner(" in block)
    exec(block, names)
    assert (names["labels"][names["negatives"]] != names["labels"][:, None]).all()
    assert names["classes"].shape == (500,)
    assert names["memory"].values.grad.abs().sum() > 0
    assert names["encoder"].weight.grad.abs().sum() > 0


def test_the_example_of_evaluation_runs(capsys):
    torch.manual_seed(0)
    names = {}
    (block,) = (block for block in blocks() if "RetrievalMetrics(" in block)
    exec(block, names)
    assert names["index"].nprobe == names["curve"].best.parameters["nprobe"]
    assert names["figure"].axes
    assert "ndcg@10" in capsys.readouterr().out


def test_the_notebooks_that_are_linked_to_are_there():
    text = README.read_text(encoding="utf-8")
    linked = set(re.findall(r"\(notebooks/(\w+\.ipynb)\)", text))
    assert linked == {path.name for path in (README.parent / "notebooks").glob("*.ipynb")}


def test_the_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    vectors = torch.randn(300, 8, generator=torch.Generator().manual_seed(0)).numpy()
    np.save("docs.npy", vectors)
    np.save("queries.npy", vectors[:20])
    np.save("relevant.npy", np.arange(20))
    columns = {"embedding": pa.array(list(vectors), pa.list_(pa.float32())), "id": np.arange(300)}
    pq.write_table(pa.table(columns), "docs.parquet")
    text = re.search(
        r"```bash\n(elips-torch build.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    # Few vectors fill few lists.
    lines = text[1].replace("IVF1024", "IVF8").splitlines()
    assert len(lines) == 5
    assert [main(shlex.split(line, comments=True)[1:]) for line in lines] == [0] * 5
