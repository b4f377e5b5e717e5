"""Searching any index of faiss with torch tensors: no copy on a CPU, the caller's stream on a GPU."""

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
from elips_torch.engines.faiss.stats import ENGINE_STATS, EngineStats

_CPU = torch.device("cpu")


def search_index(
    build: FaissBuild,
    index: Any,
    queries: Tensor,  # (Q, D) or (D,)
    k: int,
    params: Any = None,
    *,
    stats: EngineStats = ENGINE_STATS,
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
    rows = queries.detach()
    if rows.ndim == 1:
        rows = rows[None]
    number = index_gpu(index)
    device = _CPU if number is None else cuda_device(number)
    if number is not None and k > MOST_NEIGHBOURS:
        raise ArgumentError(f"k is {k}, faiss serves at most {MOST_NEIGHBOURS} on a GPU")
    rows = rows.to(device, torch.float32).contiguous()
    scores = torch.empty((len(rows), k), dtype=torch.float32, device=device)
    ids = torch.empty((len(rows), k), dtype=torch.int64, device=device)
    module = build.module
    arguments = (
        len(rows),
        module.cast_integer_to_float_ptr(rows.data_ptr()),
        k,
        module.cast_integer_to_float_ptr(scores.data_ptr()),
        module.cast_integer_to_idx_t_ptr(ids.data_ptr()),
        params,
    )
    if number is None and not gpus_inside(index):
        use_one_thread_if_forked(build)
        index.search_c(*arguments)
        cuvs = False
    else:
        with placed(build, index):
            index.search_c(*arguments)
        cuvs = runs_with_cuvs(build, index)
    stats.count(
        queries=len(rows),
        nbytes=rows.nbytes + scores.nbytes + ids.nbytes,
        fallback=queries.device != device,
        cuvs=cuvs,
    )
    if queries.device != device:
        scores, ids = scores.to(queries.device), ids.to(queries.device)
    return (scores[0], ids[0]) if queries.ndim == 1 else (scores, ids)


def range_search_index(
    build: FaissBuild,
    index: Any,
    queries: Tensor,  # (Q, D)
    radius: float,
    params: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:  # (Q + 1,) int64, (M,) float32, (M,) int64
    """Find the rows that an index of faiss sees within a radius, in faiss's order.

    Args:
        build: the faiss that made the index.
        index: any index of float vectors on the CPU.
        queries: ``(Q, D)`` or ``(D,)``, as for `search_index`.
        radius: one for all queries.
        params: faiss's ``SearchParameters`` for this call.

    Returns:
        Where the results of each query start, scores, and ids, on the queries' device.

    Raises:
        ImplementationError: an index on a GPU, where faiss has no range search.
        ElipsError: a binary index, or another dim.
    """
    _check(build, index, queries)
    if index_gpu(index) is not None:
        raise ImplementationError("faiss has no range search on a GPU; move the index to the CPU")
    use_one_thread_if_forked(build)
    rows = queries.detach().to(_CPU, torch.float32)
    rows = (rows[None] if rows.ndim == 1 else rows).contiguous()
    module = build.module
    found = module.RangeSearchResult(len(rows))
    index.range_search_c(
        len(rows), module.cast_integer_to_float_ptr(rows.data_ptr()), float(radius), found, params
    )
    lims = torch.from_numpy(module.rev_swig_ptr(found.lims, len(rows) + 1).astype("int64"))
    count = int(lims[-1])
    # The memory of the result goes with it.
    scores = torch.from_numpy(module.rev_swig_ptr(found.distances, count).copy())
    ids = torch.from_numpy(module.rev_swig_ptr(found.labels, count).copy())
    return lims.to(queries.device), scores.to(queries.device), ids.to(queries.device)


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
        raise DtypeError(f"index is a {type(index).__name__}, expected an index of float vectors")
    check_vectors("queries", queries, dim=int(index.d), allow_single=True)
