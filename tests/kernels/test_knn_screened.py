"""Screened search: the reference's answers for any data, and that the screen is what finds them."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elips_torch.core.metric import resolve_metric
from elips_torch.kernels import knn_screened
from elips_torch.kernels.knn_approximated import ApproximatedSearch
from elips_torch.kernels.knn_complete import CompleteSearch
from elips_torch.kernels.knn_exact import knn_exact
from elips_torch.kernels.knn_screened import ScreenedSearch
from elips_torch.kernels.plane import encode, make_plane, mean_of
from elips_torch.kernels.screen import code_queries
from elips_torch.kernels.selection import Selection
from elips_torch.reference import knn as reference

METRICS = ["l2", "ip", "cosine"]
KINDS = ["int8", "bf16"]
WORKSPACE = 64 * 2**20
FEW = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(autouse=True)
def _small_problems_take_every_step(monkeypatch):
    monkeypatch.setattr("elips_torch.kernels.exact_tile._FEW_FEATURES", 0)


@pytest.fixture
def certified(monkeypatch):
    """List, per search that ran, its class and how many queries it certified."""
    seen = []
    for search in (ScreenedSearch, ApproximatedSearch, CompleteSearch):
        run = search.run

        def spy(self, *args, run=run):
            result = run(self, *args)
            seen.append((type(self), int(result[2].sum())))
            return result

        monkeypatch.setattr(search, "run", spy)
    return seen


def search(metric, kind, queries, database, k, ranks=None, selection=Selection(), workspace=WORKSPACE):
    plane = make_plane(resolve_metric(metric), database, kind)
    assert plane is not None
    return knn_exact(queries, database, k, resolve_metric(metric), ranks, selection, workspace, plane)


def assert_reference(metric, found, queries, database, k, ids=None, mask=None, exclude=None):
    """Compare with the definition's scores sorted by (score, id), as the reference does pair by pair."""
    scores, rows = found
    kind, n_rows = resolve_metric(metric), database.shape[0]
    exact = kind.rounded_score(queries[:, None].double(), database[None].double().contiguous())
    hidden = torch.zeros(exact.shape, dtype=torch.bool)
    if mask is not None:
        hidden |= ~mask
    if exclude is not None:
        spare = torch.zeros(len(queries), n_rows + 1, dtype=torch.bool)
        hidden |= spare.scatter_(1, exclude.where(exclude >= 0, n_rows), True)[:, :n_rows]
    order = (torch.arange(n_rows) if ids is None else ids).argsort().expand_as(exact)
    keys = exact.gather(1, order)
    order = order.gather(1, keys.argsort(dim=1, descending=kind.higher_is_better, stable=True))
    order = order.gather(1, hidden.gather(1, order).long().argsort(dim=1, stable=True))[:, :k]
    missing = hidden.gather(1, order)
    assert rows.shape == (len(queries), k)
    assert bool((rows[:, n_rows:] == -1).all())
    assert bool((scores[:, n_rows:] == kind.worst).all())
    assert torch.equal(scores[:, :n_rows], exact.gather(1, order).masked_fill(missing, kind.worst))
    assert torch.equal(rows[:, :n_rows], order.masked_fill(missing, -1))


@pytest.mark.parametrize("metric", METRICS)
def test_the_comparison_is_with_the_reference(metric):
    generator = torch.Generator().manual_seed(0)
    q, x = make("few integers", *torch.randn(2, 60, 4, generator=generator), generator)
    q, ids, mask = (
        q[:2],
        torch.randperm(60, generator=generator),
        torch.rand(2, 60, generator=generator) < 0.2,
    )
    exclude = mask.long().argmax(1, keepdim=True)
    expected = reference.knn(q, x, 20, metric, ids=ids, mask=mask, exclude=ids[exclude])
    rows = torch.where(expected.ids < 0, -1, ids.argsort()[expected.ids])
    assert bool((rows == -1).any())
    assert_reference(metric, (expected.scores, rows), q, x, 20, ids, mask, exclude)


def make(name, q, x, generator):
    n, dim = x.shape
    steps = torch.arange(n)[:, None]
    direction = torch.randn(1, dim, generator=generator)
    if name == "near ties":
        return q, x[:1] + direction * steps * 2.0**-22
    if name == "ties by the last bit":
        return q, x[:1].expand(n, dim).clone().view(torch.int32).add((steps % 5).int()).view(torch.float32)
    if name == "sphere":
        # All rows are equally far from the first query, but for rounding.
        return q, q[:1] + 3.0 * x / torch.linalg.vector_norm(x, dim=1, keepdim=True)
    if name == "duplicates":
        return q, x[steps[:, 0] % 37]
    if name == "all equal":
        return q, x[:1].expand(n, dim).clone()
    if name == "offset":
        return q + 1e4, x + 1e4
    if name == "far offset":
        return q + 1e7, x * 8 + 1e7
    if name == "sizes":
        logs = torch.rand(n, 1, generator=generator) * 9 - 3
        return q * 10 ** (torch.rand(len(q), 1, generator=generator) * 9 - 3), x * 10**logs
    if name == "integers":
        return (q * 30).round().clamp(-127, 127), (x * 30).round().clamp(-128, 127)
    if name == "bytes":
        return (q * 40 + 128).round().clamp(0, 255), (x * 40 + 128).round().clamp(0, 255)
    if name == "few integers":
        return q.sign(), x.sign()
    if name == "integers, others asked":
        return q * 30, (x * 30).round().clamp(-128, 127)
    if name == "zero rows":
        return q * (torch.arange(len(q)) > 0)[:, None], x * (steps % 3 > 0)
    if name == "all zero":
        return q, x * 0.0
    if name == "tiny rows":
        # A row's direction does not depend on its length.
        return q + 1, (x + 1) * torch.where(steps % 7 == 0, 2.0**-76, 1.0)
    if name == "tiny rows, large queries":
        return q * 2.0**50, (1 + x * 2.0**-8) * 2.0**-77
    if name == "one large feature":
        return q, x * torch.where(torch.arange(dim) == 3, 1e5, 1.0)
    if name == "one large row":
        return q, torch.where(steps == 5, x * 1e6, x)
    if name == "float16":
        return q.half(), x.half()
    if name == "bfloat16":
        return q, x.bfloat16()
    assert name == "own rows"
    return x[: len(q)] * (1 + 2.0**-23), x


NAMES = [
    *("near ties", "ties by the last bit", "sphere", "duplicates", "all equal", "offset", "far offset"),
    *("sizes", "integers", "bytes", "few integers", "integers, others asked", "zero rows", "all zero"),
    *("tiny rows", "tiny rows, large queries", "one large feature", "one large row", "float16"),
    *("bfloat16", "own rows"),
]


@pytest.mark.parametrize("name", NAMES)
@FEW
@given(data=st.data())
def test_answers_are_those_of_the_reference(name, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16), "seed"))
    metric, kind = data.draw(st.sampled_from(METRICS)), data.draw(st.sampled_from(KINDS))
    k = data.draw(st.sampled_from([1, 2, 5]))
    n = 64 * (k + 3) + data.draw(st.integers(0, 260))
    dim, n_queries = data.draw(st.sampled_from([2, 3, 16, 33])), data.draw(st.integers(1, 4))
    q, x = torch.randn(n_queries, dim, generator=generator), torch.randn(n, dim, generator=generator)
    q, x = make(name, q, x, generator)
    # Ids in any order decide ties; rows are left out by masks and by number.
    ids = torch.randperm(n, generator=generator) * 3 if data.draw(st.booleans(), "ids") else None
    ranks = None if ids is None else ids.argsort().argsort()
    shape = data.draw(st.sampled_from([None, (n,), (n_queries, n)]), "mask")
    mask = (
        None
        if shape is None
        else torch.rand(shape, generator=generator) < data.draw(st.sampled_from([0.9, 0.3]))
    )
    m = data.draw(st.sampled_from([0, 1, 3]), "exclude")
    exclude = torch.randint(-1, n, (n_queries, m), generator=generator) if m else None
    found = search(metric, kind, q, x, k, ranks, Selection(mask, exclude))
    assert_reference(metric, found, q, x, k, ids, mask, exclude)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [1025, 2500])
def test_many_features(dim, metric, kind):
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(30, dim, generator=generator)
    x = centres.repeat(20, 1) + torch.randn(600, dim, generator=generator) * 0.1
    x[300:310] = x[:10]
    q = x[:3] + torch.randn(3, dim, generator=generator) * 0.01
    assert_reference(metric, search(metric, kind, q, x, 5), q, x, 5)


@pytest.mark.parametrize("k", [599, 600, 601, 900])
def test_k_near_the_number_of_rows(k):
    generator = torch.Generator().manual_seed(0)
    q, x = torch.randn(2, 8, generator=generator), torch.randn(600, 8, generator=generator)
    for metric in METRICS:
        assert_reference(metric, search(metric, "int8", q, x, k), q, x, k)


@pytest.mark.parametrize("metric", METRICS)
def test_queries_that_are_not_finite_leave_the_others_right(metric):
    generator = torch.Generator().manual_seed(0)
    q, x = torch.randn(6, 16, generator=generator), torch.randn(900, 16, generator=generator)
    bad = q.clone()
    bad[0, 0], bad[2, 3], bad[4] = torch.nan, torch.inf, 1e30
    scores, rows = search(metric, "int8", bad, x, 3)
    good = [1, 3, 5]
    assert_reference(metric, (scores[good], rows[good]), q[good], x, 3)
    assert_reference(metric, (scores[4:5], rows[4:5]), bad[4:5], x, 3)


# That the tests above can fail.


def misleading(metric):
    """Return data whose codes order the rows wrongly."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 32, generator=generator)
    q = torch.randn(20, 32, generator=generator)
    # One feature takes the whole range of a code; the others decide.
    x[:, 0], q[:, 0] = 300.0, 0.0
    x[::2, 0] = -300.0
    if metric == "l2":
        x[:, 0] = x[:, 0].abs()
        x[0, 0] = -1e4
        q[:, 0] = 300.0
    return q, x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
def test_without_the_bounds_the_answer_is_wrong(metric, kind, monkeypatch, certified):
    def careless(*args):
        coded = code_queries(*args)
        coded.terms[1:].zero_()
        coded.slack.zero_()
        return coded

    q, x = misleading(metric)
    expected = knn_exact(q, x, 5, resolve_metric(metric), None, Selection(), WORKSPACE)
    found = search(metric, kind, q, x, 5)
    assert torch.equal(found[1], expected[1])
    certified.clear()
    monkeypatch.setattr(knn_screened, "code_queries", careless)
    found = search(metric, kind, q, x, 5)
    assert certified[0] == (ScreenedSearch, 20)
    assert not torch.equal(found[1], expected[1])


@pytest.mark.parametrize("term", [1, 2], ids=["residual", "norm"])
@pytest.mark.parametrize("metric", METRICS)
def test_no_part_of_the_bounds_can_be_left_out(metric, term, monkeypatch):
    def careless(*args):
        coded = code_queries(*args)
        coded.terms[term].zero_()
        return coded

    generator = torch.Generator().manual_seed(0)
    q = torch.randn(20, 32, generator=generator)
    x = torch.randn(2048, 32, generator=generator)
    integers = torch.randint(-126, 127, (2048, 32), generator=generator).float()
    integers[:, 1] = 127.0
    if term == 1:
        # The codes of queries are exact, those of rows are coarse.
        x[:, 0], q = 300.0, integers[:20] * (torch.arange(32) > 0)
    else:
        x, q[:, 0] = integers * (torch.arange(32) > 0), 300.0
    x = torch.cat([x, -x])
    assert float(mean_of(resolve_metric(metric), x).abs().max()) < 1e-6
    expected = knn_exact(q, x, 5, resolve_metric(metric), None, Selection(), WORKSPACE)
    assert torch.equal(search(metric, "int8", q, x, 5)[1], expected[1])
    monkeypatch.setattr(knn_screened, "code_queries", careless)
    assert not torch.equal(search(metric, "int8", q, x, 5)[1], expected[1])


def test_without_room_for_ties_the_answer_is_wrong(monkeypatch, certified):
    """Far from the origin, scores differ by less than float32 can tell: the lower id wins."""
    generator = torch.Generator().manual_seed(0)
    ip = resolve_metric("ip")
    x = 2.0**20 + torch.randint(-8, 9, (4096, 16), generator=generator) / 8
    x[torch.randperm(4096, generator=generator)[100:]] -= 2.0**12
    q = torch.rand(100, 16, generator=generator)
    expected = knn_exact(q, x, 40, ip, None, Selection(), WORKSPACE)
    plane = encode(ip, x, torch.full((16,), 2.0**20), "int8")
    arguments = (q, x, 40, ip, None, Selection(), 2 * WORKSPACE, plane)
    certified.clear()
    assert torch.equal(knn_exact(*arguments)[1], expected[1])
    assert certified[0][1] > 0
    monkeypatch.setattr(knn_screened, "threshold", lambda rounding, lowest: lowest)
    assert not torch.equal(knn_exact(*arguments)[1], expected[1])


def test_one_feature():
    generator = torch.Generator().manual_seed(0)
    q, x = torch.randn(3, 1, generator=generator), torch.randn(4096, 1, generator=generator)
    assert_reference("l2", search("l2", "int8", q, x, 5), q, x, 5)


# That the screen does the work on ordinary data, and gives up on hard data.


def clustered(n, dim, n_queries, generator):
    centres = torch.randn(200, dim, generator=generator)
    owners = torch.randint(0, 200, (n + n_queries,), generator=generator)
    points = centres[owners] + 0.7 * torch.randn(n + n_queries, dim, generator=generator)
    points = torch.nn.functional.normalize(points)
    return points[:n_queries], points[n_queries:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
def test_ordinary_data_is_certified_and_few_rows_survive(metric, kind, certified, monkeypatch):
    survivors = []
    screen = ScreenedSearch._screen

    def spy(self, *args):
        found = screen(self, *args)
        survivors.append(found.owners.numel())
        return found

    monkeypatch.setattr(ScreenedSearch, "_screen", spy)
    q, x = clustered(20_000, 64, 100, torch.Generator().manual_seed(0))
    found = search(metric, kind, q, x, 10)
    assert certified == [(ScreenedSearch, 100)]
    assert sum(survivors) / 100 < (60 if kind == "int8" else 20)
    expected = knn_exact(q, x, 10, resolve_metric(metric), None, Selection(), WORKSPACE)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def hard(name):
    generator = torch.Generator().manual_seed(0)
    if name == "noise":
        return torch.randn(20, 4096, generator=generator), torch.randn(3000, 4096, generator=generator)
    q, x = torch.randn(20, 32, generator=generator), torch.randn(20_000, 32, generator=generator)
    if name == "duplicates":
        return q, x[:1].expand(20_000, 32).contiguous()
    x[777] *= 1e6
    return q, x


@pytest.mark.parametrize("name", ["duplicates", "one large row", "noise"])
@pytest.mark.parametrize("metric", METRICS)
def test_hard_data_moves_on_and_is_right(metric, name, certified):
    q, x = hard(name)
    found = search(metric, "int8", q, x, 10)
    assert certified[0][0] is ScreenedSearch
    if not (metric == "cosine" and name == "one large row"):
        assert certified[0][1] < 20
        assert len(certified) > 1
    expected = knn_exact(q.double(), x.double(), 10, resolve_metric(metric), None, Selection(), WORKSPACE)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("k", [10, 100])
def test_any_split_of_the_queries_gives_the_same_bits(k):
    q, x = clustered(30_000, 32, 600, torch.Generator().manual_seed(0))
    x[10_000:10_300] = x[:300]
    whole = search("l2", "int8", q, x, k)
    again = search("l2", "int8", q, x, k)
    assert torch.equal(whole[0], again[0])
    assert torch.equal(whole[1], again[1])
    for size in (1, 3, 100, 257):
        parts = q.split(size) if size > 3 else q[:60].split(size)
        scores, rows = (
            torch.cat(each)
            for each in zip(*(search("l2", "int8", part, x, k) for part in parts), strict=True)
        )
        assert torch.equal(scores, whole[0][: len(scores)])
        assert torch.equal(rows, whole[1][: len(rows)])


@pytest.mark.parametrize("workspace", [2**20, 2**21, 2**23])
def test_a_small_workspace_gives_the_same_bits(workspace, certified):
    q, x = clustered(30_000, 32, 100, torch.Generator().manual_seed(0))
    whole = search("l2", "int8", q, x, 10)
    found = search("l2", "int8", q, x, 10, workspace=workspace)
    assert torch.equal(found[0], whole[0])
    assert torch.equal(found[1], whole[1])
