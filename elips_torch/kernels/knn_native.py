"""Exact k-nearest-neighbour search that screens rows by the codes of a plane, in C++.

It does what `knn_screened` does, in one pass: products stay in registers, and what survives is kept
while they are still there, so that no bound is ever written to memory. See `native/search.cpp`.
"""

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from elips_torch.core.hardware import device_facts
from elips_torch.core.metric import Metric
from elips_torch.core.native import native_threads
from elips_torch.core.tiling import even_cuts
from elips_torch.kernels.definition import score_pairs
from elips_torch.kernels.knn_screened import ScreenedSearch, screened_search
from elips_torch.kernels.plane import LARGEST_NORM, Plane
from elips_torch.kernels.ranking import rank_pairs
from elips_torch.kernels.screen import CodedQueries, code_queries, norm_square_slack, rounded_units
from elips_torch.kernels.screen_passes import EAGER
from elips_torch.kernels.search_facts import (
    ProbedLists,
    coded_facts,
    list_facts,
    selection_facts,
)
from elips_torch.kernels.search_native import (
    CERTIFIED,
    CODE_TYPES,
    DONE,
    METRICS,
    NO_MEMORY,
    SHORT,
    SOURCE_TYPES,
    SPARE,
    UNSURE,
    VECTOR_TYPES,
    int8_products_are_right,
    library_compiles,
    native_search,
)
from elips_torch.kernels.selection import Selection

# Queries searched at a time: more gain nothing, since their codes leave the cache.
_QUERIES = 1024
# Queries that a thread multiplies with a row at a time. Fewer blocks than so many per thread are
# shared unevenly; then the threads share the rows.
_BLOCK, _BLOCKS_PER_THREAD = 64, 4
# Reading a code takes as long as so many products; below so much work, one thread is faster.
_READING, _WORTH_THREADS = 10, 10**6
# The share of rows beyond which another search is cheaper than looking at survivors.
_MOST_SURVIVORS = 1 / 32
# Full reservoirs that are scored before a quick search answers instead (measured).
_HASTY = 4
# Bytes of a kept row, in a thread's reservoir and where it is ranked.
_KEPT_BYTES, _RANKED_BYTES = 12, 32
# Bytes per query and feature: as float64, as code and packed by each part, with temporaries of coding.
_FEATURE_BYTES = 28
# Bytes that a thread takes for the terms of rows: six numbers of each of a chunk's, which are at most 12,288.
THREAD_BYTES = 300 * 2**10
# A step of the product reads so many int8 codes of a row at once.
LEAST_INT8_DIM = 4
# Bytes of a row number that is left out, sorted beside the others.
_EXCLUDED_BYTES = 24
# Fewer rows per neighbour than this leave nothing to screen; a few rows are all kept.
_ROWS_PER_NEIGHBOUR, _FEW_ROWS = 8, 4096


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of a search.

    Attributes:
        queries: how many are searched at a time.
        threads: how many threads search.
        parts: reservoirs per query; one for each thread where threads share the rows.
        capacity: rows that a reservoir holds.
    """

    queries: int
    threads: int
    parts: int
    capacity: int


def native_first(
    database: Tensor, metric: Metric, plane: Plane | None, k: int, n_excluded: int, workspace_bytes: int
) -> "NativeSearch | None":
    """Return a search in C++ by a plane, or None where it cannot serve."""
    n_rows = database.shape[0]
    if plane is None or not leaves_rows_out(n_rows, k):
        return None
    search = NativeSearch(database, metric, plane, k, n_excluded)
    serves = search.plan(_BLOCK, workspace_bytes) is not None and native_serves(database, plane)
    return search if serves else None


def leaves_rows_out(n_rows: int, k: int) -> bool:
    """Whether a screen drops most rows, or there are so few that all may be kept."""
    return n_rows <= _FEW_ROWS or n_rows >= _ROWS_PER_NEIGHBOUR * k


def native_or_eager(
    database: Tensor, metric: Metric, plane: Plane | None, k: int, n_excluded: int, workspace_bytes: int
) -> "NativeSearch | ScreenedSearch | None":
    """Return a search in C++; one in torch where sizes or the compiler turn out to be in the way."""
    arguments = (database, metric, plane, k, n_excluded, workspace_bytes)
    return native_first(*arguments) or screened_search(EAGER, *arguments)


def native_serves(database: Tensor, plane: Plane, n_places: int | None = None) -> bool:
    """Whether there is code for a database and its plane here, which has so many places; default is N."""
    if plane.codes.dtype not in CODE_TYPES or database.dtype not in VECTOR_TYPES:
        return False
    if plane.codes.dtype == torch.bfloat16 and plane.step is None:
        # There is no product of these.
        return False
    if {len(plane.codes), len(plane.terms)} != {len(database) if n_places is None else n_places}:
        # Another thread is changing the index.
        return False
    if not database.is_contiguous() or database.is_neg():
        return False
    if not (database.shape[0] < 2**31 and library_compiles()):
        return False
    if plane.codes.dtype != torch.int8:
        return True
    fits = database.shape[1] >= LEAST_INT8_DIM and device_facts("cpu").vnni
    return fits and int8_products_are_right()


class NativeSearch:
    """Screen by a plane and rescore what survives, in C++.

    Args:
        database: ``(N, D)`` float32, float16 or bfloat16, contiguous, on a CPU.
        metric: "l2", "ip" or "cosine".
        plane: int8 or float32 codes of the database.
        k: number of neighbours.
        n_excluded: rows that are left out for each query, at most.
        names: ``(N,)`` int64, the number by which masks, ranks and results know each row; None where the
            rows are numbered from 0.

    Attributes:
        is_hasty: a query is left open early where bounds leave too many rows: what answers it then is quick.
    """

    has_overhead: ClassVar[bool] = False
    is_hasty: bool = False

    def __init__(
        self,
        database: Tensor,
        metric: Metric,
        plane: Plane,
        k: int,
        n_excluded: int,
        names: Tensor | None = None,
    ) -> None:
        self.database = database
        self.metric = metric
        self.plane = plane
        self.k = k
        self.names = names
        self.n_rows, self.dim = database.shape
        self.thread_bytes = THREAD_BYTES
        self.query_bytes = database.shape[1] * _FEATURE_BYTES + n_excluded * _EXCLUDED_BYTES
        # Of a query's feature; short floats of rows meet float32.
        self._code_bytes = 1 if plane.codes.dtype == torch.int8 else 4

    def shares_queries(self, n_queries: int, threads: int, lists: ProbedLists | None) -> bool:
        """Whether threads take queries of their own rather than rows."""
        if lists is not None:
            return lists.narrowed(0, n_queries).shares_queries(threads)
        blocks = -(-n_queries // _BLOCK)
        return blocks >= _BLOCKS_PER_THREAD * threads or blocks % threads == 0

    def plan(self, n_queries: int, workspace_bytes: int, lists: ProbedLists | None = None) -> Plan | None:
        """Return sizes that fit the workspace; None where even a few queries do not."""
        n_rows = self.n_rows
        threads = self.threads(n_queries, lists)
        # A reservoir that is filled to seven eighths drops rows; one that could hold all does not.
        usual = min(n_rows + n_rows // 7 + 8, 6 * self.k + 256)
        met = n_rows if lists is None else min(n_rows, lists.rows_per_query)
        most = max(int(met * _MOST_SURVIVORS), usual)
        step = min(n_queries, _QUERIES) if n_rows < 2**31 else 0
        while step:
            parts = 1 if self.shares_queries(step, threads, lists) else threads
            kept = parts * _KEPT_BYTES * step + threads * _RANKED_BYTES * parts
            room = workspace_bytes - self._other_bytes(step, parts, threads, lists) - SPARE * kept
            if room // kept >= usual:
                return Plan(step, threads, parts, min(most, room // kept))
            step //= 2
        return None

    def plan_for(
        self, n_queries: int, capacity: int, workspace_bytes: int, lists: ProbedLists | None = None
    ) -> Plan | None:
        """Return sizes with reservoirs that hold so many rows each; None where they do not fit."""
        threads, step = self.threads(n_queries, lists), min(n_queries, _QUERIES)
        if max(self.n_rows, capacity + SPARE) >= 2**31:
            return None
        while step:
            shared = 1 if self.shares_queries(step, threads, lists) else threads
            # One thread scans alone where there is no room for a reservoir of each.
            for n_threads, parts in ((threads, shared), (1, 1)):
                kept = parts * _KEPT_BYTES * step + n_threads * _RANKED_BYTES
                if (
                    self._other_bytes(step, parts, n_threads, lists) + kept * (capacity + SPARE)
                    <= workspace_bytes
                ):
                    return Plan(step, n_threads, parts, capacity)
            step //= 2
        return None

    def _other_bytes(self, n_queries: int, parts: int, threads: int, lists: ProbedLists | None) -> int:
        """Return what a search takes beside its reservoirs."""
        query_bytes = self.query_bytes + parts * self.dim * self._code_bytes
        if lists is not None:
            query_bytes += 12 * lists.probes.shape[1]
        list_bytes = 0 if lists is None else 8 * lists.layout.nlist
        return list_bytes + n_queries * query_bytes + threads * self.thread_bytes

    def threads(self, n_queries: int, lists: ProbedLists | None = None) -> int:
        """Return how many threads the work occupies for longer than waking them takes."""
        n_rows, dim = self.n_rows, self.dim
        if lists is None:
            cells: float = n_rows * (n_queries + _READING)
        else:
            # Several queries may share a list.
            met = n_queries * lists.rows_per_query
            cells = met + _READING * min(n_rows, met)
        return native_threads() if cells * dim > _WORTH_THREADS else 1

    def queries_at_once(self, k: int, workspace_bytes: int) -> int:
        """Return how many queries `run` takes; it splits them itself."""
        return 16 * _QUERIES

    def run(
        self,
        queries: Tensor,
        k: int,
        ranks: Tensor | None,
        selection: Selection,
        workspace_bytes: int,
        lists: ProbedLists | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores ``(Q, K)``, rows ``(Q, K)`` and bool ``(Q,)``, which queries are certified."""
        n_queries = queries.shape[0]
        plan = self.plan(n_queries, workspace_bytes, lists)
        # Of few, large calls of torch: each costs as much as some thousands of rows.
        scores = torch.empty(n_queries, k, dtype=torch.float32, device="cpu")
        rows = torch.empty(n_queries, k, dtype=torch.int64, device="cpu")
        if plan is None:
            return scores.fill_(self.metric.worst), rows.fill_(-1), _bools(n_queries, False)
        if n_queries <= plan.queries:
            certified = self._run(queries, k, ranks, selection, plan, workspace_bytes, lists, scores, rows)
            return scores, rows, certified
        certified = _bools(n_queries, False)
        for start, stop in even_cuts(n_queries, plan.queries):
            part = slice(start, stop)
            certified[part] = self._run(
                queries[part],
                k,
                ranks,
                selection.narrowed(start, stop),
                plan,
                workspace_bytes,
                None if lists is None else lists.narrowed(start, stop),
                scores[part],
                rows[part],
            )
        return scores, rows, certified

    def _run(
        self,
        queries: Tensor,
        k: int,
        ranks: Tensor | None,
        selection: Selection,
        plan: Plan,
        workspace_bytes: int,
        lists: ProbedLists | None,
        scores: Tensor,
        rows: Tensor,
    ) -> Tensor:
        """Fill scores and rows, and return which queries are certified."""
        n_queries = queries.shape[0]
        status = torch.empty(2, n_queries, dtype=torch.int32, device="cpu")
        memory = torch.empty(3, plan.parts, n_queries, plan.capacity + SPARE, dtype=torch.int32, device="cpu")
        outcome = native_search(
            **self.facts(queries, k, ranks, plan, lists),
            **selection_facts(selection, n_queries),
            memory=memory,
            scores=scores,
            found=rows,
            status=status,
        )
        return self.certified(
            outcome,
            queries,
            k,
            ranks,
            workspace_bytes,
            memory=memory,
            status=status,
            scores=scores,
            rows=rows,
        )

    def certified(
        self,
        outcome: int,
        queries: Tensor,
        k: int,
        ranks: Tensor | None,
        workspace_bytes: int,
        *,
        memory: Tensor,
        status: Tensor,
        scores: Tensor,
        rows: Tensor,
    ) -> Tensor:
        """Return which queries are certified, bool ``(Q,)``, and rank those whose last bits are open."""
        n_queries = queries.shape[0]
        if outcome in (DONE, SHORT):
            return _bools(n_queries, True)
        if outcome == NO_MEMORY:
            # Another search answers.
            return _bools(n_queries, False)
        answers, counts = status.unbind(0)
        unsure = (answers == UNSURE).nonzero()[:, 0]
        if unsure.numel():
            scores[unsure], rows[unsure] = self._ranked(
                queries, unsure, memory[0, 0], counts, k, ranks, workspace_bytes
            )
            answers[unsure] = CERTIFIED
        return answers.eq(CERTIFIED)

    def described(
        self,
        queries: Tensor,
        k: int,
        ranks: Tensor | None,
        workspace_bytes: int,
        lists: ProbedLists | None = None,
    ) -> dict[str, Any] | None:
        """Return what the code is to know for a search of all that is stored, by queries like these.

        Memory and results are missing. None where the queries are coded or split here.
        """
        n_queries = queries.shape[0]
        plan = self.plan(n_queries, workspace_bytes, lists)
        if plan is None or plan.queries < n_queries or self.plane.is_integer:
            return None
        return self.facts(queries, k, ranks, plan, lists)

    def facts(
        self, queries: Tensor, k: int, ranks: Tensor | None, plan: Plan, lists: ProbedLists | None
    ) -> dict[str, Any]:
        """Return what the code is to know of a search; memory, results and a selection are missing."""
        coded = self._coded(queries)
        return {
            **self._rows(),
            **(self._queries(queries) if coded is None else coded_facts(queries, coded)),
            **({} if lists is None else list_facts(lists)),
            **self._sizes(queries.shape[0], k, plan),
            "ranks": ranks,
        }

    def _sizes(self, n_queries: int, k: int, plan: Plan) -> dict[str, int]:
        return {
            "n_rows": self.n_rows,
            "dim": self.dim,
            "n_queries": n_queries,
            "k": k,
            "capacity": plan.capacity,
            "most_scored": _HASTY * plan.capacity if self.is_hasty else 2**62,
            "n_threads": plan.threads,
            "n_parts": plan.parts,
            "metric": METRICS[self.metric.name],
            "code_type": CODE_TYPES[self.plane.codes.dtype],
        }

    def _coded(self, queries: Tensor) -> CodedQueries | None:
        """Return queries as codes; None where the search itself is to make them."""
        # Where codes may turn out to be the vectors, torch's code looks at them all.
        return code_queries(self.metric, queries, self.plane) if self.plane.is_integer else None

    def _queries(self, queries: Tensor) -> dict[str, Any]:
        """Return what the code is to know of queries whose codes it makes."""
        return {
            "source": queries.resolve_neg().contiguous(),
            "source_type": SOURCE_TYPES[queries.dtype],
            "mean": self.plane.mean,
            "rounded": rounded_units(self.plane.kind, self.dim),
            "largest": LARGEST_NORM / self.dim,
            "slack": norm_square_slack(self.metric),
        }

    def _rows(self) -> dict[str, Any]:
        """Return what the code is to know of the rows."""
        return {
            "codes": self.plane.codes,
            "terms": self.plane.terms,
            "names": self.names,
            "vectors": self.database,
            "vector_type": VECTOR_TYPES[self.database.dtype],
        }

    def pair_scores(self, queries: Tensor, owners: Tensor, rows: Tensor, workspace_bytes: int) -> Tensor:
        """Return the scores of pairs ``(P,)`` of query and row by the definition."""
        return score_pairs(self.metric, queries, self.database, owners, rows, workspace_bytes)

    def _ranked(
        self,
        queries: Tensor,
        chosen: Tensor,
        kept: Tensor,  # (Q, C) int32
        counts: Tensor,  # (Q,) int32
        k: int,
        ranks: Tensor | None,
        workspace_bytes: int,
    ) -> tuple[Tensor, Tensor]:
        """Rank what has survived for chosen queries by the definition."""
        owners = torch.repeat_interleave(torch.arange(chosen.numel(), device="cpu"), counts[chosen])
        rows = torch.cat([kept[query, : int(counts[query])] for query in chosen]).long()
        scores = self.pair_scores(queries, chosen[owners], rows, workspace_bytes // 4)
        rows = rows if self.names is None else self.names[rows]
        return rank_pairs(self.metric, owners, rows, scores, chosen.numel(), k, ranks)


def _bools(n_queries: int, value: bool) -> Tensor:
    return torch.full((n_queries,), value, dtype=torch.bool, device="cpu")
