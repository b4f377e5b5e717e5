import dataclasses
import statistics
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranked_lists import by_trec_eval, in_plain_python, random_lists
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics import MetricCollection, retrieval

from elips_torch import FlatIndex, SearchResult
from elips_torch.core.errors import (
    ArgumentError,
    DeviceError,
    DtypeError,
    ElipsError,
    NonFiniteError,
    ShapeError,
)
from elips_torch.evaluation import (
    MAP,
    MRR,
    NDCG,
    HitRateAtK,
    LabelRecallAtK,
    PrecisionAtK,
    RecallAtK,
    RetrievalMetrics,
    RPrecision,
    matching,
    measures,
)

KS = (1, 5, 10)
SINGLE = (RecallAtK, HitRateAtK, PrecisionAtK, NDCG, MAP, MRR)


def values(metric):
    return {name: value.item() for name, value in metric.compute().items()}


def measured(retrieved, relevant, ks=KS, **options):
    metrics = RetrievalMetrics(ks)
    metrics.update(retrieved, relevant, **options)
    return values(metrics)


def ragged(relevant, relevance=None):
    kept = [row >= 0 for row in relevant]
    lists = [row[keep] for row, keep in zip(relevant, kept, strict=True)]
    if relevance is None:
        return lists
    return lists, [row[keep] for row, keep in zip(relevance, kept, strict=True)]


def lims_of(lists):
    return torch.tensor([0, *map(len, lists)]).cumsum(0)


@pytest.mark.parametrize("r", [1, 6, 15])
@pytest.mark.parametrize("seed", range(4))
def test_equals_trec_eval(seed, r, matched):
    retrieved, relevant, relevance = random_lists(seed, k=12, r=r)
    ones = torch.ones_like(relevance)
    assert measured(retrieved, relevant) == pytest.approx(
        by_trec_eval(retrieved, relevant, ones, KS), abs=1e-6
    )
    graded = measured(retrieved, relevant, relevance=relevance)
    assert graded == pytest.approx(by_trec_eval(retrieved, relevant, relevance, KS), abs=1e-6)
    # Fractions are kept, as trec_eval's integers are.
    halves = measured(retrieved, relevant, relevance=relevance / 2)
    assert halves == pytest.approx(graded, abs=1e-6)


@pytest.mark.parametrize("name", ["compared", "looked up"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_equals_the_definitions_in_plain_python(name, data):
    q, k, r = (data.draw(st.integers(least, most)) for least, most in ((0, 5), (1, 7), (0, 9)))
    ids = st.integers(-1, 9)
    retrieved = [[data.draw(ids) for _ in range(k)] for _ in range(q)]
    relevant = [[data.draw(ids) for _ in range(r)] for _ in range(q)]
    ks = tuple(data.draw(st.sets(st.integers(1, k), min_size=1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "_FEW", 1000 if name == "compared" else 0)
        found = measured(
            torch.tensor(retrieved, dtype=torch.int64).reshape(q, k),
            torch.tensor(relevant, dtype=torch.int64).reshape(q, r),
            ks,
        )
    rows = [in_plain_python(*row, ks) for row in zip(retrieved, relevant, strict=True)]
    rows = [row for row in rows if row is not None]
    if rows:
        expected = {key: sum(row[key] for row in rows) / len(rows) for key in found}
        assert found == pytest.approx(expected, abs=1e-6)
    else:
        assert all(value != value for value in found.values())


@pytest.mark.parametrize("k", KS)
def test_equals_torchmetrics_where_all_that_is_relevant_is_retrieved(k):
    # torchmetrics sees only what was retrieved, and takes what has no positive score for irrelevant.
    retrieved, _, _ = random_lists(0, k=15)
    generator = torch.Generator().manual_seed(0)
    retrieved = torch.rand(30, 15, generator=generator).argsort(1)
    degrees = torch.randint(0, 4, (30, 15), generator=generator)
    degrees[3] = 0
    scores = torch.linspace(1, 0.1, 15).expand(30, 15)
    indexes = torch.arange(30)[:, None].expand(30, 15)
    found = measured(retrieved, retrieved.masked_fill(degrees == 0, -1), k)
    graded = measured(retrieved, retrieved, k, relevance=degrees)

    def oracle(metric, target, **options):
        return metric(empty_target_action="skip", **options)(scores, target, indexes).item()

    binary = degrees > 0
    expected = {
        f"recall@{k}": oracle(retrieval.RetrievalRecall, binary, top_k=k),
        f"hit_rate@{k}": oracle(retrieval.RetrievalHitRate, binary, top_k=k),
        f"precision@{k}": oracle(retrieval.RetrievalPrecision, binary, top_k=k),
        f"ndcg@{k}": oracle(retrieval.RetrievalNormalizedDCG, binary, top_k=k),
        f"mrr@{k}": oracle(retrieval.RetrievalMRR, binary, top_k=k),
        "r_precision": oracle(retrieval.RetrievalRPrecision, binary),
    }
    # torchmetrics divides the average precision by the hits among the first k, trec_eval by R.
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert measured(retrieved, retrieved.masked_fill(~binary, -1), 15)["map@15"] == pytest.approx(
        oracle(retrieval.RetrievalMAP, binary), abs=1e-6
    )
    assert graded[f"ndcg@{k}"] == pytest.approx(
        oracle(retrieval.RetrievalNormalizedDCG, degrees, top_k=k), abs=1e-6
    )


def test_tied_scores_leave_the_order_of_the_index():
    index = FlatIndex(2)
    index.add(torch.ones(4, 2), ids=[7, 3, 5, 1])
    found = index.search(torch.zeros(1, 2), 4).ids
    assert measured(found, torch.tensor([[5]]), 4)["mrr@4"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("graded", [False, True])
def test_every_form_of_relevant_ids_gives_the_same(graded, matched):
    retrieved, relevant, relevance = random_lists(2, k=10)
    relevance = relevance if graded else None
    padded = measured(retrieved, relevant, relevance=relevance)
    lists, degrees = ragged(relevant, relevance) if graded else (ragged(relevant), None)
    assert measured(retrieved, lists, relevance=degrees) == padded
    flat = None if degrees is None else torch.cat(degrees)
    assert measured(retrieved, torch.cat(lists), lims=lims_of(lists), relevance=flat) == padded
    assert measured(retrieved.int(), relevant.int(), relevance=relevance) == padded
    first = relevant[:, :1]
    assert measured(retrieved, first[:, 0]) == measured(retrieved, first)


def test_one_query_with_very_many_relevant_ids_costs_no_padding():
    n = 200_000
    lists = [torch.arange(n)] + [torch.tensor([i]) for i in range(1, 20_000)]
    retrieved = torch.arange(20_000)[:, None] + torch.arange(3)
    found = measured(retrieved, lists, 3)
    assert found["recall@3"] == pytest.approx((3 / n + 19_999) / 20_000)


def test_r_precision_looks_behind_the_largest_k():
    retrieved = torch.tensor([[9, 1, 2, 3]])
    for metric in (RPrecision(), RetrievalMetrics(1)):
        metric.update(retrieved, torch.tensor([[1, 2, 3]]))
        assert values(metric)["r_precision"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("graded", [False, True])
def test_each_metric_alone_gives_its_number(graded):
    retrieved, relevant, relevance = random_lists(5, k=10)
    options = {"relevance": relevance} if graded else {}
    everything = measured(retrieved, relevant, **options)
    together = MetricCollection([*(metric(KS) for metric in SINGLE), RPrecision()])
    together.update(retrieved, relevant, **options)
    assert values(together) == everything


def test_labels_in_place_of_ids():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, 4, (30,), generator=generator)
    retrieved = torch.randint(-1, 4, (30, 10), generator=generator)
    counts = torch.randint(10, 20, (30,), generator=generator)
    metrics = RetrievalMetrics(KS, labels=True)
    metrics.update(retrieved, labels, n_relevant=counts)
    # Ids of its own for each entry say the same.
    entries = torch.arange(300).view(30, 10)
    relevant = [
        torch.cat([row_ids[row == label], torch.arange(1000, 1000 + int(count - (row == label).sum()))])
        if label >= 0
        else row_ids[:0]
        for row_ids, row, label, count in zip(entries, retrieved, labels, counts, strict=True)
    ]
    expected = measured(entries, relevant)
    found = values(metrics)
    assert {name.replace("label_recall", "recall"): value for name, value in found.items()} == expected
    single, hits = LabelRecallAtK(KS), HitRateAtK(KS)
    single.update(retrieved, labels, counts)
    hits.update(retrieved, labels)
    assert found.items() >= values(single).items()
    assert found.items() >= values(hits).items()


@pytest.mark.parametrize(("action", "expected"), [("skip", 0.5), ("neg", 0.25), ("pos", 0.75)])
def test_a_query_without_relevant_ids_counts_as_asked(action, expected):
    retrieved = torch.tensor([[5, 6], [5, 6]])
    relevant = torch.tensor([[5, 7], [-1, -1]])
    metric = RetrievalMetrics(2, empty_target_action=action)
    metric.update(retrieved, relevant)
    assert values(metric)["recall@2"] == expected
    single = RecallAtK(2, empty_target_action=action)
    single.update(retrieved, [row[row >= 0] for row in relevant])
    assert values(single)["recall@2"] == expected


def test_a_query_without_relevant_ids_can_be_refused():
    metric = RetrievalMetrics(2, empty_target_action="error")
    metric.update(torch.tensor([[5, 6]]), torch.tensor([[5]]))
    before = values(metric)
    with pytest.raises(ArgumentError, match="no id is relevant in row 1, and"):
        metric.update(torch.tensor([[5, 6], [5, 6]]), torch.tensor([[5], [-1]]))
    assert values(metric) == before
    with pytest.raises(ArgumentError, match="empty_target_action is 'none'"):
        RecallAtK(2, empty_target_action="none")


def test_without_a_query_there_is_no_average():
    assert all(value != value for value in measured(torch.empty(0, 10, dtype=torch.int64), []).values())


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(40)), parts=st.lists(st.integers(1, 20), min_size=1, max_size=4))
def test_order_and_batches_change_no_digit(order, parts):
    retrieved, relevant, relevance = (each[list(order)] for each in random_lists(3, k=10))
    whole, split = RetrievalMetrics(KS), RetrievalMetrics(KS)
    whole.update(*random_lists(3, k=10)[:2], relevance=random_lists(3, k=10)[2])
    start = 0
    for size in [*parts, 40]:
        part = slice(start, start + size)
        split.update(retrieved[part], relevant[part], relevance=relevance[part])
        start += size
    assert torch.equal(whole.total, split.total)
    assert values(whole) == values(split)


@pytest.mark.parametrize(
    "cast",
    [
        lambda module: module.half(),
        lambda module: module.to(torch.bfloat16),
        lambda module: module.type(torch.float16),
        lambda module: [metric.set_dtype(torch.float16) for metric in module.children()],
    ],
)
def test_casts_of_the_module_that_holds_the_metric_change_no_digit(cast):
    module = torch.nn.Module()
    module.recall, module.ndcg, expected = RecallAtK(1), NDCG(3), NDCG(3)
    cast(module)
    retrieved = torch.tensor([[1, 2, 3]])
    for i in range(1000):
        module.recall.update(retrieved, torch.tensor([1]))
        for metric in (module.ndcg, expected):
            metric.update(retrieved, torch.tensor([[3 - i % 3, 9]]))
    assert module.recall.compute()["recall@1"] == 1.0
    assert module.ndcg.compute() == expected.compute()
    cast(module)
    module.recall.reset()
    module.recall.update(retrieved, torch.tensor([1]))
    assert module.recall.compute()["recall@1"].dtype == torch.float32


def test_state_does_not_grow():
    metrics = RetrievalMetrics(KS)
    sizes = set()
    for seed in range(3):
        metrics.update(*random_lists(seed, k=10)[:2])
        sizes.add(sum(state.numel() for state in metrics.metric_state.values()))
    assert sizes == {len(metrics.names) + 1}


def test_a_call_gives_the_values_of_its_batch_and_adds_them():
    batches = [random_lists(seed, k=10)[:2] for seed in range(2)]
    metrics = RetrievalMetrics(KS)
    for batch in batches:
        assert {name: value.item() for name, value in metrics(*batch).items()} == measured(*batch)
    whole = RetrievalMetrics(KS)
    for batch in batches:
        whole.update(*batch)
    assert values(metrics) == values(whole)


def _share(rank, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2
    )
    retrieved, relevant, relevance = random_lists(7, q=41, k=10)
    metrics = RetrievalMetrics(KS)
    # Uneven, and one rank last has nothing.
    for part in (slice(0, 23), slice(23, 30)) if rank == 0 else (slice(30, 41),):
        metrics.update(retrieved[part], relevant[part], relevance=relevance[part])
    torch.save(metrics.compute(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_numbers_of_one(tmp_path):
    torch.multiprocessing.spawn(_share, (str(tmp_path),), nprocs=2)
    retrieved, relevant, relevance = random_lists(7, q=41, k=10)
    one = measured(retrieved, relevant, relevance=relevance)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert {name: value.item() for name, value in found.items()} == one


IDS = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("relevant", "options", "error", "words"),
    [
        (IDS.float(), {}, DtypeError, "relevant_ids has dtype torch.float32"),
        (IDS[None], {}, ShapeError, "relevant_ids has shape"),
        (IDS[:1], {}, ShapeError, r"expected \(1, K\)"),
        (IDS.to("meta"), {}, DeviceError, "retrieved_ids is on cpu"),
        ([[0], [1]], {}, DtypeError, r"relevant_ids\[0\] is a list"),
        ([IDS, IDS], {}, ShapeError, r"relevant_ids\[0\] has shape"),
        (IDS, {"lims": torch.tensor([0, 3, 6])}, ShapeError, r"expected \(M,\) beside lims"),
        (IDS.flatten(), {"lims": torch.tensor([0, 3, 5])}, ArgumentError, "rise from 0 to 6"),
        (IDS.flatten(), {"lims": torch.tensor([0, 7, 6])}, ArgumentError, "rise from 0 to 6"),
        (IDS.flatten(), {"lims": torch.tensor([], dtype=torch.int64)}, ArgumentError, "rise from 0 to 6"),
        (IDS, {"relevance": IDS[:, :2]}, ShapeError, "relevance has shape"),
        (IDS, {"relevance": [1, 2]}, DtypeError, "relevance is a list"),
        (IDS, {"relevance": IDS / 0}, NonFiniteError, "relevance has NaN"),
        ([IDS[0], IDS[1]], {"relevance": [IDS[0]]}, ShapeError, "relevance has another form"),
        ([IDS[0], IDS[1]], {"relevance": IDS}, ShapeError, "relevance has another form"),
        (IDS[:, 0], {"n_relevant": IDS[:, 0]}, ArgumentError, "labels is False, expected ids"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(relevant, options, error, words):
    metrics = RetrievalMetrics(3)
    with pytest.raises(error, match=words) as caught:
        metrics.update(IDS, relevant, **options)
    assert isinstance(caught.value, ElipsError)
    assert metrics.queries == 0


def test_the_whole_result_of_a_search_is_no_ids():
    found = SearchResult(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(DtypeError, match=r"SearchResult, expected a torch.Tensor; pass its ids"):
        RetrievalMetrics(2).update(found, IDS[:2])


@pytest.mark.parametrize(
    ("labels", "options", "error", "words"),
    [
        (IDS[:, 0], {}, ArgumentError, r"labels is True, expected n_relevant \(Q,\) beside labels"),
        (IDS, {"n_relevant": IDS[:, 0]}, ShapeError, "labels has shape"),
        (IDS[:, 0], {"n_relevant": IDS}, ShapeError, "relevant has shape"),
        (IDS[:, 0], {"n_relevant": IDS[:1, 0]}, ShapeError, "relevant has shape"),
        (IDS[:, 0], {"n_relevant": IDS[:, 0].to("meta")}, DeviceError, "relevant is on meta"),
        (IDS[:, 0], {"n_relevant": IDS[:, 0], "relevance": IDS}, ArgumentError, "labels are given"),
        (IDS[:, 0], {"n_relevant": IDS[:, 0] - 5}, ArgumentError, "relevant is below 0 in row"),
        (IDS[:, 0] * 0, {"n_relevant": IDS[:, 0] * 0}, ArgumentError, "relevant is less than the number"),
    ],
)
def test_bad_labels_are_refused(labels, options, error, words):
    with pytest.raises(error, match=words):
        RetrievalMetrics(3, labels=True).update(IDS, labels, **options)


def test_a_hundred_times_faster_than_torchmetrics():
    # 10,000 queries, by the median of many; torchmetrics takes as long per query for a part of them.
    generator = torch.Generator().manual_seed(0)
    n, part = 10_000, 200
    retrieved = torch.rand(n, 200, generator=generator).argsort(1)[:, :100]
    relevant = torch.rand(n, 200, generator=generator).argsort(1)[:, :10]
    ks = (1, 10, 100)

    def ours():
        start = time.perf_counter()
        measured(retrieved, relevant, ks)
        return time.perf_counter() - start

    hit = (retrieved[:part, :, None] == relevant[:part, None]).any(2)
    scores = torch.linspace(1, 0.1, 100).expand(part, 100)
    indexes = torch.arange(part)[:, None].expand(part, 100)
    at_k = (
        retrieval.RetrievalRecall,
        retrieval.RetrievalHitRate,
        retrieval.RetrievalPrecision,
        retrieval.RetrievalNormalizedDCG,
        retrieval.RetrievalMAP,
        retrieval.RetrievalMRR,
    )

    def theirs():
        start = time.perf_counter()
        for k in ks:
            for metric in at_k:
                metric(top_k=k)(scores, hit, indexes)
        retrieval.RetrievalRPrecision()(scores, hit, indexes)
        return time.perf_counter() - start

    theirs(), ours()
    ratio = (
        statistics.median(theirs() for _ in range(3))
        * (n / part)
        / statistics.median(ours() for _ in range(5))
    )
    print(f"RetrievalMetrics is {ratio:.0f} times faster than torchmetrics")
    assert ratio >= 100


class _RunningSums(TorchDispatchMode):
    """Notes the dtype and device of every running sum of floats."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.cumsum.default and args[0].is_floating_point():
            self.seen.append(args[0].device.type)
        return func(*args, **(kwargs or {}))


def test_no_running_sum_of_floats_on_a_gpu():
    # There torch has no deterministic one, and raises under `use_deterministic_algorithms`.
    with FakeTensorMode(), _RunningSums() as sums:
        places = torch.zeros(4, 3, dtype=torch.int64, device="cuda")
        match = matching.Match(places, places, places[:, 0])
        gains = dataclasses.replace(match, gains=places.double(), ideal=places.double())
        for score in (measures.ndcg(match, 5), measures.ndcg(gains, 5), measures.average_precision(match, 5)):
            assert (score.device.type, score.shape) == ("cuda", (4,))
    assert sums.seen == ["cpu"]
