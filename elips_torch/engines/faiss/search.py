"""Searching any index of faiss with torch tensors: no copy on a CPU, the caller's stream on a GPU."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from elips_torch.core.errors import ArgumentError, DtypeError, ImplementationError
from elips_torch.core.validation import check_k, check_vectors
from elips_torch.engines.faiss.builds import FaissBuild
from elips_torch.engines.faiss.cuvs import cuvs_state
from elips_torch.engines.faiss.forked import use_one_thread_if_forked
from elips_torch.engines.faiss.gpu_resources import (
    MOST_NEIGHBOURS,
    device_resources,
    on_current_stream,
)
from elips_torch.engines.faiss.row_kinds import BITS, kind_of
from elips_torch.engines.faiss.stats import SEARCHES, SearchCounter

_CPU = torch.device("cpu")


class IndexSearch:
    """Searches one index of faiss, and knows what does not change about it.

    Args:
        build: the faiss that made the index.
        index: any index, on the CPU or on GPUs.
    """

    def __init__(self, build: FaissBuild, index: Any) -> None:
        self.build, self.index = build, index
        self.kind = kind_of(build, index)
        number = index_gpu(index)
        self.device = _CPU if number is None else cuda_device(number)
        self.on_gpu = number is not None
        self.on_gpus = self.on_gpu or bool(gpus_inside(index))
        self._to_rows = getattr(build.module, self.kind.as_rows)
        self._to_scores = getattr(build.module, self.kind.as_scores)
        self._to_ids = build.module.cast_integer_to_idx_t_ptr

    def search(
        self,
        queries: Tensor,  # (Q, D), or (Q, D / 8) of bits
        k: int,
        params: Any = None,
        *,
        stats: SearchCounter = SEARCHES,
    ) -> tuple[Tensor, Tensor]:  # (Q, K) float32, (Q, K) int64
        """Return scores and labels as faiss gives them, on the queries' device.

        Args:
            queries: of the index's kind and size; floats of any dtype, with no gradient history.
            k: number of neighbours.
            params: faiss's ``SearchParameters`` for this call.
            stats: counts the call.

        Raises:
            ArgumentError: k above 2,048 on a GPU.
        """
        if self.on_gpu and k > MOST_NEIGHBOURS:
            raise ArgumentError(f"k is {k}, faiss serves at most {MOST_NEIGHBOURS} on a GPU")
        rows, device = queries.to(self.device, self.kind.rows).contiguous(), queries.device
        n_queries = rows.shape[0]
        scores = torch.empty((n_queries, k), dtype=self.kind.scores, device=self.device)
        ids = torch.empty((n_queries, k), dtype=torch.int64, device=self.device)
        arguments = (
            n_queries,
            self._to_rows(rows.data_ptr()),
            k,
            self._to_scores(scores.data_ptr()),
            self._to_ids(ids.data_ptr()),
            params,
        )
        cuvs = False
        if self.on_gpus:
            with placed(self.build, self.index):
                self.index.search_c(*arguments)
            cuvs = runs_with_cuvs(self.build, self.index)
        else:
            use_one_thread_if_forked(self.build)
            self.index.search_c(*arguments)
        nbytes = rows.nbytes + scores.nbytes + ids.nbytes
        stats.count(queries=n_queries, nbytes=nbytes, fallback=device != self.device, cuvs=cuvs)
        if scores.dtype != torch.float32:
            scores = scores.float()
        return (scores, ids) if device == self.device else (scores.to(device), ids.to(device))

    def range_search(
        self,
        queries: Tensor,  # (Q, D), or (Q, D / 8) of bits
        radius: float,
        params: Any = None,
        *,
        stats: SearchCounter = SEARCHES,
    ) -> tuple[Tensor, Tensor, Tensor]:  # (Q + 1,) int64, (M,) float32, (M,) int64
        """Return where the results of each query start, scores and labels, as `search` does.

        Raises:
            ImplementationError: an index on a GPU, where faiss has no range search.
        """
        if self.on_gpu:
            raise ImplementationError("faiss has no range search on a GPU; move the index to the CPU")
        use_one_thread_if_forked(self.build)
        module, device = self.build.module, queries.device
        rows = queries.to(_CPU, self.kind.rows).contiguous()
        found = module.RangeSearchResult(len(rows))
        # Distances of bits are whole numbers, of which none is beyond their number.
        if self.kind is BITS:
            radius = math.ceil(min(max(radius, 0), self.index.d + 1))
        self.index.range_search_c(len(rows), self._to_rows(rows.data_ptr()), radius, found, params)
        lims = torch.from_numpy(module.rev_swig_ptr(found.lims, len(rows) + 1).astype("int64"))
        count = int(lims[-1])
        # The memory of the result goes with it.
        scores = torch.from_numpy(module.rev_swig_ptr(found.distances, count).copy())
        ids = torch.from_numpy(module.rev_swig_ptr(found.labels, count).copy())
        nbytes = rows.nbytes + lims.nbytes + scores.nbytes + ids.nbytes
        cuvs = self.on_gpus and runs_with_cuvs(self.build, self.index)
        stats.count(queries=len(rows), nbytes=nbytes, fallback=device != self.device, cuvs=cuvs)
        return lims.to(device), scores.to(device), ids.to(device)


def search_index(
    build: FaissBuild,
    index: Any,
    queries: Tensor,  # (Q, D) or (D,)
    k: int,
    params: Any = None,
    *,
    stats: SearchCounter = SEARCHES,
) -> tuple[Tensor, Tensor]:  # (Q, K) float32, (Q, K) int64
    """Find what an index of faiss takes for the k nearest rows.

    Args:
        build: the faiss that made the index.
        index: any index of float vectors, on the CPU or on GPUs.
        queries: ``(Q, D)`` or ``(D,)`` of any float dtype and any strides. Float32 rows that lie one after
            another on the index's device are read where they are; others are copied first.
        k: number of neighbours.
        params: faiss's ``SearchParameters`` for this call.
        stats: counts the call; by default those of the process.

    Returns:
        Scores and ids on the queries' device, as faiss gives them; 1-D for a 1-D query.

    Raises:
        ElipsError: a binary index, another dim, or k above 2,048 on a GPU.
    """
    _check(build, index, queries)
    check_k(k)
    rows = torch.atleast_2d(queries.detach())
    scores, ids = IndexSearch(build, index).search(rows, k, params, stats=stats)
    return (scores[0], ids[0]) if queries.ndim == 1 else (scores, ids)


def range_search_index(
    build: FaissBuild,
    index: Any,
    queries: Tensor,  # (Q, D)
    radius: float,
    params: Any = None,
    *,
    stats: SearchCounter = SEARCHES,
) -> tuple[Tensor, Tensor, Tensor]:  # (Q + 1,) int64, (M,) float32, (M,) int64
    """Find the rows that an index of faiss sees within a radius, in faiss's order.

    Args:
        build: the faiss that made the index.
        index: any index of float vectors on the CPU.
        queries: ``(Q, D)`` or ``(D,)``, as for `search_index`.
        radius: one for all queries.
        params: faiss's ``SearchParameters`` for this call.
        stats: counts the call; by default those of the process.

    Returns:
        Where the results of each query start, scores, and ids, on the queries' device.

    Raises:
        ImplementationError: an index on a GPU, where faiss has no range search.
        ElipsError: a binary index, or another dim.
    """
    _check(build, index, queries)
    rows = torch.atleast_2d(queries.detach())
    return IndexSearch(build, index).range_search(rows, radius, params, stats=stats)


def index_gpu(index: Any) -> int | None:
    """Return the number of the GPU that an index lies on, None for one that takes rows from the CPU."""
    return int(index.getDevice()) if hasattr(index, "getDevice") else None


def runs_with_cuvs(build: FaissBuild, index: Any) -> bool:
    """Whether cuVS searches an index on a GPU; for one made elsewhere, whether faiss would let it."""
    known: bool | None = getattr(index, "uses_cuvs", None)
    return cuvs_state("auto", build).enabled if known is None else known


@contextmanager
def placed(build: FaissBuild, index: Any) -> Iterator[None]:
    """Run calls of an index where it lies: on the caller's stream on a GPU, with one thread if forked.

    An index over several GPUs, or behind a transform, takes rows from the CPU and synchronises by itself; its
    resources are held meanwhile, so that nobody changes their stream.
    """
    number = index_gpu(index)
    if number is not None:
        with on_current_stream(build, number, device_resources(build, number)):
            yield
        return
    use_one_thread_if_forked(build)
    with ExitStack() as stack:
        # Always in one order: two threads that hold one each would wait for ever.
        for gpu in sorted(gpus_inside(index)):
            stack.enter_context(device_resources(build, gpu).lock)
        yield


def gpus_inside(index: Any) -> tuple[int, ...]:
    """Return the numbers of the GPUs that `to_gpu` has put an index on."""
    numbers: tuple[int, ...] = getattr(index, "lies_on", ())
    return numbers


def cuda_device(number: int) -> torch.device:
    """Return torch's device of a number of faiss's."""
    return torch.device("cuda", number)


def _check(build: FaissBuild, index: Any, queries: Tensor) -> None:
    if isinstance(index, build.module.IndexBinary):
        raise DtypeError(f"index is {type(index).__name__}, expected an index of float vectors")
    check_vectors("queries", queries, dim=int(index.d), allow_single=True)
