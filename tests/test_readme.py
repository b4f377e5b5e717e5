"""What the README shows runs."""

import re
from pathlib import Path

import torch

README = Path(__file__).parent.parent / "README.md"


def blocks():
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


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
    (block,) = (block for block in blocks() if "IVFFlatIndex(" in block)
    exec(block, names)
    assert (names["even"].ids % 2 == 0).all()
    assert (names["found"][:, 0] == names["ids"][:100]).all()
    assert (names["even"].ids >= 0).all()
    assert names["small"].is_trained
    assert capsys.readouterr().out.startswith("IVF4096,SQ8 159")


def test_the_faiss_example_runs(capsys):
    names = {}
    (block,) = (block for block in blocks() if "cuvs_state" in block)
    exec(block, names)
    assert names["ids"].shape == (8, 10)
    assert capsys.readouterr().out.strip()


def test_the_example_of_faiss_files_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    (block,) = (block for block in blocks() if "write_faiss(" in block)
    exec(block, names)
    assert (names["found"].ids % 2 == 0).all()
    queries = names["vectors"][:9]
    assert torch.equal(names["same"].search(queries, 5).ids, names["index"].search(queries, 5).ids)
    assert (tmp_path / "index.faiss").is_file()


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
