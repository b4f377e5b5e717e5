import dataclasses
import logging

import pytest
import torch

from elips_torch import ImplementationError, explain, knn
from elips_torch.core import dispatch
from elips_torch.core.dispatch import Implementation, Request, choose, explain_choice, float64_reasons
from elips_torch.core.metric import resolve_metric

REQUEST = Request.of(torch.zeros(2, 8), torch.zeros(100, 8), resolve_metric("l2"), 5)
FAST = Implementation("fast", lambda: "fast", lambda request: ["needs a GPU", "needs k <= 4"])
SLOW = Implementation("slow", lambda: "slow", lambda request: [])
NEVER = Implementation("never", lambda: "never", lambda request: ["is a stub"])


@pytest.fixture(autouse=True)
def _forget_what_was_logged():
    dispatch._log_once.cache_clear()


def test_the_automatic_choice_moves_on_and_says_so_once(caplog):
    with caplog.at_level(logging.INFO, logger="elips_torch"):
        for _ in range(3):
            assert choose("op", [FAST, SLOW], REQUEST) is SLOW
    assert [record.getMessage() for record in caplog.records] == [
        "op runs as 'slow'; 'fast' cannot: needs a GPU, needs k <= 4"
    ]


def test_the_first_that_fits_is_chosen_without_a_word(caplog):
    with caplog.at_level(logging.INFO, logger="elips_torch"):
        assert choose("op", [SLOW, FAST], REQUEST) is SLOW
    assert not caplog.records


def test_an_explicit_request_works_or_raises_with_every_reason():
    assert choose("op", [FAST, SLOW], REQUEST, "slow") is SLOW
    with pytest.raises(ImplementationError, match="'fast' cannot: needs a GPU, needs k <= 4"):
        choose("op", [FAST, SLOW], REQUEST, "fast")


def test_when_nothing_fits_the_error_lists_all_reasons():
    with pytest.raises(ImplementationError, match=r"needs a GPU, needs k <= 4; 'never' cannot: is a stub"):
        choose("op", [FAST, NEVER], REQUEST)


def test_an_unknown_name_raises_and_lists_the_known():
    with pytest.raises(ImplementationError, match=r"'cuda', op has 'auto', 'fast', 'slow'"):
        choose("op", [FAST, SLOW], REQUEST, "cuda")
    with pytest.raises(RuntimeError, match=r"knn has 'auto', .*'eager'"):
        knn(torch.zeros(1, 2), torch.zeros(3, 2), 1, implementation="cuda")


@pytest.mark.parametrize(("requested", "chosen"), [("auto", "slow"), ("slow", "slow"), ("fast", None)])
def test_explaining_agrees_with_choosing(requested, chosen):
    explanation = explain_choice("op", [FAST, SLOW], REQUEST, requested)
    assert explanation.chosen == chosen
    if chosen is None:
        with pytest.raises(ImplementationError):
            choose("op", [FAST, SLOW], REQUEST, requested)
    else:
        assert choose("op", [FAST, SLOW], REQUEST, requested).name == chosen
    assert "needs a GPU; needs k <= 4" in str(explanation)
    assert "2 x 100 x 8 float32, l2, k=5 on cpu" in str(explanation)


def test_explain_returns_what_shows_as_text_and_prints_nothing(capsys):
    explanation = explain(torch.zeros(8), torch.zeros(9, 8), operation="pairwise_distance", metric="cos")
    assert capsys.readouterr().out == ""
    # What a prompt or a notebook shows, once.
    assert repr(explanation) == str(explanation)
    assert "pairwise_distance of 1 x 9 x 8 float32, cosine on cpu" in repr(explanation)
    assert repr(explanation).endswith("\n  eager        chosen")
    assert explanation.operation == "pairwise_distance"
    assert explanation.chosen == "eager"
    with pytest.raises(ValueError, match="operation is 'sort'"):
        explain(torch.zeros(8), torch.zeros(9, 8), operation="sort")


def test_a_device_without_float64_is_a_reason():
    assert float64_reasons(REQUEST) == []
    (reason,) = float64_reasons(dataclasses.replace(REQUEST, device=torch.device("mps")))
    assert "float64" in reason
