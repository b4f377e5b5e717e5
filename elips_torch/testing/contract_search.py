"""Contract of searches: shapes, order, masks, exclusions, gradients, settings of the caller."""

from typing import Any

import pytest
import torch

from elips_torch.core.errors import (
    ArgumentError,
    DeviceError,
    DtypeError,
    ElipsError,
    ImplementationError,
    MetricError,
    NonFiniteError,
    ParameterError,
    ShapeError,
)
from elips_torch.core.metric import resolve_metric
from elips_torch.testing.contract import Contract, assert_same, unchanged


class SearchContract(Contract):
    """Searching."""

    def test_equals_the_reference_where_exact(self) -> None:
        for metric in ("l2", "ip", "cosine"):
            index = self.filled(metric=metric)
            if not index.is_exact:
                pytest.skip("this index is approximate by design")
            queries = self.vectors(7, seed=2)
            for k in (1, 10, 60, 75):
                assert_same(index.search(queries, k), self.expected(index, queries, k))

    def test_result_types_and_shapes(self) -> None:
        index = self.filled()
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            scores, ids = index.search(self.vectors(3).to(dtype), k=4)
            assert scores.shape == ids.shape == (3, 4)
            assert scores.dtype == torch.float32
            assert ids.dtype == torch.int64
        assert index(self.vectors(3)).ids.shape == (3, index.k)
        assert index(self.vectors(1)[0], k=4).ids.shape == (4,)
        assert index.search(self.vectors(0), k=4).scores.shape == (0, 4)

    def test_best_first_and_padded(self) -> None:
        for metric in ("l2", "ip"):
            index = self.filled(10, metric=metric)
            scores, ids = index.search(self.vectors(4, seed=2), k=13)
            worst = -torch.inf if index.higher_is_better else torch.inf
            assert (ids[:, 10:] == -1).all()
            assert (scores[:, 10:] == worst).all()
            steps = scores[:, 1:10] - scores[:, :9]
            assert bool(((steps <= 0) if index.higher_is_better else (steps >= 0)).all())
            assert all(sorted(row) == sorted(index.ids.tolist()) for row in ids[:, :10].tolist())

    def test_ties_go_to_the_lower_id(self) -> None:
        index = self.make()
        index.add(self.vectors(1).expand(20, -1), ids=torch.arange(20).flip(0))
        assert index.search(self.vectors(1), k=20).ids.tolist() == [list(range(20))]
        assert index.search(self.vectors(1), k=3).ids.tolist() == [[0, 1, 2]]

    def test_an_empty_index_finds_nothing(self) -> None:
        index = self.make("ip")
        scores, ids = index.search(self.vectors(2), k=3)
        assert (ids == -1).all()
        assert (scores == -torch.inf).all()
        assert index.range_search(self.vectors(2), 1.0).lims.tolist() == [0, 0, 0]

    def test_masks_keep_true_columns(self) -> None:
        index = self.filled()
        queries = self.vectors(5, seed=2)
        shared = index.ids % 2 == 0
        each = torch.rand(5, 60, generator=torch.Generator().manual_seed(4)) < 0.3
        for mask in (shared, each, torch.zeros(60, dtype=torch.bool), torch.ones(5, 60, dtype=torch.bool)):
            found = index.search(queries, k=60, mask=mask)
            rows = mask.expand(5, 60)
            for query in range(5):
                kept = set(index.ids[rows[query]].tolist())
                assert {i for i in found.ids[query].tolist() if i >= 0} == kept
            if index.is_exact:
                wanted = self.expected(index, queries, 10, mask=mask)
                assert_same(index.search(queries, k=10, mask=mask), wanted)

    def test_exclusions_leave_ids_out(self) -> None:
        index = self.filled()
        queries = self.vectors(5, seed=2)
        exclude = index.search(queries, k=8).ids
        exclude[:, 0] = -1
        exclude[:, 1] = 10**6
        found = index.search(queries, k=60, exclude=exclude)
        for query in range(5):
            out = set(exclude[query].tolist())
            assert {i for i in found.ids[query].tolist() if i >= 0} == set(index.ids.tolist()) - out
        if index.is_exact:
            assert_same(
                index.search(queries, 10, exclude=exclude),
                self.expected(index, queries, 10, exclude=exclude),
            )

    def test_exclude_self(self) -> None:
        index = self.filled()
        stored = index.reconstruct(index.ids)
        found = index.search(stored, k=60, exclude_self=True)
        assert not (found.ids == index.ids[:, None]).any()
        assert (found.ids[:, -1] == -1).all()
        with pytest.raises(ShapeError, match="exclude_self"):
            index.search(stored[:5], exclude_self=True)

    def test_range_search_agrees_with_search(self) -> None:
        for metric in ("l2", "cosine"):
            index = self.filled(metric=metric)
            queries = self.vectors(4, seed=2)
            full = index.search(queries, k=60)
            radius = full.scores[:, 7].clone()
            lims, scores, ids = index.range_search(queries, radius)
            for query in range(4):
                better = full.scores[query] > radius[query]
                within = better if index.higher_is_better else full.scores[query] < radius[query]
                part = slice(int(lims[query]), int(lims[query + 1]))
                # An approximate index may miss some, but finds no others.
                found = torch.isin(full.ids[query], ids[part]) & within
                assert ids[part].tolist() == full.ids[query][found].tolist()
                assert torch.equal(scores[part], full.scores[query][found])
                if index.is_exact:
                    assert torch.equal(found, within)

    def test_results_do_not_depend_on_the_split_of_the_queries(self) -> None:
        index = self.filled()
        queries = self.vectors(9, seed=2)
        whole = index.search(queries, k=5)
        for size in (1, 2, 4):
            parts = [index.search(part, k=5) for part in queries.split(size)]
            assert torch.equal(torch.cat([part.ids for part in parts]), whole.ids)
            assert torch.equal(torch.cat([part.scores for part in parts]), whole.scores)

    def test_non_contiguous_queries(self) -> None:
        index = self.filled()
        queries = self.vectors(6, seed=2)
        wanted = index.search(queries, k=5)
        assert_same(index.search(queries.T.contiguous().T, k=5), wanted)
        strided = torch.stack([queries, queries], 2)[:, :, 0]
        assert_same(index.search(strided, k=5), wanted)

    def test_settings_of_the_caller_change_no_number(self) -> None:
        index = self.filled()
        queries = self.vectors(6, seed=2)
        wanted = index.search(queries, k=5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same(index.search(queries, k=5), wanted)
        with torch.inference_mode():
            assert_same(index.search(queries, k=5), wanted)
        default = torch.get_default_dtype()
        try:
            torch.set_default_dtype(torch.float64)
            assert_same(index.search(queries, k=5), wanted)
        finally:
            torch.set_default_dtype(default)

    def test_gradients_equal_those_of_the_dense_computation(self) -> None:
        for metric in ("l2", "ip", "cosine", "l1"):
            index = self.filled(metric=metric)
            queries = self.vectors(6, seed=2).requires_grad_()
            scores, ids = index.search(queries, k=5)
            weight = torch.rand(scores.shape, generator=torch.Generator().manual_seed(3))
            (scores * weight).sum().backward()
            dense = queries.detach().double().requires_grad_()
            candidates = index.reconstruct(ids.flatten()).view(6, 5, -1).double()
            kind = resolve_metric(metric)
            (kind.score(dense[:, None], candidates) * weight).sum().backward()
            assert queries.grad is not None
            assert dense.grad is not None
            torch.testing.assert_close(queries.grad, dense.grad.float(), rtol=1e-6, atol=1e-6)

    def test_scores_with_and_without_gradients_are_the_same(self) -> None:
        index = self.filled()
        queries = self.vectors(6, seed=2)
        assert_same(index.search(queries.clone().requires_grad_(), k=70), index.search(queries, k=70))

    def test_padding_passes_no_gradient(self) -> None:
        index = self.filled(4)
        queries = self.vectors(2, seed=2).requires_grad_()
        scores = index.search(queries, k=9).scores
        torch.where(scores.isfinite(), scores, 0.0).sum().backward()
        assert queries.grad is not None
        assert queries.grad.isfinite().all()

    def test_the_index_may_change_before_backward(self) -> None:
        def gradient(change: bool) -> Any:
            index = self.filled()
            queries = self.vectors(6, seed=2).requires_grad_()
            loss = index.search(queries, k=5).scores.square().sum()
            if change:
                index.add(self.vectors(30, seed=4))
                index.upsert(self.vectors(60, seed=5), index.ids[:60].clone())
                index.remove(index.ids[:50].clone())
            loss.backward()
            return queries.grad

        torch.testing.assert_close(gradient(True), gradient(False), rtol=0, atol=0)

    def test_bad_queries_are_refused(self) -> None:
        index = self.filled()
        poor = self.vectors(3)
        poor[2, 1] = float("nan")
        good = self.vectors(3)
        cases: list[tuple[Any, dict[str, Any], type[ElipsError], str]] = [
            (torch.rand(3, self.dim + 1), {}, ShapeError, f"queries has dim {self.dim + 1}"),
            (torch.rand(1, 3, self.dim), {}, ShapeError, "queries has shape"),
            (torch.ones(3, self.dim, dtype=torch.int64), {}, DtypeError, "int64"),
            (good.tolist(), {}, DtypeError, "list"),
            (good.to("meta"), {}, DeviceError, "queries is on meta, the index is on cpu"),
            (poor, {}, NonFiniteError, "row 2"),
            (good, {"k": 0}, ArgumentError, "k is 0"),
            (good, {"k": 2.0}, DtypeError, "k is 2.0"),
            (good, {"mask": torch.ones(59, dtype=torch.bool)}, ShapeError, "mask has shape"),
            (good, {"mask": torch.ones(60)}, DtypeError, "mask is torch.float32"),
            (good, {"exclude": torch.ones(2, 1, dtype=torch.int64)}, ShapeError, "exclude has shape"),
            (good, {"exclude": torch.ones(3, 1)}, DtypeError, "exclude is torch.float32"),
            (good, {"implementation": "magic"}, ImplementationError, "magic"),
            (good, {"nonsense": 3}, ParameterError, "nonsense"),
            (good, {"workspace_bytes": 10}, ArgumentError, "workspace_bytes is 10"),
        ]
        for queries, options, error, message in cases:
            with unchanged(index), pytest.raises(error, match=message):
                index.search(queries, **options)

    def test_bad_construction_is_refused(self) -> None:
        with pytest.raises(MetricError, match="'l7'"):
            self.make("l7")
        with pytest.raises(ArgumentError, match="dim is 0"):
            self.index_class(0, **self.options)
        with pytest.raises(ArgumentError, match="k is 0"):
            self.make(k=0)
