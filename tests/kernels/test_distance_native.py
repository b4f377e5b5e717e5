"""Search by distances in C++: the reference's answers for any data and any instruction set."""

import math

import pytest
import torch
from screened_cases import assert_reference

from elips_torch import FlatIndex, IVFFlatIndex, IVFSQIndex, knn
from elips_torch.core.errors import ImplementationError
from elips_torch.core.hardware import DeviceFacts, device_facts
from elips_torch.core.metric import METRICS, resolve_metric
from elips_torch.core.native import native_reasons
from elips_torch.indexes.inverted_lists import InvertedLists
from elips_torch.kernels import distance_native, knn_native, search_native
from elips_torch.kernels.distance_native import DistanceSearch, product_or_distance
from elips_torch.kernels.ivf_native import native_lists
from elips_torch.kernels.knn_exact import knn_exact
from elips_torch.kernels.list_layout import DecodedRows, StoredRows
from elips_torch.kernels.selection import Selection
from elips_torch.reference.ivf_search import ivf_search
from elips_torch.reference.knn import knn as reference_knn

pytestmark = pytest.mark.skipif(
    bool(native_reasons(device_facts("cpu"))), reason="; ".join(native_reasons(device_facts("cpu")))
)
WORKSPACE = 64 * 2**20
NAMES = [metric.name for metric in METRICS if metric.form != "product"]
CASES = [(name, None) for name in NAMES if name != "lp"]
CASES += [("lp", p) for p in (1, 2, 3, 4, 7, 0.5, 2.7)]
# Instruction sets that this machine can run.
WAYS = ["AVX2", *(["AVX512"] if device_facts("cpu").capability == "AVX512" else [])]


@pytest.fixture(autouse=True)
def _small_problems_take_every_step(monkeypatch):
    monkeypatch.setattr("elips_torch.kernels.exact_tile._FEW_FEATURES", 0)


@pytest.fixture(params=WAYS)
def instructions(request, monkeypatch):
    """Run the code for some instructions."""
    facts = DeviceFacts("cpu", "2 cores", request.param)
    for module in (knn_native, search_native):
        monkeypatch.setattr(module, "device_facts", lambda device: facts)


@pytest.fixture
def certified(monkeypatch):
    """List, per run of the search, how many queries it certified."""
    seen = []
    run = DistanceSearch.run

    def spy(self, *args):
        result = run(self, *args)
        seen.append(int(result[2].sum()))
        return result

    monkeypatch.setattr(DistanceSearch, "run", spy)
    return seen


def kind_of(case):
    return resolve_metric(*case)


def data(case, n_queries, n, dim, seed=0):
    """Return queries and a database in the metric's domain, with zeros, ties and rows that are queries."""
    generator = torch.Generator().manual_seed(seed)
    q, x = torch.rand(n_queries, dim, generator=generator), torch.rand(n, dim, generator=generator)
    if kind_of(case).domain[0] < 0.0:
        q, x = q - 0.4, x - 0.4
    x[::5] *= torch.rand(len(x[::5]), dim, generator=generator) < 0.6
    q[::3] *= torch.rand(len(q[::3]), dim, generator=generator) < 0.8
    x[n // 2 : n // 2 + n // 8] = x[: n // 8]
    x[7], q[0] = 0.0, x[5]
    return q, x


def search(case, q, x, k, ranks=None, selection=Selection(), workspace=WORKSPACE):
    return knn_exact(q, x, k, kind_of(case), ranks, selection, workspace, None, product_or_distance)


def assert_right(case, found, q, x, k, ids=None, mask=None, exclude=None):
    assert_reference(case[0], found, q, x, k, ids, mask, exclude, p=case[1])


def assert_same(found, expected):
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dim", [1, 2, 7, 8, 15, 16, 17, 31, 33, 64, 67])
def test_every_number_of_features(dim, case, instructions, certified):
    for n_queries in (3, 20):
        q, x = data(case, n_queries, 400, dim, seed=dim)
        assert_right(case, search(case, q, x, 6), q, x, 6)
    assert certified == [3, 20]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_number_of_queries_and_threads(case, threads, instructions, certified, monkeypatch):
    monkeypatch.setattr(knn_native, "native_threads", lambda: threads)
    monkeypatch.setattr(knn_native, "_WORTH_THREADS", 0)
    for n_queries in (1, 4, 5, 8, 9, 17, 33, 64, 65, 200):
        q, x = data(case, n_queries, 333, 21, seed=n_queries)
        assert_right(case, search(case, q, x, 9), q, x, 9)
    assert certified == [1, 4, 5, 8, 9, 17, 33, 64, 65, 200]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_half_precision(case, dtype, instructions, certified):
    for dim in (5, 16, 37):
        q, x = (each.to(dtype) for each in data(case, 20, 500, dim))
        for n_queries, of in ((2, q), (20, q), (20, q.float())):
            found = search(case, of[:n_queries], x, 8)
            assert_right(case, found, of[:n_queries], x, 8)
    assert certified == [2, 20, 20] * 3


def test_the_pairs_of_the_reference(certified):
    """`assert_reference` scores all pairs at once; the reference itself, one after the other."""
    for case in CASES:
        q, x = data(case, 2, 40, 11)
        assert_same(search(case, q, x, 5), reference_knn(q, x, 5, *case))
    assert certified == [2] * len(CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_k(case, certified):
    q, x = data(case, 12, 300, 10)
    for k in (1, 2, 150, 300):
        assert_right(case, search(case, q, x, k), q, x, k)
    assert certified == [12] * 4


@pytest.mark.parametrize("n_queries", [3, 40])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_masks_exclusions_and_ranks(case, n_queries, certified):
    generator = torch.Generator().manual_seed(1)
    q, x = data(case, n_queries, 400, 12)
    ids = torch.randperm(400, generator=generator)
    exclude = torch.randint(-1, 400, (n_queries, 30), generator=generator)
    shared = torch.rand(400, generator=generator) < 0.5
    own = torch.rand(n_queries, 400, generator=generator) < 0.2
    for mask in (None, shared, own):
        selection = Selection(mask, exclude)
        found = search(case, q, x, 12, ids.argsort().argsort(), selection)
        assert_right(case, found, q, x, 12, ids, mask, exclude)
    assert certified == [n_queries] * 3


@pytest.mark.parametrize("n_queries", [3, 40])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_features_of_any_size(case, n_queries, instructions):
    """Scores are those of the definition, whoever finds them."""
    q, x = data(case, n_queries, 500, 9)
    for scale in (2.0**-140, 2.0**-110, 2.0**-60, 2.0**30, 2.0**90, 2.0**126):
        if case[0] == "gower" and scale > 1.0:
            continue
        assert_right(case, search(case, q * scale, x * scale, 7), q * scale, x * scale, 7)
        # Rows of that size among others, and queries.
        mixed, asked = x.clone(), q.clone()
        mixed[::9] *= scale
        mixed[4, 3] *= scale
        asked[1] *= scale
        assert_right(case, search(case, asked, mixed, 7), asked, mixed, 7)


@pytest.mark.parametrize("n_queries", [3, 40])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_not_finite_or_out_of_the_domain(case, n_queries, instructions):
    q, x = data(case, n_queries, 500, 9)
    bad, rows = q.clone(), x.clone()
    bad[0, 2], bad[2, 0] = math.nan, math.inf
    rows[3, 1], rows[80, 4], rows[81, 8], rows[9] = math.nan, math.inf, -math.inf, -1.0
    good = [i for i in range(n_queries) if i not in (0, 2)]
    scores, found = search(case, bad, rows, 7)
    # Rows whose score is NaN come last, and are not among the seven.
    kept = ~kind_of(case).score(q[:1].double(), rows.double()).isnan()
    assert_right(case, (scores[good], found[good]), q[good], rows.nan_to_num(nan=1e30), 7, mask=kept)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_many_ties(case, certified):
    """Rows that are all as far away: the lower ids win."""
    q, x = data(case, 20, 900, 6)
    x = x[torch.arange(900) % 11].contiguous()
    assert_right(case, search(case, q, x, 30), q, x, 30)
    whole = (x * 4).round() / 4, (q * 4).round() / 4
    assert_right(case, search(case, whole[1], whole[0], 30), whole[1], whole[0], 30)
    # Of whole numbers so many are as far away that not all may be kept.
    assert certified[0] == 20


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_that_differ_by_the_last_bit(case, certified):
    q, x = data(case, 10, 300, 12)
    x = x[1:2].repeat(300, 1).view(torch.int32) + (torch.arange(3600).view(300, 12) % 5).int()
    x = x.view(torch.float32)
    assert_right(case, search(case, q, x, 15), q, x, 15)
    assert certified == [10]


def test_sums_between_two_float32_numbers_need_no_second_look(monkeypatch, certified):
    """What random numbers of few bits add up to is exact, and often in the middle between two float32."""
    generator = torch.Generator().manual_seed(0)
    q, x = torch.rand(50, 64, generator=generator), torch.rand(2000, 64, generator=generator)
    monkeypatch.setattr(DistanceSearch, "_ranked", lambda *args: pytest.fail("looked again"))
    for name in ("l1", "gower"):
        assert_right((name, None), search((name, None), q, x, 10), q, x, 10)
    assert certified == [50, 50]


def test_where_rounding_is_open_the_definition_decides(monkeypatch):
    settled = []
    settle = DistanceSearch._ranked
    monkeypatch.setattr(
        DistanceSearch, "_ranked", lambda self, *args: settled.append(args[1]) or settle(self, *args)
    )
    # 1 + 2**-24 lies in the middle; what is added is far below.
    x = torch.zeros(200, 3)
    x[:, 0], x[:, 1], x[:, 2] = 1.0, 2.0**-24, 2.0**-90
    x[::2, 1] += 2.0**-40
    assert_right(("l1", None), search(("l1", None), torch.zeros(3, 3), x, 10), torch.zeros(3, 3), x, 10)
    assert settled


def test_ordinary_data_is_certified_and_little_is_kept(certified, monkeypatch):
    ranked = []
    run = knn_native.native_search

    def spy(**arguments):
        outcome = run(**arguments)
        ranked.append(int(arguments["status"][1].max()))
        return outcome

    monkeypatch.setattr(knn_native, "native_search", spy)
    for case in CASES:
        q, x = data(case, 40, 5000, 32)
        search(case, q, x, 10)
    assert certified == [40] * len(CASES)
    # Ten, those that tie with them, and what bounds cannot tell apart.
    assert max(ranked) < 100


@pytest.mark.parametrize("workspace", [2**20, 2**22])
def test_a_small_workspace_gives_the_same_bits(workspace):
    for case in CASES:
        q, x = data(case, 60, 3000, 16)
        assert_same(search(case, q, x, 10, workspace=workspace), search(case, q, x, 10))


# Lists.


def lists_problem(case, n_queries, n=500, nlist=13, n_probes=6, dim=19):
    q, x = data(case, n_queries, n, dim)
    generator = torch.Generator().manual_seed(n_queries)
    # Some lists stay empty.
    assignments = torch.randint(0, nlist - 3, (n,), generator=generator)
    probes = torch.stack([torch.randperm(nlist, generator=generator) for _ in range(n_queries)])[:, :n_probes]
    lists = InvertedLists()
    lists.rebuild(assignments, nlist)
    return q, x, assignments, probes, lists.layout


def search_lists(case, decode, q, probes, layout, k, ranks=None, selection=Selection(), workspace=WORKSPACE):
    n_excluded = selection.n_excluded
    step = native_lists(layout, decode, kind_of(case), k, probes.shape[1], n_excluded, workspace)
    scores, rows, answered = step.run(q, probes, k, ranks, selection, workspace)
    assert bool(answered.all())
    return scores, rows


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("n_queries", [1, 6, 30])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_lists_equal_the_reference(case, n_queries, threads, instructions, monkeypatch):
    monkeypatch.setattr(knn_native, "native_threads", lambda: threads)
    monkeypatch.setattr(knn_native, "_WORTH_THREADS", 0)
    q, x, assignments, probes, layout = lists_problem(case, n_queries)
    if n_queries > 1:
        probes[1] = -1
        probes[2, 2:] = -1
    stored, decoded = StoredRows(x), DecodedRows(lambda rows: x[rows], torch.float32, x.shape[1])
    keep = torch.stack([torch.isin(assignments, each) for each in probes])
    for decode in (stored, decoded):
        found = search_lists(case, decode, q, probes, layout, 12)
        assert_right(case, found, q, x, 12, mask=keep)


def test_lists_equal_the_reference_of_lists():
    case = ("canberra", None)
    q, x, assignments, probes, layout = lists_problem(case, 7)
    found = search_lists(case, StoredRows(x), q, probes, layout, 12)
    assert_same(found, ivf_search(q, x, assignments, probes, 12, "canberra"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lists_with_selections_and_ranks(case):
    generator = torch.Generator().manual_seed(1)
    q, x, assignments, probes, layout = lists_problem(case, 20)
    ids = torch.randperm(500, generator=generator)
    exclude = torch.randint(-1, 500, (20, 30), generator=generator)
    keep = torch.stack([torch.isin(assignments, each) for each in probes])
    for mask in (torch.rand(500, generator=generator) < 0.5, torch.rand(20, 500, generator=generator) < 0.3):
        selection = Selection(mask, exclude)
        found = search_lists(case, StoredRows(x), q, probes, layout, 9, ids.argsort().argsort(), selection)
        assert_right(case, found, q, x, 9, ids, mask & keep, exclude)


# Indexes, and the choice.


@pytest.mark.parametrize("case", CASES, ids=str)
def test_indexes_choose_it_and_prepare_it(case):
    q, x = data(case, 40, 2000, 16)
    flat = FlatIndex(16, case[0], p=case[1])
    listed = IVFFlatIndex(16, 8, case[0], p=case[1], nprobe=3, niter=3).fit(x)
    for index in (flat, listed):
        index.add(x)
        index.remove(index.ids[::7])
        assert index.explain(q, implementation="native").chosen == "native"
        for n_queries in (1, 40, 1):
            found = index.search(q[:n_queries], 5, implementation="native")
            assert_same(found, index.search(q[:n_queries], 5, implementation="eager"))
        assert any(each is not None for each in index._searches._ready.searches.values())
    assert_same(listed.search(q, 5, nprobe=8, implementation="native"), flat.search(q, 5))


def test_vectors_that_are_decoded():
    q, x = data(("l1", None), 20, 2000, 16)
    index = IVFSQIndex(16, 8, "int8", "l1", nprobe=3, niter=3).fit(x)
    index.add(x)
    assert_same(index.search(q, 5, implementation="native"), index.search(q, 5, implementation="eager"))


def test_float64_is_left_to_others():
    q, x = data(("l1", None), 3, 200, 8)
    for queries, database in ((q.double(), x), (q, x.double())):
        with pytest.raises(ImplementationError, match="takes float32, bfloat16 and float16"):
            knn(queries, database, 3, metric="l1", implementation="native")
    found = knn(q.double(), x.double(), 3, metric="l1")
    assert_same(found, knn(q, x, 3, metric="l1", implementation="native"))


def test_so_many_features_that_nothing_is_bounded_are_left_to_others():
    x = torch.rand(3, 2**17)
    assert distance_native.distance_first(x, resolve_metric("l1"), 1, 0, 2**28) is None


# That the tests above can fail.


@pytest.mark.parametrize("case", [case for case in CASES if case[0] != "linf"], ids=str)
def test_without_the_bounds_the_answer_is_wrong(case, monkeypatch):
    """Rows that float32 orders wrongly."""
    generator = torch.Generator().manual_seed(3)
    # Sums of the same numbers, in many orders.
    q, base = torch.full((40, 1500), 0.5), torch.rand(1500, generator=generator)
    x = torch.stack([base[torch.randperm(1500, generator=generator)] for _ in range(250)])
    expected = search(case, q, x, 5)
    assert_right(case, expected, q, x, 5)
    monkeypatch.setattr(distance_native, "error_share", lambda metric, dim: 0.0)
    found = search(case, q, x, 5)
    assert not torch.equal(found[1], expected[1])
