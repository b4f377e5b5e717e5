import pytest
import torch

from elips_torch.ops.assign import assign_op
from elips_torch.ops.candidate_scores import candidate_scores_backward_op, candidate_scores_op
from elips_torch.ops.knn import knn_backward_op, knn_op
from elips_torch.ops.linear_map import linear_map_op
from elips_torch.ops.pairwise_distance import pairwise_distance_backward_op, pairwise_distance_op
from elips_torch.ops.range_search import range_search_backward_op, range_search_op

MIB = 2**20
METRICS = [("l2", 0.0), ("cosine", 0.0), ("lp", 3.0)]
DTYPES = [(torch.float32, torch.float32), (torch.float16, torch.float64)]


def tensors(dtypes=DTYPES[0], grad=False):
    generator = torch.Generator().manual_seed(0)
    q, x = torch.rand(3, 5, generator=generator), torch.rand(60, 5, generator=generator)
    return q.to(dtypes[0]).requires_grad_(grad), x.to(dtypes[1]).requires_grad_(grad)


def selections():
    mask = torch.rand(3, 60, generator=torch.Generator().manual_seed(1)) < 0.5
    exclude = torch.tensor([[3, -1], [4, 5], [-1, -1]])
    return [(None, None), (mask, exclude), (mask[0], None)]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize(("metric", "p"), METRICS)
def test_knn(metric, p, dtypes, grad):
    for mask, exclude in selections():
        q, x = tensors(dtypes, grad)
        screen = "none" if torch.float64 in dtypes else "int8"
        torch.library.opcheck(knn_op, (q, x, mask, exclude, 4, metric, p, screen, "auto", MIB, None))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("metric", "p"), METRICS)
def test_range_search(metric, p, grad):
    radius = torch.full((3,), 0.5)
    for mask, exclude in selections():
        q, x = tensors(grad=grad)
        torch.library.opcheck(range_search_op, (q, x, radius, mask, exclude, metric, p, "auto", MIB))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize(("metric", "p"), METRICS)
def test_pairwise_distance(metric, p, dtypes, grad):
    q, x = tensors(dtypes, grad)
    torch.library.opcheck(pairwise_distance_op, (q, x, metric, p, "auto", MIB))
    torch.library.opcheck(pairwise_distance_op, (q.detach().T.contiguous().T, x, metric, p, "auto", MIB))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize(("metric", "p"), METRICS)
def test_candidate_scores(metric, p, dtypes, grad):
    q, x = tensors(dtypes, grad)
    ids = torch.tensor([[0, 1, 2, 3]] * 2 + [[4, 5, -1, -1]])
    candidates = x.detach()[ids.clamp_min(0)].requires_grad_(grad)
    torch.library.opcheck(candidate_scores_op, (q, candidates, ids, metric, p, MIB))


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize(("metric", "p"), METRICS)
def test_the_backward_operators(metric, p, dtypes):
    q, x = tensors(dtypes)
    ids = torch.tensor([[0, 1, 2, 3]] * 2 + [[4, 5, -1, -1]])
    grad = torch.rand(3, 4)
    for wanted in [(True, True), (True, False), (False, True)]:
        torch.library.opcheck(knn_backward_op, (grad, q, x, ids, metric, p, MIB, *wanted))
    candidates = x[ids.clamp_min(0)]
    for for_candidates in (True, False):
        args = (grad, q, candidates, ids, metric, p, MIB, for_candidates)
        torch.library.opcheck(candidate_scores_backward_op, args)
    lims = torch.tensor([0, 3, 3, 4])
    args = (grad[0], q, x, torch.arange(4), lims, metric, p, MIB)
    torch.library.opcheck(range_search_backward_op, args)
    args = (torch.rand(3, 60), q, x, metric, p, MIB)
    torch.library.opcheck(pairwise_distance_backward_op, args)
    args = (torch.rand(3, 60).T, x, q, metric, p, MIB)
    torch.library.opcheck(pairwise_distance_backward_op, args)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_assign(metric, dtypes):
    torch.library.opcheck(assign_op, (*tensors(dtypes), metric, MIB))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_linear_map(dtype, grad):
    q, x = tensors((dtype, torch.float32))
    for before, after in [(None, None), (torch.rand(5), torch.rand(60))]:
        torch.library.opcheck(linear_map_op, (q.detach().requires_grad_(grad), x, before, after))
