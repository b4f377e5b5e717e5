"""k-nearest-neighbour search of queries in a database, both plain tensors."""

import functools
from typing import Any

import torch
from torch import Tensor

from elips_torch.core.compilation import compiler_reasons
from elips_torch.core.dispatch import Implementation, Request, choose, float64_reasons
from elips_torch.core.execution import plain_arithmetic, refuse_second_derivative, runs_directly
from elips_torch.core.hardware import device_facts
from elips_torch.core.metric import Metric, metric_of, resolve_metric
from elips_torch.core.results import SearchResult
from elips_torch.core.tiling import DEFAULT_WORKSPACE_BYTES
from elips_torch.core.triton_support import gpu_reasons, launcher_reasons
from elips_torch.core.validation import (
    bad_queries,
    check_exclude,
    check_k,
    check_mask,
    check_vectors,
    check_workspace,
)
from elips_torch.engines.faiss.candidates import brute_force_reasons
from elips_torch.kernels.candidate_gradient import database_gradient
from elips_torch.kernels.distance_native import (
    has_distances,
    product_or_distance,
    product_or_distance_or_eager,
)
from elips_torch.kernels.knn_blocks import knn_blocks
from elips_torch.kernels.knn_exact import compiled_first, knn_exact
from elips_torch.kernels.made_terms import few_queries_reasons, with_terms
from elips_torch.kernels.plane import Plane
from elips_torch.kernels.prepared_native import PreparedSearch, prepare
from elips_torch.kernels.screen_choice import check_screen, choose_screen
from elips_torch.kernels.search_native import library_is_ready, library_reasons
from elips_torch.kernels.selection import Selection
from elips_torch.ops.knn_faiss import (
    Kept,
    gpu_to_go_through,
    knn_faiss,
    search_directly,
    uncertified_reasons,
)

# From so many queries on, making a plane for one call repays.
_REPAY_PLANE = 192
# Work of an eager search, in milliseconds, under which nothing is compiled.
_WORTH_COMPILING = 10.0


def _eager_milliseconds(request: Request) -> float:
    """Estimate an unscreened eager search from its sizes (rates measured on two AVX-512 cores)."""
    features = request.n_rows * request.dim
    product = max(features * 4 / 9e6, request.n_queries * features * 2 / 1.5e8)
    return 1.2 + product + request.n_queries * request.n_rows * 3e-6


def _triton(
    queries: Tensor,
    database: Tensor,
    k: int,
    metric: Metric,
    ranks: Tensor | None,
    selection: Selection,
    workspace_bytes: int,
    plane: Plane | None,
) -> tuple[Tensor, Tensor]:
    from elips_torch.kernels.knn_triton import triton_search

    return knn_exact(queries, database, k, metric, ranks, selection, workspace_bytes, plane, triton_search)


def _native(
    queries: Tensor,
    database: Tensor,
    k: int,
    metric: Metric,
    ranks: Tensor | None,
    selection: Selection,
    workspace_bytes: int,
    plane: Plane | None,
) -> tuple[Tensor, Tensor]:
    plane, rest = with_terms(len(queries), database, k, metric, plane, workspace_bytes)
    return knn_exact(
        queries, database, k, metric, ranks, selection, rest, plane, product_or_distance_or_eager
    )


def triton_reasons(request: Request) -> list[str]:
    """Return why Triton kernels cannot serve a search; empty where they can."""
    reasons = []
    if request.device.type != "cuda":
        reasons.append(f"Triton kernels run on CUDA and ROCm, the tensors are on {request.device}")
    else:
        reasons += gpu_reasons(device_facts(request.device))
    reasons += launcher_reasons()
    if torch.float64 in (request.query_dtype, request.dtype):
        reasons.append("the kernels take float32, bfloat16 and float16 vectors")
    return reasons


def _native_reasons(request: Request) -> list[str]:
    reasons = library_reasons(request.device)
    if has_distances(request.metric, request.screen == "none"):
        return reasons + distance_reasons(request)
    if request.screen == "int8" and not device_facts(request.device).vnni:
        reasons.append("C++ code multiplies int8 codes with AVX512-VNNI only")
    if request.screen == "bf16" or (request.screen == "none" and request.dtype != torch.float32):
        reasons.append("there is no screening plane in int8 or float32 to run C++ code on")
    return reasons


def distance_reasons(request: Request) -> list[str]:
    """Return why C++ code cannot compute distances of these vectors; empty where it can."""
    if torch.float64 in (request.query_dtype, request.dtype):
        return ["C++ code takes float32, bfloat16 and float16 vectors"]
    return []


def uncompiled_reasons(request: Request) -> list[str]:
    """Return why the C++ code is not worth compiling for a call; empty where it is, or is compiled."""
    return [] if library_is_ready(request.device) else small_reasons(request)


def _compiled_reasons(request: Request) -> list[str]:
    reasons = [*float64_reasons(request), *compiler_reasons(request.device.type)]
    facts = device_facts(request.device)
    if facts.type == "cuda":
        # Torch compiles for GPUs by way of Triton.
        reasons += launcher_reasons()
    if facts.type == "cpu" and facts.capability != "AVX512":
        # Torch 2.13 and 2.15 compile sums over gathered rows wrongly for AVX2.
        reasons.append(
            f"compiled steps are known to be right with AVX512 only, this CPU has {facts.capability}"
        )
    if request.screen == "none":
        reasons.append("there is no screening plane to run compiled code on")
    return reasons


def small_reasons(request: Request) -> list[str]:
    """Return why compiling does not repay for a call; empty where it does."""
    work = _eager_milliseconds(request)
    if work < _WORTH_COMPILING:
        return [f"about {work:.2g} ms of eager work do not repay compiling"]
    return []


IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation("triton", _triton, triton_reasons),
    Implementation(
        "native",
        _native,
        _native_reasons,
        lambda request: uncompiled_reasons(request) + few_queries_reasons(request),
    ),
    Implementation(
        "compiled",
        functools.partial(knn_exact, first_search=compiled_first),
        _compiled_reasons,
        small_reasons,
    ),
    Implementation("faiss", knn_faiss, brute_force_reasons, uncertified_reasons),
    Implementation("eager", knn_exact, float64_reasons),
)


def knn(
    queries: Tensor,  # (Q, D) or (D,)
    database: Tensor,  # (N, D)
    k: int,
    *,
    metric: str = "l2",
    p: float | None = None,
    mask: Tensor | None = None,  # (N,) or (Q, N)
    exclude: Tensor | None = None,  # (Q, M)
    screen: str = "auto",
    implementation: str = "auto",
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    device: torch.device | str | None = None,
) -> SearchResult:
    """Find the k nearest rows of a database for each query, exactly.

    A score is the metric's definition accumulated in float64 and rounded once to float32; rows
    are ordered by that score, then by the lower row number. The scores carry gradients to the
    queries and the database. Of the ``(Q, N)`` matrix no more than a tile exists at a time.

    Args:
        queries: ``(Q, D)`` or ``(D,)``, float32, float16, bfloat16 or float64; finite.
        database: ``(N, D)`` of any of these dtypes, on the queries' device. It is not checked for
            NaN; rows that hold one never come before others.
        k: number of neighbours, at least 1; there is no upper limit.
        metric: name of the distance kind, see `elips_torch.METRICS`.
        p: exponent of metric "lp".
        mask: bool ``(N,)`` or ``(Q, N)``; True keeps the row.
        exclude: int64 ``(Q, M)`` row numbers to leave out; -1 is ignored.
        screen: a low-precision copy of the database to look at first: "int8", "bf16", "none", or
            "auto", which makes one where there are queries enough to repay it. It is made block by block
            within the workspace; `FlatIndex` keeps its own. Results are the same with any.
        implementation: "auto", or a name that `explain` lists, which then serves or raises: "triton" on a
            GPU; "native", C++ on a CPU that screens by a plane or by the vectors themselves, and is compiled
            at the first large search; "compiled", the same steps through `torch.compile`; "faiss", the
            candidates of its brute-force search, which are selected in float32 and may miss near ties, under
            "l2", "ip", "cosine", "l1", "linf" and "lp", on a GPU under the first three, and of no float64
            vectors; "eager", which serves
            every call.
        workspace_bytes: limit on temporary memory, in bytes, at least 1 MiB. Default 256 MiB.
        device: with "faiss", a GPU that tensors on the CPU go through by parts, no more than the workspace at
            once: for a database larger than its memory. Default: tensors are searched where they are.

    Returns:
        SearchResult: scores ``(Q, K)`` float32 and ids ``(Q, K)`` int64, the row numbers, best
        first; id -1 where fewer than k rows are left. 1-D for a 1-D query.

    Raises:
        ElipsError: an argument of wrong type, shape, dtype, device or value.

    >>> import torch
    >>> database = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0]])
    >>> scores, ids = knn(torch.tensor([[0.0, 0.0]]), database, k=2)
    >>> scores.tolist(), ids.tolist()
    ([[0.0, 1.0]], [[0, 2]])
    """
    kind = resolve_metric(metric, p)
    check_vectors("database", database)
    check_vectors(
        "queries",
        queries,
        dim=database.shape[1],
        owner="the database",
        device=database.device,
        allow_single=True,
    )
    check_k(k)
    check_workspace(workspace_bytes)
    single = queries.ndim == 1
    if single:
        queries = queries[None]
    check_mask(mask, queries.shape[0], database.shape[0], database.device)
    check_exclude(exclude, queries.shape[0], database.device)
    check_screen(screen, kind, database.dtype, database.shape[1])
    gpu = None if device is None else gpu_to_go_through(device, implementation, database)
    run = _knn if runs_directly(queries, database) else knn_op
    scores, ids = run(
        queries, database, mask, exclude, k, kind.name, kind.p, screen, implementation, workspace_bytes, gpu
    )
    return SearchResult(scores[0], ids[0]) if single else SearchResult(scores, ids)


def run_knn(
    queries: Tensor,  # (Q, D)
    database: Tensor,  # (N, D)
    k: int,
    metric: Metric,
    *,
    ranks: Tensor | None = None,
    selection: Selection = Selection(),
    implementation: str = "auto",
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    check_finite: bool = True,
    plane: Plane | None = None,
    screen: str = "none",
    gpu: int | None = None,
    kept: Kept | None = None,
) -> tuple[Tensor, Tensor]:  # (Q, K) float32, (Q, K) int64
    """Choose an implementation and run it; the entry that indexes share with `knn`.

    Args:
        queries: ``(Q, D)``.
        database: ``(N, D)``.
        k: number of neighbours.
        metric: the distance kind.
        ranks: ``(N,)`` int64, place of each row's id among the sorted ids, which decides ties;
            None where the ids ascend with the rows.
        selection: rows that each query may see.
        implementation: "auto" or a name.
        workspace_bytes: limit on temporary memory, in bytes.
        check_finite: look for queries that hold NaN or infinity.
        plane: codes of the database to screen with.
        screen: without a plane, the one to make for this call: "int8", "bf16" or "none".
        gpu: number of one that "faiss" takes tensors on the CPU through.
        kept: with "faiss", gives the database as that takes it on the CPU, of an index that keeps it.

    Returns:
        Scores and row numbers, -1 where there are fewer than k.
    """
    if implementation == "faiss" and gpu is None and selection.sees_all:
        found = search_directly(queries, database, k, metric, ranks, workspace_bytes, kept)
        if found is not None:
            return found
    if plane is not None:
        screen = plane.kind
    request = Request.of(queries, database, metric, k, screen)
    chosen = choose("knn", IMPLEMENTATIONS, request, implementation)
    with plain_arithmetic(queries.device):
        bad = bad_queries(queries, metric) if check_finite else None
        arguments = (queries, database, k, metric, ranks, selection, workspace_bytes)
        if plane is None and screen != "none":
            scores, rows = knn_blocks(chosen.run, screen, *arguments)
        elif gpu is not None or kept is not None:
            scores, rows = knn_faiss(*arguments, gpu=gpu, kept=kept)
        else:
            scores, rows = chosen.run(*arguments, plane)
        if bad is not None:
            scores.masked_fill_(bad[:, None], torch.nan)
            rows.masked_fill_(bad[:, None], -1)
    return scores, rows


def prepare_knn(
    queries: Tensor,  # (Q, D)
    database: Tensor,  # (N, D)
    k: int,
    metric: Metric,
    plane: Plane | None,
    *,
    ranks: Tensor | None = None,
    implementation: str = "auto",
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> PreparedSearch | None:
    """Prepare what `run_knn` does for queries like these, without masks; None where that cannot be."""
    if (plane is None and not has_distances(metric, True)) or k > database.shape[0]:
        return None
    request = Request.of(queries, database, metric, k, "none" if plane is None else plane.kind)
    if choose("knn", IMPLEMENTATIONS, request, implementation).name != "native":
        return None
    search = product_or_distance(database, metric, plane, k, 0, workspace_bytes)
    return None if search is None else prepare(search, queries, k, ranks, workspace_bytes)


def _knn(
    queries: Tensor,
    database: Tensor,
    mask: Tensor | None,
    exclude: Tensor | None,
    k: int,
    metric: str,
    p: float,
    screen: str,
    implementation: str,
    workspace_bytes: int,
    gpu: int | None,
) -> tuple[Tensor, Tensor]:
    return run_knn(
        queries,
        database,
        k,
        metric_of(metric, p),
        selection=Selection(mask, exclude),
        implementation=implementation,
        workspace_bytes=workspace_bytes,
        # Faiss screens nothing: a plane would be made for nobody.
        screen="none"
        if implementation == "faiss"
        else screen_for_call(screen, queries, database, metric_of(metric, p)),
        gpu=gpu,
    )


def screen_for_call(screen: str, queries: Tensor, database: Tensor, metric: Metric) -> str:
    """Return the plane to make for one call: making one costs as much as some queries save."""
    if metric.form != "product":
        return "none"
    if screen == "auto" and queries.shape[0] < _REPAY_PLANE:
        return "none"
    kept = choose_screen(screen, metric, database.dtype, database.shape[1], database.device)
    # The terms of vectors as they are pay only where they are kept.
    return "none" if kept == "fp32" else kept


knn_op = torch.library.custom_op(
    "elips_torch::knn", _knn, mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)


@knn_op.register_fake
def _knn_fake(queries: Tensor, database: Tensor, mask: Any, exclude: Any, k: int, *rest: Any) -> Any:
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("elips_torch::knn_backward", mutates_args=())
def knn_backward_op(
    grad: Tensor,
    queries: Tensor,
    database: Tensor,
    ids: Tensor,
    metric: str,
    p: float,
    workspace_bytes: int,
    for_queries: bool,
    for_database: bool,
) -> tuple[Tensor, Tensor]:
    """Return d loss / d queries and d loss / d database; empty where not asked for."""
    kind = metric_of(metric, p)
    with plain_arithmetic(queries.device):
        return database_gradient(
            grad, queries, database, ids, kind, workspace_bytes, for_queries, for_database
        )


knn_backward_op.register_autograd(refuse_second_derivative)


@knn_backward_op.register_fake
def _knn_backward_fake(grad: Tensor, queries: Tensor, database: Tensor, *rest: Any) -> Any:
    for_queries, for_database = rest[-2:]
    return (
        queries.new_empty(queries.shape if for_queries else (0,)),
        database.new_empty(database.shape if for_database else (0,)),
    )


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    queries, database, _mask, _exclude, _k, ctx.metric, ctx.p, _, _, ctx.workspace_bytes, _ = inputs
    ctx.save_for_backward(queries, database, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_scores: Tensor, grad_ids: Any) -> tuple[Any, ...]:
    queries, database, ids = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:2]
    grads = knn_backward_op(
        grad_scores, queries, database, ids, ctx.metric, ctx.p, ctx.workspace_bytes, *wanted
    )
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *(None,) * 9


knn_op.register_autograd(_backward, setup_context=_setup_context)
