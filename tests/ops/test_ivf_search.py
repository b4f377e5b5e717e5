"""Search of probed lists equals its reference, for every metric, order of tiles and workspace."""

import adversarial
import pytest
import torch

from elips_torch.core.errors import ImplementationError
from elips_torch.core.metric import resolve_metric
from elips_torch.indexes.inverted_lists import InvertedLists
from elips_torch.kernels import ivf_range_search_eager, ivf_search_eager
from elips_torch.kernels.list_layout import DecodedRows, StoredRows, list_major_tiles, query_major_tiles
from elips_torch.kernels.selection import Selection
from elips_torch.ops.ivf_search import IMPLEMENTATIONS, describe, run_ivf, run_ivf_range
from elips_torch.reference.ivf_search import ivf_search

# What looks up parts of codes has no part in vectors that are stored as they are.
NAMES = [each.name for each in IMPLEMENTATIONS if each.name != "tables"]


def skip_unless_it_serves(name, queries, layout, decode, kind):
    """Skip what an implementation says that it cannot do."""
    request = describe(queries, layout, decode, kind, 10)
    reasons = next(each for each in IMPLEMENTATIONS if each.name == name).unsupported_reasons(request)
    if reasons:
        pytest.skip(f"{name}: {'; '.join(reasons)}")


def lists_of(assignments, nlist):
    lists = InvertedLists()
    lists.rebuild(assignments, nlist)
    return lists.layout


def problem(kind, n=300, nlist=7, n_queries=9, n_probes=3, dim=10, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    database = adversarial.vectors(kind, n, dim, seed=1, dtype=dtype)
    queries = adversarial.vectors(kind, n_queries, dim, seed=2)
    assignments = torch.randint(0, nlist, (n,), generator=generator)
    probes = torch.stack([torch.randperm(nlist, generator=generator) for _ in range(n_queries)])[:, :n_probes]
    return queries, database, assignments, probes, lists_of(assignments, nlist)


def assert_same(found, wanted):
    torch.testing.assert_close(found[1], wanted[1], rtol=0, atol=0)
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=0)


@pytest.fixture(params=["by list", "by query"])
def _tiling(request, monkeypatch):
    tiling = list_major_tiles if request.param == "by list" else query_major_tiles
    for module in (ivf_search_eager, ivf_range_search_eager):
        monkeypatch.setattr(module, "choose_tiling", lambda *_: tiling)


@pytest.fixture
def _no_search_is_small(monkeypatch):
    monkeypatch.setattr(ivf_search_eager, "_FEW_FEATURES", 0)


@pytest.mark.usefixtures("_tiling", "_no_search_is_small")
@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("metric", "p"), adversarial.CASES, ids=adversarial.NAMES)
def test_equals_the_reference(implementation, metric, p, dtype):
    kind = resolve_metric(metric, p)
    queries, database, assignments, probes, layout = problem(kind, dtype=dtype)
    skip_unless_it_serves(implementation, queries, layout, StoredRows(database), kind)
    for k in (1, 10, 200, 400):
        found = run_ivf(queries, probes, layout, StoredRows(database), k, kind, implementation=implementation)
        assert_same(found, ivf_search(queries, database, assignments, probes, k, metric, p))


@pytest.mark.usefixtures("_tiling", "_no_search_is_small")
@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize("decoded", [False, True])
def test_selections_and_ranks(implementation, decoded):
    kind = resolve_metric("l2")
    queries, database, assignments, probes, layout = problem(kind, n=600)
    # Ties are decided by the ids, which do not ascend with the rows.
    database = (database * 2).round() / 2
    ids = torch.randperm(600, generator=torch.Generator().manual_seed(5))
    decode = DecodedRows(lambda rows: database[rows], torch.float32, 10) if decoded else StoredRows(database)
    skip_unless_it_serves(implementation, queries, layout, decode, kind)
    generator = torch.Generator().manual_seed(4)
    exclude = torch.randint(-1, 600, (9, 20), generator=generator)
    excluded_ids = torch.where(exclude < 0, -1, ids[exclude.clamp_min(0)])
    for mask in (
        None,
        torch.rand(600, generator=generator) < 0.5,
        torch.rand(9, 600, generator=generator) < 0.5,
    ):
        scores, rows = run_ivf(
            queries,
            probes,
            layout,
            decode,
            10,
            kind,
            ranks=ids,
            selection=Selection(mask, exclude),
            implementation=implementation,
        )
        wanted = ivf_search(
            queries, database, assignments, probes, 10, ids=ids, mask=mask, exclude=excluded_ids
        )
        assert_same((scores, torch.where(rows < 0, -1, ids[rows.clamp_min(0)])), wanted)


@pytest.mark.usefixtures("_tiling", "_no_search_is_small")
@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize(("metric", "p", "name"), adversarial.hard_cases())
def test_hard_data_is_exact(implementation, metric, p, name):
    kind = resolve_metric(metric, p)
    queries, database = adversarial.hard_sets(kind, 120, 6)[name]
    # All rows in the two lists that every query probes, of three.
    assignments = torch.arange(120) % 2 * 2
    probes = torch.tensor([[0, 2]]).expand(5, -1)
    layout = lists_of(assignments, 3)
    skip_unless_it_serves(implementation, queries, layout, StoredRows(database), kind)
    found = run_ivf(queries, probes, layout, StoredRows(database), 8, kind, implementation=implementation)
    assert_same(found, adversarial.oracle_knn(kind, queries, database, 8))


@pytest.mark.usefixtures("_no_search_is_small")
@pytest.mark.parametrize("metric", ["l2", "cosine", "canberra"])
def test_the_workspace_changes_nothing(metric):
    kind = resolve_metric(metric)
    queries, database, assignments, probes, layout = problem(kind, n=2000, n_queries=50, dim=20)
    arguments = (queries, probes, layout, StoredRows(database), 12, kind)
    wanted = adversarial.oracle_knn(kind, queries, database, 12, (assignments == probes[:, :, None]).any(1))
    assert_same(run_ivf(*arguments, workspace_bytes=2**20), wanted)
    assert_same(run_ivf(*arguments), wanted)


@pytest.mark.usefixtures("_tiling")
@pytest.mark.parametrize("metric", ["l2", "ip", "l1", "jensenshannon"])
def test_range_search_finds_what_search_finds(metric):
    kind = resolve_metric(metric)
    queries, database, assignments, probes, layout = problem(kind)
    mask = torch.rand(9, 300, generator=torch.Generator().manual_seed(4)) < 0.7
    wanted = ivf_search(queries, database, assignments, probes, 300, metric, mask=mask)
    radius = wanted.scores[:, 20].clone()
    for workspace in (2**20, 2**28):
        lims, scores, rows = run_ivf_range(
            queries,
            probes,
            layout,
            StoredRows(database),
            radius,
            kind,
            selection=Selection(mask),
            workspace_bytes=workspace,
        )
        for query in range(9):
            part = slice(int(lims[query]), int(lims[query + 1]))
            better = wanted.scores[query] > radius[query]
            within = better if kind.higher_is_better else wanted.scores[query] < radius[query]
            assert rows[part].tolist() == wanted.ids[query][within].tolist()
            assert torch.equal(scores[part], wanted.scores[query][within])


def test_many_hits_are_sorted_in_parts(monkeypatch):
    kind = resolve_metric("l2")
    queries, database, _, probes, layout = problem(kind)
    arguments = (queries, probes, layout, StoredRows(database), torch.full((9,), 1e9), kind)
    wanted = run_ivf_range(*arguments)
    monkeypatch.setattr(ivf_range_search_eager, "HIT_BYTES", 2**13)
    for one, other in zip(run_ivf_range(*arguments, workspace_bytes=2**20), wanted, strict=True):
        assert torch.equal(one, other)


def test_nothing_to_probe():
    kind = resolve_metric("ip")
    queries, database, _, probes, layout = problem(kind)
    scores, rows = run_ivf(queries, torch.full_like(probes, -1), layout, StoredRows(database), 4, kind)
    assert (rows == -1).all()
    assert (scores == -torch.inf).all()
    empty = lists_of(torch.empty(0, dtype=torch.int64), 7)
    assert (run_ivf(queries, probes, empty, StoredRows(database[:0]), 4, kind)[1] == -1).all()
    assert run_ivf(queries[:0], probes[:0], layout, StoredRows(database), 4, kind)[0].shape == (0, 4)


def test_implementations_say_what_they_cannot():
    queries, database, _, probes, layout = problem(resolve_metric("l2"))
    for name, metric, rows, why in (
        ("native", "l1", database.double(), "takes float32, bfloat16 and float16"),
        ("tables", "l2", database, "no parts to look up"),
    ):
        with pytest.raises(ImplementationError, match=why):
            run_ivf(queries, probes, layout, StoredRows(rows), 3, resolve_metric(metric), implementation=name)
