import math

import faiss
import numpy as np
import pytest
import torch
from scipy.spatial import distance

from elips_torch import METRICS, MetricError
from elips_torch.core.metric import resolve_metric

CASES = [(m.name, None) for m in METRICS if m.name != "lp"] + [("lp", p) for p in (0.5, 1.0, 2.0, 3.0)]
EXPONENTS = {"lp": 3.0}


def resolve(name):
    return resolve_metric(name, EXPONENTS.get(name))


def data(kind, *shape, seed=0):
    values = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values if kind.domain[0] == 0.0 else 2.0 * values - 1.0


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.name)
def test_every_name_and_alias_resolves_in_any_case(metric):
    p = EXPONENTS.get(metric.name)
    for name in (metric.name, *metric.aliases):
        for spelled in (name, name.upper(), name.title()):
            assert resolve_metric(spelled, p).name == metric.name
    assert metric.worst == (-math.inf if metric.higher_is_better else math.inf)


def test_names_do_not_overlap():
    names = [name for metric in METRICS for name in (metric.name, *metric.aliases)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", ["", "l3", "hellinger", None, 2, METRICS[0]])
def test_an_unknown_metric_lists_the_known(name):
    with pytest.raises(MetricError, match="expected one of 'l2' or 'euclidean' or 'sqeuclidean', 'ip'"):
        resolve_metric(name)


@pytest.mark.parametrize("p", [None, 0, 0.0, -1.0, math.nan, math.inf, "3", True])
def test_lp_needs_a_positive_exponent(p):
    with pytest.raises(MetricError, match="expected a number above 0"):
        resolve_metric("lp", p)


def test_only_lp_takes_an_exponent():
    assert resolve_metric("minkowski", 3).p == 3.0
    with pytest.raises(MetricError, match="'l1' takes no p"):
        resolve_metric("l1", 2.0)


FAISS = {
    "l2": faiss.METRIC_L2,
    "ip": faiss.METRIC_INNER_PRODUCT,
    "l1": faiss.METRIC_L1,
    "linf": faiss.METRIC_Linf,
    "lp": faiss.METRIC_Lp,
    "canberra": faiss.METRIC_Canberra,
    "braycurtis": faiss.METRIC_BrayCurtis,
    "jensenshannon": faiss.METRIC_JensenShannon,
    "gower": getattr(faiss, "METRIC_GOWER", None),
}


@pytest.mark.parametrize(("name", "p"), [case for case in CASES if case[0] != "cosine"])
def test_values_are_those_of_faiss(name, p):
    if FAISS[name] is None:
        pytest.skip("the installed faiss has no METRIC_GOWER")
    kind = resolve_metric(name, p)
    q, x = data(kind, 5, 12).float(), data(kind, 30, 12, seed=1).float()
    ours = kind.score(q[:, None].double(), x[None].double())
    theirs = faiss.pairwise_distances(q.numpy(), x.numpy(), metric=FAISS[name], metric_arg=p or 0.0)
    # faiss computes in float32.
    torch.testing.assert_close(ours.float(), torch.from_numpy(theirs), rtol=2e-5, atol=2e-5)


SCIPY = {
    "l2": (distance.sqeuclidean, {}),
    "cosine": (lambda u, v: 1.0 - distance.cosine(u, v), {}),
    "l1": (distance.cityblock, {}),
    "linf": (distance.chebyshev, {}),
    "canberra": (distance.canberra, {}),
    "braycurtis": (distance.braycurtis, {}),
    "lp": (lambda u, v: distance.minkowski(u, v, 3.0) ** 3, {}),
    "ip": (np.dot, {}),
    "gower": (lambda u, v: np.abs(u - v).mean(), {}),
}


@pytest.mark.parametrize("name", SCIPY)
def test_values_are_those_of_scipy(name):
    kind = resolve(name)
    q, x = data(kind, 4, 9), data(kind, 6, 9, seed=1)
    ours = kind.score(q[:, None], x[None])
    theirs = [[SCIPY[name][0](u, v) for v in x.numpy()] for u in q.numpy()]
    torch.testing.assert_close(ours, torch.tensor(np.array(theirs)), rtol=1e-12, atol=1e-12)


def test_jensen_shannon_is_the_square_of_scipys_distance_for_distributions():
    kind = resolve("jensenshannon")
    q, x = data(kind, 9), data(kind, 9, seed=1)
    q, x = q / q.sum(), x / x.sum()
    q[0] = x[1] = 0.0
    q, x = q / q.sum(), x / x.sum()
    expected = distance.jensenshannon(q.numpy(), x.numpy()) ** 2
    assert float(kind.score(q, x)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.name)
def test_two_zero_vectors_have_score_zero_and_gradient_zero(metric):
    kind = resolve(metric.name)
    zero = torch.zeros(5, dtype=torch.float64)
    assert float(kind.score(zero, zero)) == 0.0
    assert torch.equal(kind.gradient(zero, zero), zero)


@pytest.mark.parametrize("name", ["canberra", "jensenshannon"])
def test_a_feature_that_is_zero_on_both_sides_adds_nothing(name):
    kind = resolve(name)
    q, x = data(kind, 4), data(kind, 4, seed=1)
    padded = kind.score(torch.cat([q, q.new_zeros(3)]), torch.cat([x, x.new_zeros(3)]))
    assert float(padded) == pytest.approx(float(kind.score(q, x)), rel=1e-15)


def test_a_zero_vector_has_cosine_and_gradient_zero():
    kind = resolve("cosine")
    zero, x = torch.zeros(4, dtype=torch.float64), data(kind, 4)
    assert float(kind.score(zero, x)) == float(kind.score(x, zero)) == 0.0
    assert not kind.gradient(zero, x).any()
    assert not kind.gradient(x, zero).any()


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.name)
def test_a_nan_is_not_a_good_score(metric):
    kind = resolve(metric.name)
    q, x = data(kind, 4), data(kind, 4, seed=1)
    x[2] = math.nan
    assert kind.score(q, x).isnan()
    x[:] = math.nan
    assert kind.score(q, x).isnan()


@pytest.mark.parametrize("name", [m.name for m in METRICS])
def test_a_score_does_not_depend_on_the_pairs_beside_it(name):
    kind = resolve(name)
    for dim, rows in ((1, 5), (7, 1), (8, 70), (33, 5), (200, 9), (1025, 4), (40_000, 5)):
        q, x = data(kind, 3, dim), data(kind, rows, dim, seed=1)
        together = kind.score(q[:, None], x[None])
        alone = torch.stack([torch.stack([kind.score(u, v) for v in x]) for u in q])
        assert torch.equal(together, alone)


def test_a_rounded_score_has_no_signed_zero():
    kind = resolve("ip")
    tiny = torch.full((1,), 1e-30, dtype=torch.float64)
    rounded = kind.rounded_score(-tiny, tiny)
    assert rounded.dtype == torch.float32
    assert not rounded.signbit()


@pytest.mark.parametrize(("name", "p"), CASES)
def test_the_gradient_is_the_derivative(name, p):
    kind = resolve_metric(name, p)
    q, x = data(kind, 4, 1, 7).requires_grad_(), data(kind, 1, 5, 7, seed=1).requires_grad_()
    pairs_q, pairs_x = q.expand(4, 5, 7), x.expand(4, 5, 7)
    by_q, by_x = torch.autograd.grad(kind.score(pairs_q, pairs_x).sum(), (pairs_q, pairs_x))
    # The derivative is taken in float64 on both sides.
    torch.testing.assert_close(kind.gradient(q, x).detach(), by_q, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(kind.gradient(x, q).detach(), by_x, rtol=1e-10, atol=1e-12)


def test_features_tied_for_the_largest_difference_share_the_gradient():
    q = torch.tensor([3.0, -3.0, 1.0], dtype=torch.float64, requires_grad=True)
    x = torch.zeros(3, dtype=torch.float64)
    kind = resolve("linf")
    (expected,) = torch.autograd.grad(kind.score(q, x), q)
    assert torch.equal(kind.gradient(q, x), expected)
    assert expected.tolist() == [0.5, -0.5, 0.0]
