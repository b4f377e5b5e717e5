"""Looking up ids, against a dictionary."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from elips_torch import FlatIndex
from elips_torch.indexes.id_map import IdMap

batches = st.lists(st.lists(st.integers(0, 60), unique=True, max_size=8), max_size=8)


@settings(max_examples=200, deadline=None)
@given(batches)
def test_rows_and_ranks_equal_a_dictionary(parts):
    rows: dict[int, int] = {}
    ids = torch.empty(0, dtype=torch.int64)
    lookup = IdMap(ids)
    for part in parts:
        new = [label for label in part if label not in rows]
        largest = max(rows, default=-1)
        lookup.append(torch.tensor(new, dtype=torch.int64), len(rows), largest)
        for label in new:
            rows[label] = len(rows)
        ids = torch.tensor(list(rows), dtype=torch.int64)
        wanted = torch.arange(-1, 62)
        assert lookup.rows(wanted, ids).tolist() == [rows.get(label, -1) for label in wanted.tolist()]
    ranks = lookup.ranks(ids)
    expected = [sorted(rows).index(label) for label in rows]
    assert (list(range(len(rows))) if ranks is None else ranks.tolist()) == expected


class IndexAgainstDictionary(RuleBasedStateMachine):
    """An index does what a dictionary of vectors does."""

    def __init__(self):
        super().__init__()
        self.index = FlatIndex(2)
        self.model: dict[int, list[float]] = {}
        self.next_id = 0
        self.counter = 0

    def fresh(self, n):
        self.counter += n
        return torch.arange(self.counter - n, self.counter, dtype=torch.float32)[:, None].expand(n, 2)

    @rule(n=st.integers(0, 4))
    def add(self, n):
        vectors = self.fresh(n)
        for label, vector in zip(self.index.add(vectors).tolist(), vectors.tolist(), strict=True):
            assert label == self.next_id
            self.model[label] = vector
            self.next_id = label + 1

    @rule(labels=st.lists(st.integers(0, 30), unique=True, max_size=5))
    def upsert(self, labels):
        vectors = self.fresh(len(labels))
        self.index.upsert(vectors, labels)
        for label, vector in zip(labels, vectors.tolist(), strict=True):
            self.model[label] = vector
            self.next_id = max(self.next_id, label + 1)

    @rule(data=st.data())
    def remove(self, data):
        labels = data.draw(st.lists(st.sampled_from(sorted(self.model)), unique=True)) if self.model else []
        assert self.index.remove(labels) == len(labels)
        for label in labels:
            del self.model[label]

    @rule()
    def reset(self):
        self.index.reset()
        self.model.clear()

    @rule()
    def reload(self):
        other = FlatIndex(2)
        other.load_state_dict(self.index.state_dict())
        self.index = other

    @invariant()
    def same(self):
        assert self.index.ids.tolist() == list(self.model)
        assert self.index.vectors.tolist() == list(self.model.values())
        query = torch.tensor([1.5, 1.5])
        found = self.index.search(query, k=40).ids.tolist()
        nearest = sorted((2 * (vector[0] - 1.5) ** 2, label) for label, vector in self.model.items())
        assert [label for label in found if label >= 0] == [label for _, label in nearest][:40]


TestIndexAgainstDictionary = IndexAgainstDictionary.TestCase
TestIndexAgainstDictionary.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
