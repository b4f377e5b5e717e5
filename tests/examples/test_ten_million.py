import importlib
from pathlib import Path

import pytest
import torch

from elips_torch.evaluation.ground_truth import exact_neighbours


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    return importlib.import_module("ten_million")


def test_a_thousandth_of_it_is_built_and_searched(script, capsys):
    given = ["--n", "10000", "--dim", "16", "--nlist", "16", "--batch", "3000", "--queries", "50"]
    recall = script.main([*given, "--nprobe", "16"])
    text = capsys.readouterr().out
    assert recall > 0.9
    assert "trained on 1,024 vectors" in text
    assert "added 10,000" in text
    assert text.count(" s   peak ") == 5
    # Fewer lists find fewer of the true neighbours.
    assert script.main([*given, "--nprobe", "1"]) < recall


def test_neighbours_by_batches_are_those_of_all_at_once(script):
    parts = list(script.batches(1000, 8, 300))
    again = list(script.batches(1000, 8, 300))
    assert [len(part) for part in parts] == [300, 300, 300, 100]
    assert all(torch.equal(one, other) for one, other in zip(parts, again, strict=True))
    # The same vector twice: the lower id first.
    parts[2][:] = parts[0]
    queries = torch.cat(parts)[::50] + 0.01
    found = script.nearest(queries, iter(parts), 7)
    assert torch.equal(found, exact_neighbours(queries, torch.cat(parts), 7))
