"""Searches in C++ that are described once and run often.

Describing a search takes as long as answering one query. Here all but the queries is described before.
"""

import ctypes
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor

from elips_torch.kernels.knn_native import NativeSearch
from elips_torch.kernels.plane import Plane
from elips_torch.kernels.search_facts import ProbedLists
from elips_torch.kernels.search_native import DONE, NO_MEMORY, SPARE, call_search, search_arguments

# Telling near ties apart is much work from the scoring of more rows per query than this part of what a
# reservoir holds (measured).
_FEW_SCORED = 4


class PreparedSearch:
    """A search of which only the queries are missing, good while its tensors stay as they are.

    Args:
        search: of all rows; it and the facts hold the tensors whose addresses are kept here.
        facts: what ``search.described`` returns.
        shape: Q and k.
        workspace_bytes: limit on temporary memory, in bytes.
        coarse: the search whose rows are the lists to read; None where all rows are.

    Attributes:
        misses: how often in a row it had much to do, or left most queries open, as its owner counts.
        instead: makes a search that may be quicker then, None where there is none; it is given what such
            searches share, by name.
    """

    def __init__(
        self,
        search: NativeSearch,
        facts: dict[str, Any],
        shape: tuple[int, int],
        workspace_bytes: int,
        coarse: "PreparedSearch | None" = None,
    ) -> None:
        self.shape = shape
        self.coarse = coarse
        self.misses = 0
        self.instead: Callable[[MutableMapping[str, Plane]], PreparedSearch | None] | None = None
        self._search = search
        # The first queries and probes would be kept for nothing: those that come take their places.
        self._facts = {name: value for name, value in facts.items() if name not in ("source", "probes")}
        self._workspace_bytes = workspace_bytes
        self._memory_shape = 3, facts["n_parts"], shape[0], facts["capacity"] + SPARE
        self._arguments = search_arguments(**self._facts)
        if coarse is not None:
            self._arguments.coarse = ctypes.addressof(coarse._arguments)

    def run(self, queries: Tensor) -> tuple[Tensor, Tensor, Tensor | None, bool]:
        """Return scores and rows ``(Q, K)``, which queries have no certain answer, and if it was hard.

        Args:
            queries: ``(Q, D)``, of the dtype that was described.

        Returns:
            Scores, rows, and numbers ``(M,)`` int64 of queries that are to be searched otherwise; None where
            all are answered, with k rows each. And whether telling near ties apart was much work.
        """
        queries = queries.resolve_neg().contiguous()
        scores = torch.empty(self.shape, dtype=torch.float32, device="cpu")
        rows = torch.empty(self.shape, dtype=torch.int64, device="cpu")
        status = torch.empty(2, self.shape[0], dtype=torch.int32, device="cpu")
        memory = torch.empty(self._memory_shape, dtype=torch.int32, device="cpu")
        # Threads do not share what they write into.
        arguments = type(self._arguments).from_buffer_copy(self._arguments)
        arguments.source = queries.data_ptr()
        arguments.scores = scores.data_ptr()
        arguments.found = rows.data_ptr()
        arguments.status = status.data_ptr()
        arguments.memory = memory.data_ptr()
        scored = ctypes.c_int64()
        arguments.scored = ctypes.addressof(scored)
        outcome = call_search(arguments)
        was_hard = _FEW_SCORED * scored.value > self.shape[0] * self._facts["capacity"]
        if outcome == DONE:
            return scores, rows, None, was_hard
        certified = self._search.certified(
            outcome,
            queries,
            self.shape[1],
            self._facts["ranks"],
            self._workspace_bytes,
            memory=memory,
            status=status,
            scores=scores,
            rows=rows,
        )
        left = ~certified if outcome == NO_MEMORY else ~certified | (rows[:, -1] < 0)
        return scores, rows, left.nonzero()[:, 0], was_hard


def prepare(
    search: NativeSearch,
    queries: Tensor,  # (Q, D)
    k: int,
    ranks: Tensor | None,  # (N,) int64
    workspace_bytes: int,
    lists_of: Callable[[Tensor], ProbedLists] | None = None,
    coarse: PreparedSearch | None = None,
) -> PreparedSearch | None:
    """Describe a search for queries like some; None where describing it is not all that Python does.

    Args:
        search: of all rows.
        queries: ``(Q, D)``, what those that come will be like.
        k: number of neighbours, at most N.
        ranks: ``(N,)`` int64, place of each row's id among the sorted ids; None where that is the row.
        workspace_bytes: limit on temporary memory, in bytes.
        lists_of: describes lists ``(Q, P)``, where only those that ``coarse`` finds are searched.
        coarse: the search among centroids, whose rows are the numbers of lists.
    """
    lists = None
    if lists_of is not None and coarse is not None:
        lists = lists_of(torch.empty(coarse.shape, dtype=torch.int64, device="cpu"))
    facts = search.described(queries, k, ranks, workspace_bytes, lists)
    if facts is None:
        return None
    return PreparedSearch(search, facts, (queries.shape[0], k), workspace_bytes, coarse)
