"""Exact k-nearest-neighbour search that screens rows by the codes of a plane.

1. Bound every score from the product of codes; keep the bounds of small groups of rows, and of
   large groups of these.
2. The k-th largest lower bound is a threshold: rows whose upper bound lies below cannot matter.
3. Descend from large groups to small ones to rows, keeping what reaches the threshold.
4. Score these few rows by the definition and sort them.

The maximum of a group is a delegate of its rows (Gaihre et al., Dr. Top-k, 2021, arXiv:2109.08219).
Where too many rows survive, a query is left uncertified, for a finer search to answer.
"""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from elips_torch.core.hardware import float32_product_is_exact
from elips_torch.core.metric import Metric
from elips_torch.core.tiling import even_cuts, spans
from elips_torch.kernels.pair_scores import exact_pair_scores
from elips_torch.kernels.plane import BIAS, NORM, Plane
from elips_torch.kernels.ranking import rank_pairs
from elips_torch.kernels.screen import CodedQueries, code_queries, exact_scores, group_terms, threshold
from elips_torch.kernels.screen_passes import NO_ROW, Passes
from elips_torch.kernels.screen_tiles import Buffers, code_products, padded, widened_bytes
from elips_torch.kernels.selection import Selection

# Queries screened at a time: the bounds of their groups stay in cache.
_QUERIES = 256
# Products and rows at a time, for the same reason (measured on two AVX-512 cores).
_CELLS = 2**20
_ROWS = 2**13
# Rows in a small group: the fewer, the fewer are looked at in the end; from so many neighbours on that
# weighs more than the smaller groups' cost.
_FINE_ROWS, _FINER_ROWS, _FINER_FROM = 8, 4, 32
# Small groups in a large one: the most that leave enough large groups for a good threshold.
_FINE_PER_COARSE = (8, 4, 2)
_GROUPS_PER_NEIGHBOUR = 4
# The share of rows beyond which another search is cheaper than looking at survivors.
_MOST_SURVIVORS = 1 / 32
# Bytes that a survivor takes on its way down, a row screened by itself, a product with its temporaries.
_SURVIVOR_BYTES = 400
_ROW_BYTES = 10
_CELL_BYTES = {True: 4, False: 40}
# Terms of a row that does not exist.
_NO_TERMS = (0.0, 0.0, 0.0, NO_ROW)


@dataclasses.dataclass(frozen=True)
class _Survivors:
    """Pairs of query ``(P,)`` and row ``(P,)`` that reached the threshold.

    ``certified`` is bool ``(Q,)``: all rows that matter to the query are among its pairs. ``scores``
    ``(P,)`` float32 are there where the codes are the vectors, and give them without another look.
    """

    owners: Tensor
    rows: Tensor
    certified: Tensor
    scores: Tensor | None = None


def screened_search(
    passes: Passes,
    database: Tensor,
    metric: Metric,
    plane: Plane | None,
    k: int,
    n_excluded: int,
    workspace_bytes: int,
) -> "ScreenedSearch | None":
    """Return a search that screens by a plane, or None where there is none or it cannot serve."""
    if plane is None or (plane.kind == "fp32" and not float32_product_is_exact(database.device)):
        return None
    search = ScreenedSearch(database, metric, plane, passes, k + n_excluded, workspace_bytes)
    return search if search.is_possible else None


class ScreenedSearch:
    """Screen by a plane, rescore what survives.

    Args:
        database: ``(N, D)``.
        metric: "l2", "ip" or "cosine".
        plane: codes of the database.
        passes: eager or compiled.
        n_neighbours: k and the number of rows that are excluded per query.
        workspace_bytes: limit on temporary memory, in bytes.
    """

    has_overhead: ClassVar[bool] = True

    def __init__(
        self,
        database: Tensor,
        metric: Metric,
        plane: Plane,
        passes: Passes,
        n_neighbours: int,
        workspace_bytes: int,
    ) -> None:
        self.database = database
        self.metric = metric
        self.plane = plane
        self.passes = passes
        self.n_neighbours = n_neighbours
        n_rows = max(1, database.shape[0])
        wanted = _GROUPS_PER_NEIGHBOUR * n_neighbours
        self.fine_rows = _FINE_ROWS if n_neighbours < _FINER_FROM else _FINER_ROWS
        self.per_coarse = next((c for c in _FINE_PER_COARSE if n_rows // (c * self.fine_rows) >= wanted), 0)
        # Per row: the terms where a mask changes them, and a width with what it is made of.
        room = workspace_bytes - 28 * n_rows - self._tile_bytes(workspace_bytes)
        self.rows_at_once = max(0, room) // (_ROW_BYTES * n_rows)
        self.step, self.survivors = self._plan(max(0, room)) if self.per_coarse else (0, 0)

    def _plan(self, room: int) -> tuple[int, int]:
        """Return how many queries are screened at a time, and how many rows of each may survive."""
        n_rows, dim = self.database.shape
        # Per row and query: a small group's bound, three of a large group, one as a truth value.
        bounds = int(4 * n_rows / self.fine_rows * (1 + 3.5 / self.per_coarse)) + 64 * dim
        most = max(int(n_rows * _MOST_SURVIVORS), 4 * self.n_neighbours)
        usual = min(most, 8 * self.n_neighbours + 256)
        step = min(_QUERIES, room // (bounds + _SURVIVOR_BYTES * usual))
        if not step:
            return 0, 0
        return step, min(most, (room // step - bounds) // _SURVIVOR_BYTES)

    def _tile_bytes(self, workspace_bytes: int) -> int:
        return min(workspace_bytes // 4, _CELLS * _CELL_BYTES[self.passes.is_compiled])

    @property
    def is_possible(self) -> bool:
        """Whether there are enough rows, and enough memory for them."""
        return self.step > 0

    def queries_at_once(self, k: int, workspace_bytes: int) -> int:
        """Return how many queries `run` takes; it splits them itself."""
        return 16 * _QUERIES

    def run(
        self, queries: Tensor, k: int, ranks: Tensor | None, selection: Selection, workspace_bytes: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores ``(Q, K)``, rows ``(Q, K)`` and bool ``(Q,)``, which queries are certified."""
        results = []
        buffers = Buffers(queries.device)
        for start, stop in even_cuts(queries.shape[0], self.step):
            part = selection.narrowed(start, stop)
            survivors = self._screen(queries[start:stop], part, workspace_bytes, buffers)
            results.append(self._rank(queries[start:stop], survivors, k, ranks, part, workspace_bytes))
        scores, rows, certified = (torch.cat(each) for each in zip(*results, strict=True))
        return scores, rows, certified

    # Which rows survive.

    def _screen(
        self, queries: Tensor, selection: Selection, workspace_bytes: int, buffers: Buffers
    ) -> _Survivors:
        coded = code_queries(self.metric, queries, self.plane)
        terms = self.plane.terms
        if selection.mask is not None and selection.own_mask is None:
            terms = _without(terms, ~selection.mask)
        if self.passes.is_compiled and queries.shape[0] <= min(2, self.rows_at_once):
            return self._screen_rows(coded, terms, selection)
        return self._screen_groups(coded, terms, selection, workspace_bytes, buffers)

    def _screen_rows(self, coded: CodedQueries, terms: Tensor, selection: Selection) -> _Survivors:
        """Screen a query or two at the speed of reading the codes."""
        n_queries, n_rows = coded.codes.shape[0], self.plane.n_rows
        group = self.fine_rows * self.per_coarse
        n_groups = -(-n_rows // group)
        bounds = terms.new_empty(2, n_queries, n_groups * group)
        bounds[:, :, n_rows:] = NO_ROW
        for query in range(n_queries):
            hidden = selection.narrowed(query, query + 1).hidden(0, n_rows)
            self.passes.row_bounds(
                self.plane.codes,
                terms if hidden is None else _without(terms, hidden[0]),
                coded.codes[query].float(),
                coded.terms[:, query],
                coded.slack,
                bounds[0, query, :n_rows],
                bounds[1, query, :n_rows],
            )
        bounds = bounds.unflatten(2, (n_groups, group))
        coarse, lowest = bounds.amax(3)
        limit = self._limit(coded, lowest)
        reached = coarse >= limit[:, None]
        certified = coded.usable & (reached.sum(1) <= self.survivors)
        owners, groups = (reached & certified[:, None]).nonzero().unbind(1)
        upper = bounds[0, owners, groups]
        return self._survivors(coded, upper, upper >= limit[owners, None], owners, certified, groups * group)

    def _screen_groups(
        self,
        coded: CodedQueries,
        terms: Tensor,
        selection: Selection,
        workspace_bytes: int,
        buffers: Buffers,
    ) -> _Survivors:
        n_rows = self.plane.n_rows
        fine, (coarse, lowest) = self._group_bounds(coded, terms, selection, workspace_bytes, buffers)
        limit = self._limit(coded, lowest.t().contiguous())
        reached = coarse >= limit
        certified = coded.usable & (reached.sum(0) <= self.survivors)
        groups, owners = (reached & certified).nonzero().unbind(1)

        reached = fine[groups, :, owners] >= limit[owners, None]
        certified, pairs, members = self._descend(reached, owners, certified)
        owners, groups = owners[pairs], groups[pairs] * self.per_coarse + members
        first = groups * self.fine_rows
        rows = first[:, None] + torch.arange(self.fine_rows, device=first.device)
        exists = rows < n_rows
        bounds = self._pair_bounds(coded, terms, rows.clamp_max_(n_rows - 1), owners, workspace_bytes)
        reached = (bounds >= limit[owners, None]) & exists
        return self._survivors(coded, bounds, reached, owners, certified, first)

    def _limit(self, coded: CodedQueries, lowest: Tensor) -> Tensor:
        """Return the threshold ``(Q,)`` from lower bounds ``(Q, L)`` of large groups.

        At most as many of the groups as a query excludes rows owe their bound to an excluded row.
        """
        best = lowest.topk(self.n_neighbours, dim=1, sorted=False).values
        # Where too few are seen, all of these matter, but not rows that no one sees.
        return threshold(coded.rounding, best.amin(1)).clamp_min(NO_ROW / 2)

    def _descend(self, reached: Tensor, owners: Tensor, certified: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Leave out queries of which too much was reached.

        Args:
            reached: bool ``(P, M)``, which members of a group count.
            owners: ``(P,)`` query of each group.
            certified: bool ``(Q,)``.

        Returns:
            ``certified`` without these queries; group ``(S,)`` and member ``(S,)`` of what is left.
        """
        counts = torch.zeros_like(certified, dtype=torch.int64).index_add_(0, owners, reached.sum(1))
        certified = certified & (counts <= self.survivors)
        pairs, members = (reached & certified[owners, None]).nonzero().unbind(1)
        return certified, pairs, members

    def _survivors(
        self,
        coded: CodedQueries,
        upper: Tensor,  # (P, M) bounds
        reached: Tensor,  # (P, M) bool
        owners: Tensor,  # (P,)
        certified: Tensor,  # (Q,) bool
        firsts: Tensor,  # (P,) first row of each group
    ) -> _Survivors:
        certified, pairs, members = self._descend(reached, owners, certified)
        owners, rows = owners[pairs], firsts[pairs] + members
        scores = None
        if coded.is_exact:
            scores = exact_scores(self.metric, coded, upper[pairs, members], owners)
        return _Survivors(owners, rows, certified, scores)

    def _group_bounds(
        self,
        coded: CodedQueries,
        terms: Tensor,
        selection: Selection,
        workspace_bytes: int,
        buffers: Buffers,
    ) -> tuple[Tensor, Tensor]:
        """Return upper bounds ``(L, C, Q)`` of small groups, and both bounds ``(2, L, Q)`` of large ones."""
        n_queries, n_rows = coded.codes.shape[0], self.plane.n_rows
        group = self.fine_rows * self.per_coarse
        n_groups, whole = -(-n_rows // group), n_rows // group
        fine = buffers.get("fine", n_groups, self.per_coarse, n_queries)
        coarse = buffers.get("coarse", 2, n_groups, n_queries)
        tile_bytes = self._tile_bytes(workspace_bytes)
        at_once = min(
            _ROWS,
            tile_bytes // (_CELL_BYTES[self.passes.is_compiled] * n_queries),
            tile_bytes // max(1, widened_bytes(self.plane.codes)),
        )
        blocks = even_cuts(whole, max(2, at_once // group))
        if whole < n_groups:
            # The last group is short. Another comes with it: code for a single one would be another.
            blocks.append((n_groups - 2, n_groups))
        query_codes = coded.codes.t()
        widths, query_terms = group_terms(self.metric, coded, terms)
        for first, last in blocks:
            start, stop = first * group, min(last * group, n_rows)
            missing = last * group - stop
            shape = (last - first, self.per_coarse, self.fine_rows)
            codes, row_terms, width = self.plane.codes[start:stop], terms[start:stop], widths[start:stop]
            hidden = selection.hidden(start, stop)
            if missing:
                codes, row_terms = padded(codes, missing), padded(row_terms, missing, _NO_TERMS)
                width = torch.nn.functional.pad(width, (0, missing))
            products = code_products(codes, query_codes, buffers).view(*shape, n_queries)
            arguments = (
                row_terms.view(*shape, 1, 4),
                width.view(*shape, 1),
                query_terms,
                fine[first:last],
                coarse[:, first:last],
            )
            if hidden is None:
                self.passes.group_bounds(products, *arguments)
            else:
                hidden = padded(hidden.t(), missing).view(*shape, n_queries)
                self.passes.masked_group_bounds(products, hidden, *arguments)
        return fine, coarse

    def _pair_bounds(
        self, coded: CodedQueries, terms: Tensor, rows: Tensor, owners: Tensor, workspace_bytes: int
    ) -> Tensor:
        """Return upper bounds ``(P, M)`` of rows ``(P, M)`` for queries ``(P,)``."""
        query_codes = coded.codes.float()
        # Uncompiled, the codes of all pairs are gathered and widened.
        pair_bytes = 1 if self.passes.is_compiled else 16 * rows.shape[1] * query_codes.shape[1]
        step = max(1, min(workspace_bytes // 4, 2**24) // pair_bytes)
        parts = [
            self.passes.pair_bounds(
                self.plane.codes,
                terms,
                query_codes,
                coded.terms,
                coded.slack,
                owners[start:stop],
                rows[start:stop],
            )
            for start, stop in spans(rows.shape[0], step)
        ]
        return torch.cat(parts) if parts else torch.empty(rows.shape, device=rows.device)

    # How survivors are ranked.

    def _rank(
        self,
        queries: Tensor,
        survivors: _Survivors,
        k: int,
        ranks: Tensor | None,
        selection: Selection,
        workspace_bytes: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        metric, n_queries = self.metric, queries.shape[0]
        owners, rows, pair_scores = survivors.owners, survivors.rows, survivors.scores
        if selection.mask is not None or selection.exclude is not None:
            kept = ~selection.drops(owners, rows)
            owners, rows = owners[kept], rows[kept]
            pair_scores = None if pair_scores is None else pair_scores[kept]
        if pair_scores is None:
            longest = torch.linalg.vector_norm(self.plane.mean) * (1 + 2.0**-10)
            lengths = self.plane.terms[rows, NORM] + longest
            pair_scores = exact_pair_scores(
                metric, queries, self.database, owners, rows, lengths, self.passes, workspace_bytes // 4
            )
        found = rank_pairs(metric, owners, rows, pair_scores, n_queries, k, ranks)
        return *found, survivors.certified


def _without(terms: Tensor, hidden: Tensor) -> Tensor:
    """Return the terms ``(N, 4)`` with rows ``hidden (N,)`` as rows that do not exist."""
    terms = terms.clone()
    terms[:, BIAS].masked_fill_(hidden, NO_ROW)
    return terms
