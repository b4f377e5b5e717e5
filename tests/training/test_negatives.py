import copy
import functools
import pickle
import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elips_torch import (
    ArgumentError,
    DeviceError,
    DtypeError,
    FlatIndex,
    IVFFlatIndex,
    PreTransformIndex,
    RandomRotation,
    ShapeError,
    SQIndex,
    UnknownIdError,
)
from elips_torch.training import HardNegativeMiner, MemoryBank, negatives

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than:UserWarning")


def data(n=60, q=9, dim=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator), torch.randn(q, dim, generator=generator)


def filled(metric="cosine", n=60, **options):
    index = FlatIndex(6, metric, **options)
    # Ids are not rows.
    index.add(data(n)[0], ids=torch.arange(n) * 2 + 5)
    return index


def expected(index, queries, positives, miner, query_labels=None, labels=None):
    """The rules one query at a time, in plain Python."""
    vectors, names = index.reconstruct(index.ids), index.ids.tolist()
    found = []
    for i, query in enumerate(queries):
        scores = index.search(query, index.ntotal)
        by_id = dict(zip(scores.ids.tolist(), scores.scores.tolist(), strict=True))
        own = [p for p in positives[i].tolist() if p >= 0]
        wrong = [
            name
            for name in scores.ids.tolist()
            if name not in own and (query_labels is None or labels[names.index(name)] != query_labels[i])
        ][: miner.range_max]
        sign = 1 if index.higher_is_better else -1
        least = min(sign * by_id[p] for p in own) if own else None
        kept = []
        for name in wrong:
            score = by_id[name]
            drop = miner.max_score is not None and score > miner.max_score
            drop |= miner.min_score is not None and score < miner.min_score
            if miner.absolute_margin is not None:
                drop |= sign * score + miner.absolute_margin > least
            if miner.relative_margin is not None and index.higher_is_better:
                drop |= score > least - miner.relative_margin * abs(least)
            elif miner.relative_margin is not None:
                drop |= score < (1 + miner.relative_margin) * -least
            if not drop:
                kept.append(name)
        kept = kept[miner.range_min :][: miner.num_negatives]
        found.append(kept + [-1] * (miner.num_negatives - len(kept)))
    assert len(vectors) == index.ntotal
    return torch.tensor(found)


@settings(max_examples=60, deadline=None)
@given(
    metric=st.sampled_from(["cosine", "l2", "ip", "l1"]),
    range_min=st.integers(0, 4),
    extra=st.integers(0, 30),
    bounds=st.tuples(st.none() | st.floats(-1, 4), st.none() | st.floats(-1, 4), st.none() | st.floats(0, 2)),
    relative=st.none() | st.floats(0, 0.8),
)
def test_the_rules(metric, range_min, extra, bounds, relative):
    index, queries = filled(metric), data()[1]
    positives = torch.randint(0, 60, (9, 3), generator=torch.Generator().manual_seed(extra)) * 2 + 5
    positives[::2, 1:] = -1
    miner = HardNegativeMiner(
        4,
        range_min=range_min,
        range_max=range_min + 4 + extra,
        max_score=bounds[0],
        min_score=bounds[1],
        absolute_margin=bounds[2],
        relative_margin=relative,
    )
    scores, ids = miner.mine(index, queries, positives)
    assert torch.equal(ids, expected(index, queries, positives, miner))
    every = index.search(queries, 60)
    for i in range(9):
        known = dict(zip(every.ids[i].tolist(), every.scores[i].tolist(), strict=True))
        worst = -torch.inf if index.higher_is_better else torch.inf
        assert scores[i].tolist() == [known.get(each, worst) for each in ids[i].tolist()]


def test_margins_are_those_of_sentence_transformers():
    """The formulas as sentence-transformers writes them, on its own example of 95%."""
    index = FlatIndex(2, "cosine")
    angles = torch.tensor([0.3, 0.2, 0.31, 0.4, 0.5])
    index.add(torch.stack([angles.cos(), angles.sin()], 1))
    query, positive = torch.tensor([[1.0, 0.0]]), torch.tensor([[0]])
    similarity = angles.cos()
    for name, keeps in (
        ("relative_margin", similarity <= similarity[0] * (1 - 0.05)),
        ("absolute_margin", ~(similarity + 0.05 > similarity[0])),
    ):
        found = HardNegativeMiner(4, **{name: 0.05}).mine(index, query, positive).ids[0]
        assert sorted(found[found >= 0].tolist()) == keeps.nonzero()[:, 0].tolist()
        assert len(found[found >= 0]) in (1, 2)


def test_exclusion_happens_in_the_search():
    """As many candidates as asked for come back however many neighbours are right answers."""
    index, queries = filled(), data()[1]
    near = index.search(queries, 40).ids
    scores, ids = HardNegativeMiner(5).mine(index, queries, positives=near)
    assert (ids >= 0).all()
    assert not (ids[:, :, None] == near[:, None]).any()
    assert torch.equal(ids, index.search(queries, 45).ids[:, 40:])
    assert (scores.diff(dim=1) <= 0).all()


def test_rows_with_the_label_of_the_query_are_no_negatives():
    index, queries = filled(), data()[1]
    labels = torch.arange(60) % 4
    query_labels = torch.tensor([0, 1, 2, 3, -1, 0, 1, 2, 9])
    miner = HardNegativeMiner(20)
    ids = miner.mine(index, queries, query_labels=query_labels, labels=labels).ids
    found = labels[(ids - 5) // 2]
    assert (found != query_labels[:, None]).all()
    nothing = torch.full((9, 1), -1)
    assert torch.equal(ids, expected(index, queries, nothing, miner, query_labels, labels))


def test_masks_join_the_labels(monkeypatch):
    monkeypatch.setattr(negatives, "_BYTES_AT_ONCE", 3000)
    index, queries = filled(), data()[1]
    allowed = torch.rand(9, 60, generator=torch.Generator().manual_seed(2)) < 0.5
    labels, query_labels = torch.arange(60) % 4, torch.arange(9) % 4
    for mask in (allowed, allowed[0]):
        found = HardNegativeMiner(10).mine(
            index,
            queries,
            query_labels=query_labels,
            labels=labels,
            mask=mask,
            exclude=index.ids[None, :3].expand(9, -1),
        )
        joined = mask & (query_labels[:, None] != labels)
        joined[:, :3] = False
        assert torch.equal(found.ids, index.search(queries, 10, mask=joined).ids)


def test_a_bank_brings_its_labels():
    bank = MemoryBank(6, capacity=50)
    labels = torch.arange(60) % 3
    bank.enqueue(data()[0], labels)
    ids = HardNegativeMiner(5).mine(bank, data()[1], query_labels=torch.arange(9) % 3).ids
    assert (labels[ids] != (torch.arange(9) % 3)[:, None]).all()
    assert (ids >= 10).all()


@pytest.mark.parametrize("sampling_strategy", ["top", "random"])
def test_parts_change_nothing(monkeypatch, sampling_strategy):
    def mine():
        miner = HardNegativeMiner(
            3, range_max=20, sampling_strategy=sampling_strategy, relative_margin=0.1, seed=4
        )
        positives = torch.arange(9)[:, None] * 2 + 5
        labels = {"query_labels": torch.arange(9) % 5, "labels": torch.arange(60) % 5}
        return miner.mine(filled(), data()[1], positives, **labels).ids

    whole = mine()
    monkeypatch.setattr(negatives, "_BYTES_AT_ONCE", 2000)
    assert torch.equal(mine(), whole)


@pytest.mark.parametrize("positives", [None, torch.full((60,), 9)])
def test_parts_of_the_stored_vectors_do_not_find_themselves(monkeypatch, positives):
    index = FlatIndex(6, "cosine")
    # Neither rows nor ascending.
    index.add(data()[0], ids=torch.randperm(60, generator=torch.Generator().manual_seed(1)) * 2 + 5)
    exclude = torch.full((60, 1), 7)
    mine = functools.partial(
        HardNegativeMiner(3).mine, index, index.vectors, positives, exclude=exclude, exclude_self=True
    )
    whole = mine()
    monkeypatch.setattr(negatives, "_BYTES_AT_ONCE", 2000)
    assert torch.equal(mine().ids, whole.ids)
    wrong = exclude if positives is None else torch.cat([exclude, positives[:, None]], 1)
    assert torch.equal(whole.ids, index.search(index.vectors, 3, exclude=wrong, exclude_self=True).ids)
    assert not (whole.ids == index.ids[:, None]).any()
    with pytest.raises(
        ShapeError, match=r"exclude_self takes the stored vectors .* got 9 queries, expected 60"
    ):
        HardNegativeMiner(3).mine(index, data()[1], exclude_self=True)


def test_a_stored_query_is_a_negative_of_its_own_unless_it_is_named():
    index = filled()
    miner, queries, labels = HardNegativeMiner(3), index.vectors, torch.arange(60) % 20
    assert torch.equal(miner.mine(index, queries).ids[:, 0], index.ids)
    for named in (
        {"positives": index.ids},
        {"query_labels": labels, "labels": labels},
        {"exclude": index.ids[:, None]},
        {"exclude_self": True},
    ):
        assert not (miner.mine(index, queries, **named).ids == index.ids[:, None]).any()


def test_draws_are_even_seeded_and_among_the_candidates():
    index, queries = filled(), data(q=1)[1].expand(4000, -1)
    miner = HardNegativeMiner(2, range_min=1, range_max=6, sampling_strategy="random", seed=3)
    ids = miner.mine(index, queries).ids
    candidates = index.search(queries[:1], 6).ids[0, 1:]
    counts = (ids[:, :, None] == candidates).sum((0, 1))
    assert counts.sum() == 8000
    # Five standard deviations about 1600.
    assert ((counts - 1600).abs() < 5 * (4000 * 0.4 * 0.6) ** 0.5).all()
    assert (ids[:, 0] != ids[:, 1]).all()
    again = HardNegativeMiner(2, range_min=1, range_max=6, sampling_strategy="random", seed=3)
    assert torch.equal(again.mine(index, queries).ids, ids)
    assert not torch.equal(again.mine(index, queries).ids, ids)


@pytest.mark.parametrize(
    "make",
    [
        lambda: IVFFlatIndex(6, nlist=4, metric="cosine", nprobe=1),
        lambda: SQIndex(6, metric="cosine"),
        lambda: PreTransformIndex(RandomRotation(6, 6), FlatIndex(6, "cosine")),
        lambda: FlatIndex(6, "cosine", dtype=torch.float16),
    ],
)
def test_any_index_will_do(make):
    index = make()
    if not index.is_trained:
        index.fit(data(200)[0])
    index.add(data()[0])
    positives = index.search(data()[1], 2).ids
    ids = HardNegativeMiner(3, absolute_margin=0.01).mine(index, data()[1], positives).ids
    assert (ids >= -1).all()
    assert (ids >= 0).any()
    assert not (ids[:, :, None] == positives[:, None]).any()


def test_running_out_is_padded_and_said_once():
    index, queries = filled(n=4), data()[1]
    miner = HardNegativeMiner(3)
    with pytest.warns(UserWarning, match=r"9 of 9 queries have fewer than 3 negatives \(rows 0, 1, 2, 3, 4"):
        scores, ids = miner.mine(index, queries, positives=torch.tensor([[5, 7]]).expand(9, -1))
    assert (ids.sort(1).values == torch.tensor([-1, 9, 11])).all()
    assert (scores[:, 2] == -torch.inf).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        miner.mine(index, queries, positives=torch.tensor([[5, 7]]).expand(9, -1))


def test_running_out_can_be_an_error_that_changes_nothing():
    index, queries = filled(n=4), data()[1]
    miner = HardNegativeMiner(3, sampling_strategy="random", on_shortage="error")
    before = miner.generator.get_state()
    with pytest.raises(ArgumentError, match="9 of 9 queries have fewer than 3 negatives"):
        miner.mine(index, queries, positives=torch.tensor([[5, 7]]).expand(9, -1))
    assert torch.equal(miner.generator.get_state(), before)
    assert (miner.mine(index, queries).ids >= 0).all()


def test_no_negative_at_all():
    index, queries = filled(n=4), data()[1]
    same = {"query_labels": torch.zeros(9).long(), "labels": torch.zeros(4).long()}
    with pytest.warns(UserWarning, match="9 of 9"):
        found = HardNegativeMiner(2).mine(index, queries, **same)
    assert (found.ids == -1).all()
    with pytest.warns(UserWarning, match="9 of 9"):
        assert (HardNegativeMiner(2).mine(FlatIndex(6, "l2"), queries).scores == torch.inf).all()


def test_no_queries():
    found = HardNegativeMiner(2).mine(filled(), torch.empty(0, 6))
    assert found.ids.shape == found.scores.shape == (0, 2)


def test_gradients_stay_out():
    queries = data()[1].requires_grad_()
    found = HardNegativeMiner(2, relative_margin=0.5).mine(filled(), queries, torch.full((9,), 5))
    assert not found.scores.requires_grad


def test_defaults_of_range_max_follow_sentence_transformers():
    assert HardNegativeMiner(3, range_min=2).range_max == 5
    assert HardNegativeMiner(3, range_min=2, relative_margin=0.05).range_max == 32
    assert HardNegativeMiner(3, max_score=0.9).range_max == 30
    assert HardNegativeMiner(3, sampling_strategy="random").range_max == 30


@pytest.mark.parametrize(
    ("settings_", "error", "message"),
    [
        ({"num_negatives": 0}, ArgumentError, "num_negatives is 0"),
        ({"range_min": -1}, ArgumentError, "range_min is -1"),
        ({"range_max": 2}, ArgumentError, "range_max is 2, expected at least range_min + num_negatives = 3"),
        ({"sampling_strategy": "best"}, ArgumentError, "sampling_strategy is 'best', expected 'top' or"),
        ({"on_shortage": "ignore"}, ArgumentError, "on_shortage is 'ignore'"),
        ({"relative_margin": -0.1}, ArgumentError, "relative_margin is -0.1, expected a number >= 0"),
        ({"max_score": "high"}, DtypeError, "max_score is 'high'"),
    ],
)
def test_bad_settings(settings_, error, message):
    with pytest.raises(error, match=re.escape(message)):
        HardNegativeMiner(**settings_)


def test_bad_input():
    index, queries = filled(), data()[1]
    plain, margin = HardNegativeMiner(2), HardNegativeMiner(2, absolute_margin=0.1)
    some = torch.full((9, 1), 5)
    without = some.clone()
    without[3] = -1
    unknown = some.clone()
    unknown[3] = 6
    labels = torch.zeros(60).long()
    cases = [
        (lambda: margin.mine(index, queries), ArgumentError, "absolute_margin is set, expected positives"),
        (lambda: margin.mine(index, queries, without), ArgumentError, "positives has no id in row 3"),
        (lambda: margin.mine(index, queries, unknown), UnknownIdError, "ids has 6"),
        (lambda: plain.mine(index, queries, some[:4]), ShapeError, "positives has shape (4, 1)"),
        (lambda: plain.mine(index, queries, some.float()), DtypeError, "positives is torch.float32"),
        (lambda: plain.mine(index, queries, some.to("meta")), DeviceError, "positives is on meta"),
        (lambda: plain.mine(index, queries, query_labels=labels[:9]), ArgumentError, "without labels"),
        (lambda: plain.mine(index, queries, labels=labels), ArgumentError, "without query_labels"),
        (
            lambda: plain.mine(index, queries, query_labels=labels[:9], labels=labels[:9]),
            ShapeError,
            "labels has shape (9,), expected (60,)",
        ),
        (lambda: plain.mine(index, queries[:, :4]), ShapeError, "queries has dim 4"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=re.escape(message)):
            call()
    # Without a margin, positives that have left the index are no matter.
    assert (plain.mine(index, queries, unknown).ids >= 0).all()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda miner: pickle.loads(pickle.dumps(miner))])
def test_a_copy_draws_what_the_miner_would_have_drawn(copied):
    """Also in a process of its own, which a trainer that spawns sends its callbacks to by pickle."""
    index, queries = filled(), data()[1]
    miner = HardNegativeMiner(3, range_max=40, sampling_strategy="random", seed=7)
    first = miner.mine(index, queries).ids
    other = copied(miner)
    assert vars(other).keys() == vars(miner).keys()
    assert repr(other) == repr(miner)
    drawn = other.mine(index, queries).ids
    assert not torch.equal(drawn, first)
    # What the copy has drawn leaves the miner where it was.
    assert torch.equal(miner.mine(index, queries).ids, drawn)


def test_what_is_no_index_is_refused():
    vectors, queries = data()[:2]
    with pytest.raises(DtypeError, match="index is a Tensor, expected an Index"):
        HardNegativeMiner(3).mine(vectors, queries)
