import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]


@pytest.fixture
def retrieval_data(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("retrieval_data")


def fit(folder, config, *options):
    """Run the script from another folder, as a user would, and return what it printed."""
    command = [
        sys.executable,
        str(ROOT / "examples" / "train_retriever.py"),
        "fit",
        f"--config={ROOT / 'configs' / config}",
        *options,
    ]
    return subprocess.run(
        command,
        cwd=folder,
        # Steps this small lose more to threads that wait for each other than they gain.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )


def recalls(output, name):
    return [float(value) for value in re.search(rf"^{name}((?: +[\d.]+)+)$", output, re.M)[1].split()]


def check_files(folder, output):
    picture = folder / re.search(r"^recall per epoch +(.+)$", output, re.M)[1]
    checkpoint = folder / re.search(r"^checkpoint +(.+)$", output, re.M)[1]
    assert picture.read_bytes().startswith(b"\x89PNG")
    names = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert names
    # The index is rebuilt from the data; a checkpoint holds the model alone.
    assert not [name for name in names if name.startswith("index.")]


def write_embeddings(path, n=200, dim=16, q=120, **replaced):
    """Documents, and queries that a fixed rotation keeps from finding theirs."""
    generator = torch.Generator().manual_seed(0)
    documents = torch.nn.functional.normalize(torch.randn(n, dim, generator=generator))
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
    relevant = torch.randint(0, n, (q,), generator=generator)
    tensors = {
        "queries": (documents[relevant] @ (torch.eye(dim) + rotation)).half(),
        "documents": documents.half(),
        "relevant": relevant,
        **replaced,
    }
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def test_digits_improve_within_two_epochs(tmp_path):
    done = fit(tmp_path, "digits.yaml", "--trainer.max_epochs=2")
    assert done.returncode == 0, done.stderr
    assert recalls(done.stdout, "after")[0] > recalls(done.stdout, "before")[0]
    check_files(tmp_path, done.stdout)
    assert "Warning" not in done.stdout + done.stderr


def test_embeddings_from_a_file_improve(tmp_path):
    path = tmp_path / "embeddings.safetensors"
    write_embeddings(path)
    done = fit(tmp_path, "embeddings.yaml", f"--data.path={path}", "--data.batch_size=16")
    assert done.returncode == 0, done.stderr
    assert sum(recalls(done.stdout, "after")) > sum(recalls(done.stdout, "before"))
    check_files(tmp_path, done.stdout)


def test_held_out_queries_share_no_document_with_training(tmp_path, retrieval_data):
    write_embeddings(tmp_path / "embeddings.safetensors")
    data = retrieval_data.EmbeddingsData(tmp_path / "embeddings.safetensors")
    train, test = (set(table.columns["relevant"].flatten().tolist()) for table in (data.train, data.test))
    assert train
    assert test
    assert not train & test
    assert len(data.train) + len(data.test) == 120


def test_positives_and_negatives_follow_the_relevant_columns(tmp_path, retrieval_data):
    relevant = torch.arange(120)[:, None] + torch.tensor([0, 50])
    relevant[::2, 1] = -1
    write_embeddings(tmp_path / "embeddings.safetensors", relevant=relevant)
    data = retrieval_data.EmbeddingsData(tmp_path / "embeddings.safetensors")
    batch = {"relevant": relevant}
    drawn = torch.stack([data.draw_positives(batch) for _ in range(20)], 1)
    assert (drawn[::2] == relevant[::2, :1]).all()
    assert ((drawn == relevant[:, :1]) | (drawn == relevant[:, 1:])).all()
    assert (drawn[1::2] == relevant[1::2, 1:]).any()
    rows = torch.arange(200)
    expected = [[row in wanted for row in range(200)] for wanted in relevant.tolist()]
    assert data.is_relevant(batch, rows).tolist() == expected


def test_a_digit_is_not_its_own_positive(retrieval_data):
    data = retrieval_data.DigitsData()
    rows = torch.arange(len(data.corpus))
    positives = data.draw_positives({"rows": rows, "labels": data.corpus_labels})
    assert (data.corpus_labels[positives] == data.corpus_labels).all()
    assert (positives != rows).all()


@pytest.mark.parametrize(
    ("replaced", "words"),
    [
        ({"relevant": None}, "has no 'relevant', it has documents, queries"),
        ({"relevant": torch.full((120,), 200)}, "outside 0 to 199"),
        ({"relevant": torch.zeros(7, dtype=torch.int64)}, "expected int64 (120,)"),
        ({"queries": torch.zeros(120, 5)}, "queries (120, 5) and documents (200, 16)"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, replaced, words, retrieval_data):
    path = tmp_path / "embeddings.safetensors"
    write_embeddings(path, **replaced)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        retrieval_data.EmbeddingsData(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [None, b"no tensors"])
def test_a_missing_or_foreign_file_is_named(tmp_path, content, retrieval_data):
    path = tmp_path / "file.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"file.safetensors cannot be read as a safetensors file"):
        retrieval_data.EmbeddingsData(path)
