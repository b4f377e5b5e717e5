import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elips_torch.core.ordering import EMPTY_KEY, order_keys

scores = st.one_of(
    st.floats(width=32, allow_nan=False),
    st.sampled_from([0.0, -0.0, math.inf, -math.inf, 2.0**-149, -(2.0**-149), 3.4028234663852886e38]),
)
ranks = st.integers(0, 2**31 - 1)
rows = st.lists(st.tuples(scores, ranks), min_size=1, max_size=40)


def keys_of(rows, higher_is_better):
    values, places = zip(*rows, strict=True)
    return order_keys(torch.tensor(values, dtype=torch.float32), torch.tensor(places), higher_is_better)


@settings(deadline=None)
@given(rows, st.booleans())
def test_keys_order_as_score_then_rank(rows, higher_is_better):
    sign = -1.0 if higher_is_better else 1.0
    expected = sorted(range(len(rows)), key=lambda i: (sign * rows[i][0], rows[i][1]))
    assert keys_of(rows, higher_is_better).argsort(stable=True).tolist() == expected


@settings(deadline=None)
@given(ranks, ranks, st.booleans())
def test_the_sign_of_zero_decides_nothing(first, second, higher_is_better):
    keys = keys_of([(-0.0, first), (0.0, second)], higher_is_better)
    assert bool(keys[0] < keys[1]) == (first < second)
    assert bool(keys[0] == keys[1]) == (first == second)


@settings(deadline=None)
@given(rows, ranks, st.booleans())
def test_nan_is_behind_every_number_and_before_an_empty_place(rows, rank, higher_is_better):
    keys = keys_of([*rows, (math.nan, rank), (-math.nan, rank)], higher_is_better)
    assert bool((keys[:-2, None] < keys[-2:]).all())
    assert bool((keys < EMPTY_KEY).all())


def test_ranks_broadcast_over_queries():
    keys = order_keys(torch.zeros(2, 3), torch.tensor([2, 0, 1]), False)
    assert keys.argsort(dim=1).tolist() == [[1, 2, 0]] * 2
