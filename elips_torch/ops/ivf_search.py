"""Search of the inverted lists that each query probes; the entry that the IVF families share."""

import functools
from typing import Any

import torch
from torch import Tensor

from elips_torch.core.dispatch import Implementation, Request, choose, float64_reasons
from elips_torch.core.execution import plain_arithmetic
from elips_torch.core.metric import Metric
from elips_torch.core.tiling import DEFAULT_WORKSPACE_BYTES
from elips_torch.core.validation import bad_queries
from elips_torch.kernels.coded_rows import PartRows
from elips_torch.kernels.ivf_native import ScreenedLists, native_lists, vector_lists
from elips_torch.kernels.ivf_range_search_eager import ivf_range_search_eager
from elips_torch.kernels.ivf_search_eager import ivf_search_eager
from elips_torch.kernels.ivf_tables import table_step
from elips_torch.kernels.list_layout import ListLayout, RowDecoder, StoredRows
from elips_torch.kernels.prepared_native import PreparedSearch, prepare
from elips_torch.kernels.range_search_native import ivf_range_search_native
from elips_torch.kernels.search_native import library_reasons
from elips_torch.kernels.selection import Selection
from elips_torch.ops.coded_search import CodedRequest
from elips_torch.ops.knn import distance_reasons, triton_reasons, uncompiled_reasons

# From so many queries on, decoding each list once costs less than tables for every query (measured).
MANY_QUERIES = 32


def _triton(
    queries: Tensor,
    probes: Tensor,
    layout: ListLayout,
    decode: RowDecoder,
    k: int,
    metric: Metric,
    ranks: Tensor | None,
    selection: Selection,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:
    from elips_torch.kernels.ivf_triton import triton_lists

    return ivf_search_eager(
        queries, probes, layout, decode, k, metric, ranks, selection, workspace_bytes, triton_lists
    )


def _triton_reasons(request: Request) -> list[str]:
    reasons = triton_reasons(request)
    if request.metric.form != "product":
        reasons.append(f"kernels for lists screen by products, metric {request.metric.name!r} is none")
    return reasons


def _table_reasons(request: Request) -> list[str]:
    reasons = float64_reasons(request)
    if not isinstance(request, CodedRequest) or not request.parts:
        reasons.append("the rows have no parts to look up")
    if request.metric.name not in ("l2", "ip"):
        reasons.append(f"scores of metric {request.metric.name!r} are no sums over parts")
    return reasons


def _few_parts_reasons(request: Request) -> list[str]:
    if request.n_queries < MANY_QUERIES and not _table_reasons(request):
        return [f"for {request.n_queries} queries, looking up parts costs less than decoding the lists"]
    return []


def _many_queries_reasons(request: Request) -> list[str]:
    if request.n_queries >= MANY_QUERIES:
        return [f"{request.n_queries} queries repay decoding the lists"]
    return []


def _native_reasons(request: Request) -> list[str]:
    reasons = library_reasons(request.device)
    if request.metric.form != "product":
        return reasons + distance_reasons(request)
    if request.dtype == torch.float64:
        reasons.append("C++ code takes float32, bfloat16 and float16 vectors")
    return reasons


IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation("triton", _triton, _triton_reasons, _few_parts_reasons),
    Implementation(
        "native",
        functools.partial(ivf_search_eager, first_step=native_lists),
        _native_reasons,
        uncompiled_reasons,
    ),
    Implementation(
        "tables",
        functools.partial(ivf_search_eager, first_step=table_step),
        _table_reasons,
        _many_queries_reasons,
    ),
    Implementation("eager", ivf_search_eager, float64_reasons),
)
RANGE_IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation("native", ivf_range_search_native, _native_reasons, uncompiled_reasons),
    Implementation("eager", ivf_range_search_eager, float64_reasons),
)


def run_ivf(
    queries: Tensor,  # (Q, D)
    probes: Tensor,  # (Q, P) int64
    layout: ListLayout,
    decode: RowDecoder,
    k: int,
    metric: Metric,
    *,
    ranks: Tensor | None = None,
    selection: Selection = Selection(),
    implementation: str = "auto",
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    check_finite: bool = True,
) -> tuple[Tensor, Tensor]:  # (Q, K) float32, (Q, K) int64
    """Choose an implementation and run it.

    Scores are the metric's definition on the decoded vectors, accumulated in float64 and rounded once,
    and inside the probed lists the result is exact: by score, then by the lower id.

    Args:
        queries: ``(Q, D)``.
        probes: ``(Q, P)`` int64, the lists that each query probes, each once; -1 for none.
        layout: where the rows of the lists lie.
        decode: gives the vectors of rows.
        k: number of neighbours.
        metric: the distance kind.
        ranks: ``(N,)`` int64, place of each row's id among the sorted ids, which decides ties;
            None where the ids ascend with the rows.
        selection: rows that each query may see.
        implementation: "auto" or a name.
        workspace_bytes: limit on temporary memory, in bytes.
        check_finite: look for queries that hold NaN or infinity.

    Returns:
        Scores and row numbers, -1 where there are fewer than k in the probed lists.
    """
    request = describe(queries, layout, decode, metric, k)
    chosen = choose("ivf_search", IMPLEMENTATIONS, request, implementation)
    with plain_arithmetic(queries.device):
        bad = bad_queries(queries, metric) if check_finite else None
        scores, rows = chosen.run(
            queries, probes, layout, decode, k, metric, ranks, selection, workspace_bytes
        )
        if bad is not None:
            scores.masked_fill_(bad[:, None], torch.nan)
            rows.masked_fill_(bad[:, None], -1)
    return scores, rows


def prepare_ivf(
    queries: Tensor,  # (Q, D)
    coarse: PreparedSearch,
    layout: ListLayout,
    decode: RowDecoder,
    k: int,
    metric: Metric,
    *,
    ranks: Tensor | None = None,
    implementation: str = "auto",
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> PreparedSearch | None:
    """Prepare the search for lists and what `run_ivf` does in them, for queries like these.

    Args:
        queries: ``(Q, D)``, what those that come will be like.
        coarse: the search of such queries among the centroids.
        layout: where the rows of the lists lie.
        decode: gives the vectors of rows.
        k: number of neighbours.
        metric: the distance kind.
        ranks: as for `run_ivf`.
        implementation: "auto" or a name.
        workspace_bytes: limit on temporary memory, in bytes.

    Returns:
        The search, None where it cannot be prepared.
    """
    if k > layout.n_rows:
        return None
    request = describe(queries, layout, decode, metric, k)
    if choose("ivf_search", IMPLEMENTATIONS, request, implementation).name != "native":
        return None
    shape, dtype = queries.shape, queries.dtype

    def prepared(step: Any) -> PreparedSearch | None:
        if not isinstance(step, ScreenedLists):
            return None
        like = torch.empty(shape, dtype=dtype, device="cpu")
        return prepare(step.search, like, k, ranks, workspace_bytes, step.lists, coarse)

    step = native_lists(layout, decode, metric, k, coarse.shape[1], 0, workspace_bytes)
    found = prepared(step)
    # Differences are summed of no float64 queries.
    if found is not None and dtype != torch.float64 and isinstance(decode, StoredRows) and decode.plane:
        vectors = decode.vectors
        # Codes may have little to say about queries that are near many rows.
        found.instead = lambda shared: prepared(
            vector_lists(layout, vectors, metric, k, workspace_bytes, shared)
        )
    return found


def run_ivf_range(
    queries: Tensor,  # (Q, D)
    probes: Tensor,  # (Q, P) int64
    layout: ListLayout,
    decode: RowDecoder,
    radius: Tensor,  # (Q,) float32
    metric: Metric,
    *,
    ranks: Tensor | None = None,
    selection: Selection = Selection(),
    implementation: str = "auto",
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    check_finite: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # (Q + 1,) int64, (M,) float32, (M,) int64
    """Find all rows of the probed lists within a radius; arguments as for `run_ivf`.

    Returns lims, scores and row numbers; a query that holds NaN or infinity finds nothing on an
    accelerator and is an error on a CPU.
    """
    request = describe(queries, layout, decode, metric)
    chosen = choose("ivf_range_search", RANGE_IMPLEMENTATIONS, request, implementation)
    with plain_arithmetic(queries.device):
        bad = bad_queries(queries, metric) if check_finite else None
        if bad is not None:
            # No score is beyond the best possible one.
            radius = radius.masked_fill(bad, -metric.worst)
        result: tuple[Tensor, Tensor, Tensor] = chosen.run(
            queries, probes, layout, decode, radius, metric, ranks, selection, workspace_bytes
        )
    return result


def describe(
    queries: Tensor, layout: ListLayout, decode: RowDecoder, metric: Metric, k: int | None = None
) -> Request:
    """Return what the choice of an implementation may depend on."""
    facts = (
        queries.device,
        queries.dtype,
        decode.dtype,
        queries.shape[0],
        layout.n_rows,
        decode.dim,
        metric,
        k,
    )
    if isinstance(decode, PartRows):
        return CodedRequest(*facts, parts=decode.codebooks.shape[0])
    return Request(*facts)
