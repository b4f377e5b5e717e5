import dataclasses
import importlib
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    return importlib.import_module("hard_negatives")


@pytest.fixture
def embeddings(tmp_path):
    """A file of documents, and queries that a fixed rotation keeps from finding theirs."""
    generator = torch.Generator().manual_seed(0)
    documents = torch.nn.functional.normalize(torch.randn(200, 16, generator=generator))
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0]
    relevant = torch.randint(0, 200, (120,), generator=generator)
    queries = documents[relevant] @ (torch.eye(16) + rotation)
    path = tmp_path / "embeddings.safetensors"
    save_file({"queries": queries, "documents": documents, "relevant": relevant}, path)
    return str(path)


def test_an_epoch_on_digits_finds_more_than_before(script, monkeypatch, capsys):
    monkeypatch.setattr(script, "DIGITS", dataclasses.replace(script.DIGITS, batch_size=64))
    monkeypatch.setattr(sys, "argv", ["hard_negatives.py", "--seeds=2", "--epochs=1"])
    script.main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["recall@1", "before", "in-batch", "mined", "gain"]
    for before, in_batch, mined, gain in ([float(value) for value in line[2:]] for line in lines[1:3]):
        assert before < min(in_batch, mined)
        assert gain == pytest.approx(mined - in_batch, abs=2e-4)
    assert [line[0] for line in lines[3:5]] == ["mean", "deviation"]


def test_a_file_of_embeddings_improves(script, embeddings):
    settings = dataclasses.replace(script.EMBEDDINGS, epochs=8, batch_size=16, learning_rate=1e-2)
    result = script.run(embeddings, 0, settings)
    assert result["before"] < min(result["in-batch"], result["mined"])


def test_both_ways_see_the_same_batches_and_positives(script, monkeypatch):
    """So that what they differ by is mining."""
    data = script.DigitsData()
    seen = []
    draw = data.draw_positives

    def recorded(batch):
        seen.append((batch["rows"], draw(batch)))
        return seen[-1][1]

    monkeypatch.setattr(data, "draw_positives", recorded)
    settings = dataclasses.replace(script.DIGITS, epochs=2, batch_size=128)
    for mine in (False, True):
        encoder = script.DigitEncoder(data.dim, dim_out=4)
        script.train(data, (encoder, encoder), mine, settings, seed=3)
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert len(first) == 2 * 8
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_what_is_mined_is_wrong_and_ranks_high(script):
    data = script.DigitsData()
    encoder = script.DigitEncoder(data.dim, dim_out=8).eval()
    hard = script.HardNegatives(data, 8, script.DIGITS, seed=0)
    hard.refresh(encoder)
    batch = data.train_dataloader().dataset.__getitems__(list(range(50)))
    with torch.no_grad():
        queries, corpus = encoder(batch["queries"]), encoder(data.corpus)
    rows = hard.draw(queries, batch)
    assert rows.shape == (50, script.DIGITS.negatives)
    assert (data.corpus_labels[rows] != batch["labels"][:, None]).all()
    scores = (queries @ corpus.T).masked_fill(batch["labels"][:, None] == data.corpus_labels, -torch.inf)
    least = scores.topk(script.DIGITS.candidates).values[:, -1:]
    assert (scores.gather(1, rows) >= least - 1e-5).all()
    # What a step embeds is what the bank holds from then on.
    hard.remember(rows[0], -corpus[rows[0]])
    found = hard.bank.reconstruct(rows[0])
    assert torch.allclose(found, -corpus[rows[0]], atol=1e-6)
