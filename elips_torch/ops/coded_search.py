"""Search among vectors that are stored as codes.

A score is the metric's definition on the decoded vector, so every implementation gives the same result:
that of exact search among the decoded vectors.
"""

import dataclasses

import torch
from torch import Tensor

from elips_torch.core.dispatch import (
    Explanation,
    Implementation,
    Request,
    choose,
    explain_choice,
    float64_reasons,
)
from elips_torch.core.execution import plain_arithmetic
from elips_torch.core.hardware import float32_product_is_exact
from elips_torch.core.metric import Metric
from elips_torch.core.ordering import order_keys
from elips_torch.core.tiling import DEFAULT_WORKSPACE_BYTES, spans
from elips_torch.core.validation import bad_queries
from elips_torch.kernels.approximate import has_approximation
from elips_torch.kernels.coded_rows import Decoder, PackedRows, PartDecoder
from elips_torch.kernels.knn_approximated import ApproximatedSearch, n_candidates
from elips_torch.kernels.knn_blocks import merge_results
from elips_torch.kernels.knn_decoded import DecodedSearch
from elips_torch.kernels.knn_tables import TableSearch
from elips_torch.kernels.packed_native import PackedSearch
from elips_torch.kernels.prepared_native import PreparedSearch, prepare
from elips_torch.kernels.search_native import library_compiles, library_reasons
from elips_torch.kernels.selection import Selection
from elips_torch.ops.knn import run_knn, screen_for_call, uncompiled_reasons
from elips_torch.ops.range_search import run_range_search

# Share of the workspace for the vectors of a block and for decoding them; the rest is for searching it.
_BLOCK_SHARE = 0.5
# Bytes that decoding takes per feature: the vector and temporaries.
_FEATURE_BYTES = 12
# From so many queries on, decoding the rows and screening them costs less than tables (measured).
MANY_QUERIES = 192


@dataclasses.dataclass(frozen=True)
class CodedRequest(Request):
    """A search among codes as the choice of an implementation sees it.

    Attributes:
        code_size: bytes per code; 0 where that decides nothing.
        parts: number of parts that lookup tables have a number for; 0 where codes have no such parts.
        packed: C++ can decode the codes.
    """

    code_size: int = 0
    parts: int = 0
    packed: bool = False

    def __str__(self) -> str:
        size = f", in {self.code_size} bytes a vector" if self.code_size else ""
        return super().__str__() + size


def explain_coded_search(
    queries: Tensor,
    codes: Tensor,
    decoder: Decoder,
    metric: Metric,
    k: int,
    implementation: str,
    others: tuple[Implementation, ...] = (),
) -> Explanation:
    """Return which implementation would serve a search and why the others would not, shown as text.

    The index may have others, which come last.
    """
    request = _request(queries, codes, decoder, metric, k)
    return explain_choice("coded_search", (*IMPLEMENTATIONS, *others), request, implementation)


def _request(
    queries: Tensor, codes: Tensor, decoder: Decoder, metric: Metric, k: int | None = None
) -> CodedRequest:
    """Describe a search of ``(Q, D)`` queries among ``(N, code_size)`` codes."""
    return CodedRequest(
        device=queries.device,
        query_dtype=queries.dtype,
        dtype=torch.float32,
        n_queries=queries.shape[0],
        n_rows=codes.shape[0],
        dim=decoder.dim,
        metric=metric,
        k=k,
        code_size=codes.shape[1],
        parts=decoder.m if isinstance(decoder, PartDecoder) else 0,
        packed=decoder.packed_table() is not None,
    )


def run_coded_search(
    queries: Tensor,  # (Q, D)
    codes: Tensor,  # (N, code_size) uint8
    decoder: Decoder,
    k: int,
    metric: Metric,
    *,
    ranks: Tensor | None = None,
    selection: Selection = Selection(),
    implementation: str = "auto",
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    check_finite: bool = True,
    packed: PackedRows | None = None,
) -> tuple[Tensor, Tensor]:  # (Q, K) float32, (Q, K) int64
    """Choose an implementation and run it.

    Args:
        queries: ``(Q, D)``.
        codes: ``(N, code_size)``.
        decoder: gives their vectors.
        k: number of neighbours.
        metric: the distance kind.
        ranks: ``(N,)`` int64, place of each row's id among the sorted ids, which decides ties; None where
            the ids ascend with the rows.
        selection: rows that each query may see.
        implementation: "auto" or a name.
        workspace_bytes: limit on temporary memory, in bytes.
        check_finite: look for queries that hold NaN or infinity.
        packed: the rows as they are stored, with what is kept to screen them.

    Returns:
        Scores and row numbers, -1 where there are fewer than k.
    """
    request = _request(queries, codes, decoder, metric, k)
    chosen = choose("coded_search", IMPLEMENTATIONS, request, implementation)
    with plain_arithmetic(queries.device):
        bad = bad_queries(queries, metric) if check_finite else None
        scores, rows = chosen.run(
            queries, codes, decoder, k, metric, ranks, selection, workspace_bytes, packed
        )
        if bad is not None:
            scores.masked_fill_(bad[:, None], torch.nan)
            rows.masked_fill_(bad[:, None], -1)
    return scores, rows


def search_decoded(
    queries: Tensor,  # (Q, D)
    codes: Tensor,  # (N, code_size)
    decoder: Decoder,
    k: int,
    metric: Metric,
    ranks: Tensor | None,  # (N,) int64
    selection: Selection,
    workspace_bytes: int,
    packed: PackedRows | None = None,
) -> tuple[Tensor, Tensor]:  # (Q, K) float32, (Q, K) int64
    """Decode all rows: tile by tile for few queries, block by block for many and for what is left."""
    arguments = (queries, codes, decoder, k, metric, ranks, selection, workspace_bytes)
    if (
        queries.shape[0] >= MANY_QUERIES
        or queries.dtype == torch.float64
        or not has_approximation(metric, torch.float32)
        or not float32_product_is_exact(queries.device)
    ):
        return _search_blocks(*arguments)
    return _search_then_blocks(DecodedSearch(codes, decoder, metric, k, selection.query_bytes), *arguments)


def search_tables(
    queries: Tensor,  # (Q, D)
    codes: Tensor,  # (N, code_size)
    decoder: PartDecoder,
    k: int,
    metric: Metric,
    ranks: Tensor | None,  # (N,) int64
    selection: Selection,
    workspace_bytes: int,
    packed: PackedRows | None = None,
) -> tuple[Tensor, Tensor]:  # (Q, K) float32, (Q, K) int64
    """Select by lookup tables; decode all rows for the queries that this cannot certify."""
    search = TableSearch(codes, decoder, metric, k, selection.query_bytes)
    return _search_then_blocks(search, queries, codes, decoder, k, metric, ranks, selection, workspace_bytes)


def search_natively(
    queries: Tensor,  # (Q, D)
    codes: Tensor,  # (N, code_size)
    decoder: Decoder,
    k: int,
    metric: Metric,
    ranks: Tensor | None,  # (N,) int64
    selection: Selection,
    workspace_bytes: int,
    packed: PackedRows | None = None,
) -> tuple[Tensor, Tensor]:  # (Q, K) float32, (Q, K) int64
    """Decode rows in C++ where they are screened; all rows for the queries that this cannot certify."""
    arguments = (queries, codes, decoder, k, metric, ranks, selection, workspace_bytes)
    search = _native_search(codes, decoder, k, metric, packed, selection.n_excluded, workspace_bytes)
    return search_decoded(*arguments) if search is None else _search_then_blocks(search, *arguments)


def prepare_coded(
    queries: Tensor,  # (Q, D)
    codes: Tensor,  # (N, code_size)
    decoder: Decoder,
    k: int,
    metric: Metric,
    packed: PackedRows | None,
    *,
    ranks: Tensor | None = None,
    implementation: str = "auto",
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> PreparedSearch | None:
    """Prepare what `run_coded_search` does for queries like these, without masks; None where it cannot be."""
    if _has_too_few_rows(codes, k):
        return None
    request = _request(queries, codes, decoder, metric, k)
    if choose("coded_search", IMPLEMENTATIONS, request, implementation).name != "native":
        return None
    search = _native_search(codes, decoder, k, metric, packed, 0, workspace_bytes)
    return None if search is None else prepare(search, queries, k, ranks, workspace_bytes)


def _native_search(
    codes: Tensor,
    decoder: Decoder,
    k: int,
    metric: Metric,
    packed: PackedRows | None,
    n_excluded: int,
    workspace_bytes: int,
) -> PackedSearch | None:
    """Return a search in C++, or None where it cannot serve."""
    if packed is None:
        table = decoder.packed_table()
        packed = None if table is None else PackedRows(codes, table)
    if packed is None or not codes.shape[0] or not library_compiles():
        return None

    def decode(rows: Tensor) -> Tensor:
        return decoder.decode(codes.index_select(0, rows))

    search = PackedSearch(packed, decode, decoder.dim, metric, k, n_excluded)
    return None if search.plan(1, workspace_bytes) is None else search


def _native_reasons(request: Request) -> list[str]:
    reasons = library_reasons(request.device)
    if request.metric.form != "product":
        reasons.append(f"C++ code screens by products, metric {request.metric.name!r} is none")
    if not isinstance(request, CodedRequest) or not request.packed:
        reasons.append("C++ code decodes what scalar and product quantizers code")
    return reasons


def _search_then_blocks(
    search: ApproximatedSearch | PackedSearch,
    queries: Tensor,
    codes: Tensor,
    decoder: Decoder,
    k: int,
    metric: Metric,
    ranks: Tensor | None,
    selection: Selection,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:
    if _has_too_few_rows(codes, k):
        return _search_blocks(queries, codes, decoder, k, metric, ranks, selection, workspace_bytes)
    shape = (queries.shape[0], k)
    scores = torch.empty(shape, dtype=torch.float32, device=queries.device)
    rows = torch.empty(shape, dtype=torch.int64, device=queries.device)
    left = [torch.empty(0, dtype=torch.int64, device=queries.device)]
    for start, stop in spans(queries.shape[0], search.queries_at_once(k, workspace_bytes)):
        part = slice(start, stop)
        result = search.run(queries[part], k, ranks, selection.for_queries(part), workspace_bytes)
        scores[part], rows[part], certified = result
        left.append((~certified).nonzero()[:, 0] + start)
    pending = torch.cat(left)
    if pending.numel():
        rest = selection.for_queries(pending)
        scores[pending], rows[pending] = _search_blocks(
            queries[pending], codes, decoder, k, metric, ranks, rest, workspace_bytes
        )
    return scores, rows


def _has_too_few_rows(codes: Tensor, k: int) -> bool:
    """Whether selecting from the rows would leave most of them."""
    return n_candidates(k) > codes.shape[0] // 2


def _search_blocks(
    queries: Tensor,
    codes: Tensor,
    decoder: Decoder,
    k: int,
    metric: Metric,
    ranks: Tensor | None,
    selection: Selection,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:
    """Decode block by block, search each as plain vectors, and merge."""
    rest = workspace_bytes - int(workspace_bytes * _BLOCK_SHARE)
    found: tuple[Tensor, Tensor] | None = None
    for start, stop in _blocks(codes, decoder, workspace_bytes):
        block = decoder.decode(codes[start:stop])
        scores, rows = run_knn(
            queries,
            block,
            k,
            metric,
            ranks=None if ranks is None else ranks[start:stop].argsort().argsort(),
            selection=selection.for_rows(start, stop),
            workspace_bytes=rest,
            check_finite=False,
            screen=screen_for_call("auto", queries, block, metric),
        )
        rows = torch.where(rows < 0, rows, rows + start)
        found = (scores, rows) if found is None else merge_results(found, (scores, rows), metric, ranks)
    if found is None:
        shape = (queries.shape[0], k)
        scores = torch.full(shape, metric.worst, dtype=torch.float32, device=queries.device)
        return scores, torch.full(shape, -1, dtype=torch.int64, device=queries.device)
    return found


def _table_reasons(request: Request) -> list[str]:
    reasons = float64_reasons(request)
    if not isinstance(request, CodedRequest) or not request.parts:
        reasons.append("the codes have no parts to look up")
    if request.metric.form != "product":
        reasons.append(f"scores of metric {request.metric.name!r} are no sums over parts")
    return reasons


def _many_queries_reasons(request: Request) -> list[str]:
    if request.n_queries >= MANY_QUERIES:
        return [f"{request.n_queries} queries repay decoding the rows"]
    return []


IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation("native", search_natively, _native_reasons, uncompiled_reasons),
    Implementation("tables", search_tables, _table_reasons, _many_queries_reasons),
    Implementation("decoded", search_decoded, float64_reasons),
)


def run_coded_range_search(
    queries: Tensor,  # (Q, D)
    codes: Tensor,  # (N, code_size) uint8
    decoder: Decoder,
    radius: Tensor,  # (Q,) float32
    metric: Metric,
    *,
    ranks: Tensor | None = None,
    selection: Selection = Selection(),
    implementation: str = "auto",
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    check_finite: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # (Q + 1,) int64, (M,) float32, (M,) int64
    """Choose an implementation of range search and run it.

    The arguments are those of `run_coded_search`, the results those of `run_range_search`.
    """
    request = _request(queries, codes, decoder, metric)
    chosen = choose("coded_range_search", RANGE_IMPLEMENTATIONS, request, implementation)
    result: tuple[Tensor, Tensor, Tensor] = chosen.run(
        queries, codes, decoder, radius, metric, ranks, selection, workspace_bytes, check_finite
    )
    return result


def range_search_decoded(
    queries: Tensor,  # (Q, D)
    codes: Tensor,  # (N, code_size)
    decoder: Decoder,
    radius: Tensor,  # (Q,) float32
    metric: Metric,
    ranks: Tensor | None,  # (N,) int64
    selection: Selection,
    workspace_bytes: int,
    check_finite: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # (Q + 1,) int64, (M,) float32, (M,) int64
    """Decode block by block, search each as plain vectors, and merge."""
    rest = workspace_bytes - int(workspace_bytes * _BLOCK_SHARE)
    device = queries.device
    owners = [torch.empty(0, dtype=torch.int64, device=device)]
    scores = [torch.empty(0, dtype=torch.float32, device=device)]
    rows = [torch.empty(0, dtype=torch.int64, device=device)]
    # An empty database is one empty block: its queries are checked, too.
    for start, stop in _blocks(codes, decoder, workspace_bytes) or [(0, 0)]:
        lims, block_scores, block_rows = run_range_search(
            queries,
            decoder.decode(codes[start:stop]),
            radius,
            metric,
            ranks=None if ranks is None else ranks[start:stop].argsort().argsort(),
            selection=selection.for_rows(start, stop),
            workspace_bytes=rest,
            check_finite=check_finite,
        )
        owners.append(torch.repeat_interleave(lims.diff()))
        scores.append(block_scores)
        rows.append(block_rows + start)
    owner, score, row = torch.cat(owners), torch.cat(scores), torch.cat(rows)
    lims = torch.zeros(queries.shape[0] + 1, dtype=torch.int64, device=device)
    lims[1:] = torch.bincount(owner, minlength=queries.shape[0]).cumsum(0)
    if len(rows) > 2:
        # Two stable sorts: by key, then by query.
        place = row if ranks is None else ranks[row]
        order = order_keys(score, place, metric.higher_is_better).argsort()
        order = order[owner[order].argsort(stable=True)]
        score, row = score[order], row[order]
    return lims, score, row


RANGE_IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation("decoded", range_search_decoded, float64_reasons),
)


def _blocks(codes: Tensor, decoder: Decoder, workspace_bytes: int) -> list[tuple[int, int]]:
    """Return the first and last rows of blocks whose vectors fit the workspace."""
    rows = int(workspace_bytes * _BLOCK_SHARE) // (_FEATURE_BYTES * decoder.dim)
    return list(spans(codes.shape[0], max(1, rows)))
