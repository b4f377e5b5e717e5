import pytest
import torch
from torchmetrics.retrieval import RetrievalHitRate, RetrievalRecall

from elips_torch.core.errors import ArgumentError, DeviceError, DtypeError, ElipsError, ShapeError
from elips_torch.evaluation import HitRateAtK, LabelRecallAtK, RecallAtK

KS = (1, 3, 7)


def random_case(seed, q=40, n=15, k=9, r=6):
    """Unique retrieved ids, some -1 at the end; relevant ids padded by -1, some rows without any."""
    generator = torch.Generator().manual_seed(seed)
    retrieved = torch.rand(q, n, generator=generator).argsort(1)[:, :k]
    retrieved[torch.arange(k) >= torch.randint(2, k + 1, (q, 1), generator=generator)] = -1
    relevant = torch.rand(q, n, generator=generator).argsort(1)[:, :r]
    relevant[torch.rand(q, r, generator=generator) < 0.5] = -1
    relevant[0] = -1
    return retrieved, relevant


def plain(retrieved, relevant, k):
    recalls, hits = [], []
    for found, wanted in zip(retrieved.tolist(), relevant.tolist(), strict=True):
        wanted = set(wanted) - {-1}
        if wanted:
            hit = len(wanted & set(found[:k]))
            recalls.append(hit / len(wanted))
            hits.append(hit > 0)
    return sum(recalls) / len(recalls), sum(hits) / len(hits)


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_definition_in_plain_python(seed):
    retrieved, relevant = random_case(seed)
    recalls, hit_rates = RecallAtK(KS), HitRateAtK(KS)
    for part in torch.arange(40).split(13):
        recalls.update(retrieved[part], relevant[part])
        hit_rates.update(retrieved[part], relevant[part])
    for k in KS:
        expected = plain(retrieved, relevant, k)
        assert recalls.compute()[f"recall@{k}"].item() == pytest.approx(expected[0], abs=1e-7)
        assert hit_rates.compute()[f"hit_rate@{k}"].item() == pytest.approx(expected[1], abs=1e-7)


@pytest.mark.parametrize("k", KS)
def test_equals_torchmetrics_where_all_that_is_relevant_is_retrieved(k):
    # torchmetrics sees only what was retrieved, so let everything be retrieved.
    generator = torch.Generator().manual_seed(0)
    retrieved = torch.rand(30, 12, generator=generator).argsort(1)
    target = torch.rand(30, 12, generator=generator) < 0.3
    relevant = retrieved.masked_fill(~target, -1)
    scores = torch.linspace(1, 0.1, 12).expand(30, 12)
    indexes = torch.arange(30)[:, None].expand(30, 12)
    for mine, theirs in ((RecallAtK(k), RetrievalRecall), (HitRateAtK(k), RetrievalHitRate)):
        mine.update(retrieved, relevant)
        oracle = theirs(empty_target_action="skip", top_k=k)(scores, target, indexes)
        assert next(iter(mine.compute().values())).item() == pytest.approx(oracle.item(), abs=1e-6)


def test_label_recall_equals_the_definition_in_plain_python():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (25,), generator=generator)
    labels[0] = -1
    retrieved = torch.randint(-1, 4, (25, 8), generator=generator)
    relevant = torch.randint(0, 9, (25,), generator=generator)
    relevant = relevant.maximum((retrieved == labels[:, None]).sum(1))
    metric = LabelRecallAtK(KS)
    metric.update(retrieved, labels, relevant)
    for k in KS:
        rows = [
            sum(found == label for found in row[:k]) / r
            for row, label, r in zip(retrieved.tolist(), labels.tolist(), relevant.tolist(), strict=True)
            if r > 0 and label >= 0
        ]
        assert metric.compute()[f"label_recall@{k}"].item() == pytest.approx(sum(rows) / len(rows), abs=1e-7)


def test_no_more_can_be_found_than_there_is():
    metric = LabelRecallAtK((1, 3))
    # What lies behind the largest k counts, too; a query without a label has nothing to count.
    retrieved, labels = torch.tensor([[7, 7, 7, 7], [7, 7, 7, 7]]), torch.tensor([7, -1])
    for relevant in (3, -5):
        with pytest.raises(ArgumentError, match="row 0"):
            metric.update(retrieved, labels, torch.tensor([relevant, -1]))
    assert metric.queries == 0
    metric.update(retrieved, labels, torch.tensor([4, -1]))
    assert metric.compute() == {"label_recall@1": 0.25, "label_recall@3": 0.75}


def test_hit_rate_of_labels_is_any_neighbour_of_the_label():
    metric = HitRateAtK((1, 3))
    metric.update(torch.tensor([[1, 2, 2], [3, 3, 3], [-1, -1, -1]]), torch.tensor([2, 3, 0]))
    assert [value.item() for value in metric.compute().values()] == pytest.approx([1 / 3, 2 / 3])


def test_nothing_found_is_never_a_hit():
    nothing = torch.full((2, 7), -1)
    for metric in (RecallAtK(KS), HitRateAtK(KS)):
        metric.update(nothing, torch.tensor([[4, -1], [-1, 0]]))
        assert all(value == 0 for value in metric.compute().values())


def test_a_repeated_id_counts_once():
    metric = RecallAtK(3)
    metric.update(torch.tensor([[5, 5, 5]]), torch.tensor([[5, 6, 6]]))
    assert metric.compute()["recall@3"] == 0.5


def test_without_a_relevant_id_there_is_no_average():
    metric = RecallAtK(1)
    metric.update(torch.tensor([[5]]), torch.tensor([[-1]]))
    assert metric.compute()["recall@1"].isnan()


def test_state_adds_up_and_does_not_grow():
    retrieved, relevant = random_case(1)
    whole, left, right = RecallAtK(KS), RecallAtK(KS), RecallAtK(KS)
    whole.update(retrieved, relevant)
    left.update(retrieved[:11], relevant[:11])
    right.update(retrieved[11:], relevant[11:])
    assert torch.equal(left.total + right.total, whole.total)
    assert left.queries + right.queries == whole.queries
    assert left.total.shape == (3,)


@pytest.mark.parametrize(
    ("retrieved", "relevant", "error"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3, 1, dtype=torch.int64), ShapeError),
        (torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64), ShapeError),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64), ShapeError),
        (torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.int64), DtypeError),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 1), DtypeError),
        (torch.zeros(2, 3, dtype=torch.int64), [[1], [2]], DtypeError),
        (
            torch.zeros(2, 3, dtype=torch.int64, device="meta"),
            torch.zeros(2, 1, dtype=torch.int64),
            DeviceError,
        ),
    ],
)
def test_bad_input_is_refused(retrieved, relevant, error):
    with pytest.raises(error) as caught:
        RecallAtK(3).update(retrieved, relevant)
    assert isinstance(caught.value, ElipsError)


@pytest.mark.parametrize(("k", "error"), [((), ArgumentError), (0, ArgumentError), ((1, 1), ArgumentError)])
def test_bad_k_is_refused(k, error):
    with pytest.raises(error):
        RecallAtK(k)


def test_k_has_to_be_an_integer():
    with pytest.raises(DtypeError):
        RecallAtK((1.0, 2.0))
