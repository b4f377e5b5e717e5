import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from elips_torch import ArgumentError, DtypeError, FlatIndex, IVFFlatIndex, NotFittedError, ShapeError
from elips_torch.training import KNNClassifier


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    # Noise breaks ties, where scikit-learn's order is its own.
    pixels = data.data + np.random.default_rng(0).normal(size=data.data.shape)
    return torch.tensor(pixels, dtype=torch.float32), torch.tensor(data.target, dtype=torch.int64)


@pytest.mark.parametrize("k", [1, 5, 50])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_vote_is_that_of_scikit_learn(digits, k, weighted):
    vectors, labels = digits
    oracle = KNeighborsClassifier(
        k,
        metric="cosine",
        weights=(lambda distance: np.exp((1 - distance) / 0.07)) if weighted else "uniform",
    ).fit(vectors[:900], labels[:900])
    ours = KNNClassifier(k, temperature=0.07 if weighted else None).fit(vectors[:900], labels[:900])
    shares = oracle.predict_proba(vectors[900:])
    torch.testing.assert_close(
        ours.predict_proba(vectors[900:]), torch.tensor(shares).float(), rtol=1e-3, atol=1e-4
    )
    even = (shares == shares.max(1, keepdims=True)).sum(1) > 1
    predicted = ours.predict(vectors[900:]).numpy()
    assert (predicted == oracle.predict(vectors[900:]))[~even].all()


def test_distances_count_with_a_minus(digits):
    vectors, labels = digits
    ours = KNNClassifier(9, temperature=50.0, index=lambda dim: FlatIndex(dim, "l2"))
    oracle = KNeighborsClassifier(9, weights=lambda distance: np.exp(-(distance**2) / 50.0))
    shares = oracle.fit(vectors[:900], labels[:900]).predict_proba(vectors[900:])
    found = ours.fit(vectors[:900], labels[:900]).predict_proba(vectors[900:])
    torch.testing.assert_close(found, torch.tensor(shares).float(), rtol=1e-2, atol=1e-3)


def test_leave_one_out(digits):
    vectors, labels = digits[0][:200], digits[1][:200]
    ours = KNNClassifier(3).fit(vectors, labels)
    found = ours.predict(vectors, exclude_self=True)
    for i in range(0, 200, 20):
        rest = torch.arange(200) != i
        assert KNNClassifier(3).fit(vectors[rest], labels[rest]).predict(vectors[i : i + 1]) == found[i]
    assert (ours.predict(vectors, k=1) == labels).all()
    assert not (ours.predict(vectors, k=1, exclude_self=True) == labels).all()


def test_labels_that_never_repeat():
    vectors = torch.eye(4)
    ours = KNNClassifier(2).fit(vectors, torch.arange(4))
    assert (ours.predict(vectors, exclude_self=True) != torch.arange(4)).all()
    assert ours.predict(vectors).tolist() == [0, 1, 2, 3]


def test_nobody_to_vote():
    ours = KNNClassifier(2, num_classes=3).fit(torch.ones(1, 2), torch.tensor([1]))
    assert ours.predict(torch.ones(1, 2), exclude_self=True).tolist() == [-1]
    assert ours.predict_proba(torch.ones(1, 2), exclude_self=True).tolist() == [[0.0, 0.0, 0.0]]
    assert ours.predict_proba(torch.ones(1, 2)).tolist() == [[0.0, 1.0, 0.0]]


def test_huge_scores_do_not_overflow():
    index = KNNClassifier(2, temperature=1e-3, index=lambda dim: FlatIndex(dim, "ip"))
    shares = index.fit(torch.tensor([[1e4], [2e4]]), torch.tensor([0, 1])).predict_proba(torch.ones(1, 1))
    assert shares.tolist() == [[0.0, 1.0]]


def test_gradients_reach_the_queries(digits):
    ours = KNNClassifier(10).fit(*digits)
    queries = (digits[0][:3] + 0.1).requires_grad_()
    ours.predict_proba(queries)[:, 0].sum().backward()
    assert queries.grad.isfinite().all()
    assert queries.grad.abs().sum() > 0


def test_another_index_is_fitted(digits):
    ours = KNNClassifier(5, index=lambda dim: IVFFlatIndex(dim, nlist=8, metric="cosine", nprobe=8))
    exact = KNNClassifier(5).fit(digits[0][:500], digits[1][:500])
    assert torch.equal(
        ours.fit(digits[0][:500], digits[1][:500]).predict(digits[0][500:600]),
        exact.predict(digits[0][500:600]),
    )


def test_bad_input():
    vectors = torch.eye(3)
    cases = [
        (lambda: KNNClassifier(0), ArgumentError, "k is 0"),
        (lambda: KNNClassifier(3, temperature=0.0), ArgumentError, "temperature is 0.0"),
        (lambda: KNNClassifier(3, index=FlatIndex(3)), DtypeError, "expected a callable"),
        (lambda: KNNClassifier(3, index="Flat"), DtypeError, "index is a str, expected a callable"),
        (lambda: KNNClassifier(3).predict(vectors), NotFittedError, "call fit"),
        (lambda: KNNClassifier(3).fit(vectors, torch.ones(3)), DtypeError, "labels is torch.float32"),
        (lambda: KNNClassifier(3).fit(vectors, torch.arange(2)), ShapeError, r"expected \(3,\)"),
        (lambda: KNNClassifier(3).fit(vectors, torch.arange(3) - 1), ArgumentError, "labels has -1 to 1"),
        (
            lambda: KNNClassifier(3, num_classes=2).fit(vectors, torch.arange(3)),
            ArgumentError,
            "labels has 0 to 2, expected 0 <= label < num_classes = 2",
        ),
        (lambda: KNNClassifier(3).fit(vectors[:0], torch.arange(0)), ShapeError, "vectors has no row"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
    fitted = KNNClassifier(3).fit(vectors, torch.arange(3))
    with pytest.raises(ArgumentError):
        fitted.fit(vectors, torch.arange(3) - 1)
    assert fitted.predict(vectors).tolist() == [0, 1, 2]
