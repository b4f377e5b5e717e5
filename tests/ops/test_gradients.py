import pytest
import torch
from adversarial import CASES, NAMES, vectors

from elips_torch import knn, pairwise_distance, range_search
from elips_torch.core.metric import resolve_metric
from elips_torch.ops.candidate_scores import candidate_scores_op

MIB = 2**20
# Gradients are accumulated in float64 and rounded once to the dtype of their tensor.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def assert_close(gradient, expected):
    assert gradient is not None
    tolerance = TOLERANCE[gradient.dtype]
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(gradient.double(), expected, rtol=tolerance, atol=tolerance * scale + 1e-30)


def dense(kind, q, x):
    """The definition of every pair, in float64, with autograd of torch."""
    q, x = q.detach().double().requires_grad_(), x.detach().double().requires_grad_()
    shape = (len(q), len(x), q.shape[1])
    return q, x, kind.score(q[:, None].expand(shape), x[None].expand(shape))


def leaves(kind, n_queries, n, dim, dtype=torch.float32):
    q, x = vectors(kind, n_queries, dim, dtype=dtype), vectors(kind, n, dim, seed=1, dtype=dtype)
    if kind.name == "lp" and kind.p < 1.0:
        # Where features are equal autograd gives NaN, and the library 0: keep the sides apart.
        x = x + 3.0
    return q.requires_grad_(), x.requires_grad_()


def weights(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(5)) - 0.5


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("metric", "p"), CASES, ids=NAMES)
def test_knn(metric, p, dtype):
    kind = resolve_metric(metric, p)
    q, x = leaves(kind, 6, 90, 12, dtype)
    scores, ids = knn(q, x, 7, metric=metric, p=p)
    assert scores.requires_grad
    assert not ids.requires_grad
    weight = weights(6, 7)
    (scores * weight).sum().backward()
    q64, x64, full = dense(kind, q, x)
    (full.gather(1, ids) * weight.double()).sum().backward()
    assert q.grad.dtype == x.grad.dtype == dtype
    assert_close(q.grad, q64.grad)
    assert_close(x.grad, x64.grad)


@pytest.mark.parametrize(("metric", "p"), CASES, ids=NAMES)
def test_range_search(metric, p):
    kind = resolve_metric(metric, p)
    q, x = leaves(kind, 5, 60, 7)
    q64, x64, full = dense(kind, q, x)
    lims, scores, ids = range_search(q, x, full.detach().median(1).values, metric=metric, p=p)
    weight = weights(len(ids))
    (scores * weight).sum().backward()
    hit = torch.repeat_interleave(lims.diff())
    (full[hit, ids] * weight.double()).sum().backward()
    assert_close(q.grad, q64.grad)
    assert_close(x.grad, x64.grad)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("metric", "p"), CASES, ids=NAMES)
def test_pairwise_distance(metric, p, dtype):
    kind = resolve_metric(metric, p)
    q, x = leaves(kind, 5, 40, 7, dtype)
    weight = weights(5, 40)
    (pairwise_distance(q, x, metric=metric, p=p) * weight).sum().backward()
    q64, x64, full = dense(kind, q, x)
    (full * weight.double()).sum().backward()
    assert_close(q.grad, q64.grad)
    assert_close(x.grad, x64.grad)


@pytest.mark.parametrize("metric", ["l2", "cosine", "l1", "canberra"])
def test_the_workspace_and_the_layout_change_nothing(metric):
    kind = resolve_metric(metric)
    grads = []
    for workspace, transposed in [(256 * MIB, False), (MIB, False), (MIB, True)]:
        q, x = leaves(kind, 30, 120, 33)
        if transposed:
            q, x = (each.detach().T.contiguous().T.requires_grad_() for each in (q, x))
        scores = knn(q, x, 20, metric=metric, workspace_bytes=workspace).scores
        loss = (scores * weights(30, 20)).sum()
        found = range_search(q, x, scores.detach()[:, 10], metric=metric, workspace_bytes=workspace)
        loss = loss + (found.scores**2).sum()
        every = pairwise_distance(q, x, metric=metric, workspace_bytes=workspace)
        loss = loss + (every * weights(30, 120)).sum()
        grads.append(torch.autograd.grad(loss, (q, x)))
    for again in grads[1:]:
        for first, second in zip(grads[0], again, strict=True):
            # Each is rounded once from float64, where the order of the sum may differ.
            torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_empty_places_give_no_gradient(metric):
    q, x = torch.rand(3, 4, requires_grad=True), torch.rand(5, 4, requires_grad=True)
    mask = torch.tensor([True, False, True, False, False])
    scores, ids = knn(q, x, 6, metric=metric, mask=mask)
    assert torch.equal(ids[:, 2:], torch.full((3, 4), -1))
    # The derivative of the worst score is NaN here, and has nowhere to go.
    (scores * 0.0 + scores).sum().backward()
    found, _ = knn(
        q2 := q.detach().clone().requires_grad_(),
        x2 := x.detach().clone().requires_grad_(),
        2,
        metric=metric,
        mask=mask,
    )
    found.sum().backward()
    assert torch.equal(q.grad, q2.grad)
    assert torch.equal(x.grad, x2.grad)
    assert not x.grad[~mask].any()


def test_only_what_needs_a_gradient_gets_one():
    for q_grad, x_grad in [(True, False), (False, True)]:
        q, x = torch.rand(3, 4, requires_grad=q_grad), torch.rand(50, 4, requires_grad=x_grad)
        loss = knn(q, x, 2).scores.sum() + range_search(q, x, 0.3).scores.sum()
        (loss + pairwise_distance(q, x).sum()).backward()
        assert (q.grad is not None) == q_grad
        assert (x.grad is not None) == x_grad
    q, x = torch.rand(3, 4), torch.rand(50, 4)
    assert not knn(q, x, 2).scores.requires_grad
    with torch.no_grad():
        assert not knn(q.requires_grad_(), x, 2).scores.requires_grad


def test_a_zero_vector_gives_cosine_no_gradient():
    q, x = torch.zeros(2, 3, requires_grad=True), torch.rand(40, 3).index_fill(0, torch.tensor([3]), 0.0)
    x.requires_grad_()
    (knn(q, x, 40, metric="cosine").scores.sum() + pairwise_distance(q, x, metric="cosine").sum()).backward()
    assert not q.grad.any()
    assert not x.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("metric", "p"), CASES, ids=NAMES)
def test_candidate_scores(metric, p, dtype):
    kind = resolve_metric(metric, p)
    q, x = leaves(kind, 4, 30, 6, dtype)
    _, ids = knn(q.detach(), x.detach(), 5, metric=metric, p=p)
    ids[1, 3:] = -1
    candidates = x.detach()[ids.clamp_min(0)].requires_grad_()
    scores = candidate_scores_op(q, candidates, ids, metric, kind.p, MIB)
    assert torch.equal(scores == kind.worst, ids < 0)
    weight = weights(4, 5)
    scores.backward(weight)
    q64 = q.detach().double().requires_grad_()
    c64 = candidates.detach().double().requires_grad_()
    shape = candidates.shape
    expected = kind.score(q64[:, None].expand(shape), c64)
    (expected * weight.double())[ids >= 0].sum().backward()
    assert_close(q.grad, q64.grad)
    assert_close(candidates.grad, c64.grad)
    assert not candidates.grad[ids < 0].any()
