"""What indexes of codes promise beside the contract of every index."""

import pytest
import torch

from elips_torch import NotEmptyError, NotFittedError
from elips_torch.testing import IndexContract
from elips_torch.testing.contract import assert_same, unchanged


class CodedContract(IndexContract):
    """Exact for the decoded vectors, which is what ``expected`` searches; in need of `fit`."""

    needs_fit = True

    def screen_bytes(self):
        # Two float32 numbers.
        return 8

    @pytest.mark.parametrize("metric", ["l2", "ip", "cosine", "l1", "linf"])
    def test_results_are_exact_for_the_decoded_vectors(self, metric):
        index = self.filled(200, metric=metric)
        queries = self.vectors(7, seed=2)
        for k in (1, 10, 230):
            assert_same(index.search(queries, k), self.expected(index, queries, k))

    def test_results_are_the_same_block_by_block(self, monkeypatch):
        index = self.filled(200)
        queries = self.vectors(7, seed=2)
        mask = torch.rand(7, 200, generator=torch.Generator().manual_seed(3)) < 0.5
        exclude = index.search(queries, 5).ids
        whole = index.search(queries, 9, mask=mask, exclude=exclude)
        within = index.range_search(queries, whole.scores[:, 5].clone(), mask=mask, exclude=exclude)
        # Blocks of a few rows.
        monkeypatch.setattr("elips_torch.ops.coded_search._BLOCK_SHARE", 1e-3)
        assert_same(index.search(queries, 9, mask=mask, exclude=exclude, workspace_bytes=2**20), whole)
        assert_same(whole, self.expected(index, queries, 9, mask=mask, exclude=exclude))
        again = index.range_search(
            queries, whole.scores[:, 5].clone(), mask=mask, exclude=exclude, workspace_bytes=2**20
        )
        assert all(torch.equal(one, other) for one, other in zip(within, again, strict=True))

    def test_adding_what_is_decoded_stores_the_same_codes(self):
        index = self.filled(50)
        again = self.make()
        again.add(index.reconstruct(index.ids), ids=index.ids)
        assert torch.equal(again.codes, index.codes)

    def test_nothing_works_before_fit(self):
        index = self.index_class(self.dim, **self.options)
        if not self.needs_fit:
            assert index.is_trained
            return
        assert not index.is_trained
        assert "not fitted" in repr(index)
        vectors = self.vectors(3)
        for call in (
            lambda: index.add(vectors),
            lambda: index.upsert(vectors, [1, 2, 3]),
            lambda: index.search(vectors),
            lambda: index.range_search(vectors, 1.0),
        ):
            with unchanged(index), pytest.raises(NotFittedError, match=r"before fit\(vectors\)"):
                call()

    def test_fitting_again_needs_an_empty_index(self):
        index = self.filled(20)
        with unchanged(index), pytest.raises(NotEmptyError, match=r"holds 20 vectors.*reset"):
            index.fit(self.vectors(300))
        index.reset()
        assert index.fit(self.vectors(300)) is index

    def test_a_fitted_state_loads_into_an_index_that_is_not(self):
        index, other = self.filled(30), self.index_class(self.dim, **self.options)
        other.load_state_dict(index.state_dict())
        self.assert_equal(index, other)

    def test_a_checkpoint_without_the_database_leaves_a_filled_index_alone(self):
        check_checkpoints_without_database(self, "quantizer")

    def test_codes_are_small(self):
        index = self.filled(60)
        assert index.codes.shape == (60, index.code_size)
        assert index.codes.dtype == torch.uint8
        before = index.memory_bytes()
        index.add(self.vectors(10))
        # A code, an id, and what screens it.
        terms = self.screen_bytes() if index.is_screened else 0
        assert index.memory_bytes() - before == 10 * (index.code_size + 8 + terms)

    def test_casts_leave_codes_and_what_was_learned_alone(self):
        index = self.filled(40)
        queries = self.vectors(5, seed=2)
        wanted = index.search(queries, 7)
        for cast in (lambda i: i.half(), lambda i: i.double(), lambda i: i.type(torch.float16)):
            assert_same(cast(index).search(queries, 7), wanted)

    def test_explain_says_what_runs(self):
        index = self.filled(40)
        explanation = index.explain(self.vectors(3), k=5)
        assert explanation.chosen is not None
        shown = str(explanation)
        assert f"coded_search of 3 x 40 x {self.dim} float32, l2, k=5 on cpu" in shown
        assert f"in {index.code_size} bytes a vector" in shown


def check_checkpoints_without_database(contract, *learned):
    """Fail unless `index_in_state_dict` leaves out, and lets alone, what was learned with the rows."""
    fitted = contract.make(index_in_state_dict=False)
    index = contract.filled(20, index_in_state_dict=False)
    stored, queries = index.reconstruct(index.ids), contract.vectors(5, seed=2)
    wanted = index.search(queries, 5)
    assert not fitted.state_dict()
    index.load_state_dict(fitted.state_dict())
    assert torch.equal(index.reconstruct(index.ids), stored)
    assert_same(index.search(queries, 5), wanted)
    index.index_in_state_dict = True
    parts = {name.split(".")[0] for name in index.state_dict()}
    assert parts >= {*index.row_tensors, "next_id", *learned}


def clustered(n, dim, seed):
    """Return ``(n, dim)`` vectors around centres that do not depend on the seed."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(40, dim, generator=torch.Generator().manual_seed(99)) * 2
    return centres[torch.randint(0, 40, (n,), generator=generator)] + torch.randn(n, dim, generator=generator)


def recall(found, truth):
    """Return the share of true neighbours ``(Q, K)`` that were found."""
    return float((found[:, :, None] == truth[:, None]).any(2).float().mean())
