import collections

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from elips_torch import FlatIndex
from elips_torch.core.errors import ArgumentError, DeviceError, DtypeError, NonFiniteError, ShapeError
from elips_torch.evaluation import KNNAccuracy


def values(metric):
    return [value.item() for value in metric.compute().values()]


def winner(labels, weights):
    """Return the label with most votes, the one that stands first on ties, in plain Python."""
    votes = collections.Counter()
    for label, weight in zip(labels, weights, strict=True):
        if label >= 0:
            votes[label] += weight
    # A counter keeps the order in which labels came, and `max` takes the first of several.
    return max(votes, key=votes.get, default=None)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_equals_the_vote_in_plain_python(data):
    q, k = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 8))
    numbers = st.integers(-1, 3)
    retrieved = [[data.draw(numbers) for _ in range(k)] for _ in range(q)]
    labels = [data.draw(numbers) for _ in range(q)]
    # Quarters add up without rounding, so that ties are ties.
    weights = [[data.draw(st.integers(0, 8)) / 4 for _ in range(k)] for _ in range(q)]
    ks = tuple(sorted(data.draw(st.sets(st.integers(1, k), min_size=1))))
    for given_weights in (None, weights):
        metric = KNNAccuracy(ks)
        options = {} if given_weights is None else {"weights": torch.tensor(given_weights)}
        metric.update(torch.tensor(retrieved), torch.tensor(labels), **options)
        votes = given_weights or [[1] * k] * q
        for top, value in zip(ks, values(metric), strict=True):
            right = [
                winner(row[:top], vote[:top]) == label
                for row, vote, label in zip(retrieved, votes, labels, strict=True)
                if label >= 0
            ]
            if right:
                assert value == pytest.approx(sum(right) / len(right), abs=1e-7)
            else:
                assert value != value


@pytest.mark.parametrize("weighted", [False, True])
def test_equals_the_accuracy_of_scikit_learn(weighted):
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(2, 6, generator=generator)
    labels = torch.randint(0, 2, (300,), generator=generator)
    vectors = centres[labels] + torch.randn(300, 6, generator=generator)
    index = FlatIndex(6)
    index.add(vectors[:200])
    # Of two labels and an odd number of votes there is never a tie.
    scores, ids = index.search(vectors[200:], 7)
    metric = KNNAccuracy((1, 7))
    weights = {"weights": 1 / scores.sqrt()} if weighted else {}
    metric.update(labels[ids], labels[200:], **weights)
    for k, value in zip((1, 7), values(metric), strict=True):
        theirs = KNeighborsClassifier(k, weights="distance" if weighted else "uniform")
        theirs.fit(vectors[:200].numpy(), labels[:200].numpy())
        assert value == pytest.approx(theirs.score(vectors[200:].numpy(), labels[200:].numpy()), abs=1e-7)


def test_a_query_that_found_nothing_is_wrong_and_one_without_label_does_not_count():
    metric = KNNAccuracy(2)
    metric.update(torch.tensor([[-1, -1], [3, 3], [-1, -1]]), torch.tensor([0, 3, -1]))
    assert values(metric) == [0.5]


def test_the_weight_of_nothing_may_be_anything():
    metric = KNNAccuracy(3)
    weights = torch.tensor([[0.1, 0.2, -torch.inf], [0.5, torch.nan, torch.inf]])
    metric.update(torch.tensor([[0, 1, -1], [1, -1, -1]]), torch.tensor([1, 1]), weights=weights)
    assert values(metric) == [1.0]


def test_batches_add_up():
    generator = torch.Generator().manual_seed(0)
    retrieved = torch.randint(-1, 3, (30, 5), generator=generator)
    labels = torch.randint(-1, 3, (30,), generator=generator)
    whole, parts = KNNAccuracy((1, 5)), KNNAccuracy((1, 5))
    whole.update(retrieved, labels)
    for part in torch.arange(30).split(7):
        parts.update(retrieved[part], labels[part])
    assert values(whole) == values(parts)


LABELS = torch.zeros(2, dtype=torch.int64)
RETRIEVED = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("retrieved", "labels", "weights", "error", "words"),
    [
        (RETRIEVED, LABELS.float(), None, DtypeError, "labels has dtype torch.float32"),
        (RETRIEVED, RETRIEVED, None, ShapeError, "labels has shape"),
        (RETRIEVED[:, :2], LABELS, None, ShapeError, "K at least 3"),
        (RETRIEVED.to("meta"), LABELS, None, DeviceError, "retrieved_labels is on meta"),
        (RETRIEVED, LABELS, RETRIEVED, DtypeError, "weights is torch.int64, expected a float tensor"),
        (RETRIEVED, LABELS, [1.0], DtypeError, "weights is list"),
        (RETRIEVED, LABELS, torch.ones(2, 2), ShapeError, "weights has shape"),
        (RETRIEVED, LABELS, torch.ones(2, 3, device="meta"), DeviceError, "weights is on meta"),
        (RETRIEVED, LABELS, torch.tensor([[1, 1, 1], [1, 1, torch.nan]]), NonFiniteError, "weights .* row 1"),
        (RETRIEVED, LABELS, torch.full((2, 3), torch.inf), NonFiniteError, "weights .* rows 0, 1"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(retrieved, labels, weights, error, words):
    metric = KNNAccuracy(3)
    with pytest.raises(error, match=words):
        metric.update(retrieved, labels, weights=weights)
    assert metric.queries == 0


def test_bad_k_is_refused():
    with pytest.raises(ArgumentError):
        KNNAccuracy(0)
