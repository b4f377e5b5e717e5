"""The kernels and configurations that are compiled ahead of time, as their launchers would use them."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from elips_torch.core.metric import resolve_metric
from elips_torch.core.ordering import EMPTY_KEY
from elips_torch.kernels import distance_group_min_triton as distance
from elips_torch.kernels import group_max_kernels as scan
from elips_torch.kernels import ivf_scan_kernels as lists
from elips_torch.kernels import merge_triton as merge
from elips_torch.kernels import rescore_triton as rescore
from elips_torch.kernels import select_triton as select
from elips_torch.kernels.compile_facts import Case
from elips_torch.kernels.group_max_configurations import (
    MEDIUM_QUERIES,
    Blocks,
    large_blocks,
    list_blocks,
    medium_blocks,
    small_blocks,
    streams,
)
from elips_torch.kernels.group_max_triton import SUPERTILE_QUERIES
from elips_torch.kernels.ivf_scan_triton import LIST_RANGE, QUERY_RANGE
from elips_torch.kernels.ivf_triton import GROUP as _LIST_GROUP

_POINTERS = {torch.int8: "*i8", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
_NAMES = {torch.int8: "int8", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_TENSOR = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "v_mfma"}
_GROUP = 32
_BUDGETS = {"per row": 10.0, "per group, plain biases": 6.0, "per group, without biases": 3.5}
# Lists begin and end anywhere: what belongs to their rows is read one by one, and a mask through slots.
_LIST_BUDGETS = {"sm_80": 12.0, "sm_90": 12.0, "sm_100": 17.0, "gfx942": 11.0}
_LIST_MASKS = {"": 0.0, "rows": 9.0, "pairs": 20.0}
_SIZES = ("n_queries", "n_rows", "dim", "n_groups", "n_blocks")
_TERMS = (
    *("scales_ptr", "biases_ptr", "residuals_ptr", "norms_ptr"),
    *("q_bias_ptr", "q_residual_ptr", "q_norm_ptr"),
)


def _budget(target: str, terms: str, mask: str) -> float:
    """Return how many instructions per score may follow the product."""
    budget = _BUDGETS[terms] + (4.0 if mask else 0.0)
    # The products of sm_80 leave a group's scores in more threads.
    return budget + (5.0 if target == "sm_80" else 0.0)


def _scan_types(dtype: torch.dtype, terms: str, mask: bool) -> dict[str, str | None]:
    """Return the types that all three kernels of the scan share, and those that some have."""
    types: dict[str, str | None] = dict.fromkeys(_TERMS, "*fp32")
    if terms == "per group, without biases":
        types |= {"biases_ptr": None, "q_bias_ptr": None}
    elif terms == "per group, plain biases":
        types["q_bias_ptr"] = None
    types |= {"queries_ptr": _POINTERS[dtype], "codes_ptr": _POINTERS[dtype], "maxima_ptr": "*fp32"}
    types["mask_ptr"] = "*u8" if mask else None
    sizes = ("n_queries", "n_rows", "dim", "n_groups", "n_blocks")
    return types | dict.fromkeys(
        (*sizes, "query_stride", "code_stride", "mask_stride", "maxima_stride"), "i32"
    )


def _scan_case(
    size: str,
    target: str,
    dtype: torch.dtype,
    n_queries: int,
    dim: int,
    *,
    terms: str = "per row",
    mask: str = "",
    ones: bool = False,
) -> Case:
    blocks: Blocks
    constants: dict[str, Any] = {
        "GROUP": _GROUP,
        "PAIR_MASK": mask == "pairs",
        "PER_GROUP": terms != "per row",
    }
    if size == "small":
        kernel, blocks = scan.group_max_small_kernel, small_blocks(dtype, n_queries, dim, _GROUP)
        constants["TWO"] = n_queries == 2
    elif size == "medium":
        kernel, blocks = scan.group_max_medium_kernel, medium_blocks(target, dtype, n_queries, dim, _GROUP)
        constants["BLOCK_QUERIES"] = blocks.queries
        if streams(target, blocks, n_queries, dim):
            kernel, constants["STAGES"] = scan.group_max_stream_kernel, blocks.stages
    else:
        kernel, blocks = scan.group_max_large_kernel, large_blocks(target, dtype, dim, _GROUP)
        constants |= {
            "BLOCK_QUERIES": blocks.queries,
            "SUPERTILE": SUPERTILE_QUERIES,
            "EVEN_ROWS": True,
            "WIDE": blocks.wide,
        }
    constants |= {
        "BLOCK_ROWS": blocks.rows,
        "BLOCK_FEATURES": blocks.features,
        "EVEN": dim % blocks.features == 0,
    }
    types = _scan_types(dtype, terms, mask != "")
    if ones:
        constants |= dict.fromkeys((*_SIZES, "query_stride", "code_stride"), 1)
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    uses_tensor_cores = size != "small" and (dtype != torch.float32 or target == "gfx942")
    words = [kernel.__name__.removesuffix("_kernel"), _NAMES[dtype], f"Q {n_queries}", f"D {dim}"]
    words += (
        ([] if terms == "per row" else [f"terms {terms}"])
        + ([f"mask of {mask}"] if mask else [])
        + (["sizes of 1"] if ones else [])
    )
    return Case(
        name=", ".join(words),
        kernel=kernel,
        types={name: types[name] for name in kernel.arg_names if name in types},
        constants=constants,
        warps=blocks.warps,
        stages=blocks.stages,
        unaligned=("n_queries", "n_rows", "n_groups", "n_blocks") + (("dim",) if dim % 16 else ()),
        # Float32 products are no tensor instructions on most of these.
        scores=blocks.queries * blocks.program_rows if size == "large" and dtype != torch.float32 else 0,
        budget=_budget(target, terms, mask),
        wide_loads=not ones,
        tensor=_TENSOR[target] if uses_tensor_cores else "",
    )


def _scan_cases(target: str) -> Iterator[Case]:
    yield _scan_case("small", target, torch.int8, 1, 128)
    yield _scan_case("small", target, torch.bfloat16, 2, 768)
    yield _scan_case("medium", target, torch.int8, 16, 128)
    yield _scan_case("medium", target, torch.bfloat16, 32, 64)
    yield _scan_case("medium", target, torch.float32, 64, 96)
    yield _scan_case("medium", target, torch.bfloat16, MEDIUM_QUERIES[target], 768)
    yield _scan_case("large", target, torch.int8, 4096, 128)
    yield _scan_case("large", target, torch.int8, 4096, 128, terms="per group, without biases")
    yield _scan_case("large", target, torch.int8, 4096, 768, terms="per group, plain biases")
    yield _scan_case("large", target, torch.bfloat16, 4096, 128)
    yield _scan_case("large", target, torch.bfloat16, 4096, 128, terms="per group, plain biases")
    yield _scan_case("large", target, torch.bfloat16, 4096, 768)
    yield _scan_case("large", target, torch.bfloat16, 4096, 768, mask="rows")
    yield _scan_case("large", target, torch.float16, 4096, 112)
    yield _scan_case("large", target, torch.float32, 4096, 128)
    if target == "sm_90":
        # Triton compiles arguments that are 1 as constants.
        for size, n_queries in (("small", 1), ("medium", 16), ("medium", 100), ("large", 4096)):
            yield _scan_case(size, target, torch.int8, n_queries, 1, mask="pairs", ones=True)


def _list_case(
    order: str, target: str, dtype: torch.dtype, dim: int, *, terms: bool = True, mask: str = ""
) -> Case:
    by_list = order == "by list"
    kernel = lists.ivf_scan_lists_kernel if by_list else lists.ivf_scan_queries_kernel
    group = _LIST_GROUP
    blocks = list_blocks(target, dtype, dim, group) if by_list else small_blocks(dtype, 1, dim, group)
    # What a search of lists passes.
    types = _scan_types(dtype, "per row", mask != "") | {"norms_ptr": None, "q_norm_ptr": None}
    if not terms:
        # Vectors as they are, under the inner product.
        types |= dict.fromkeys(_TERMS)
    numbers = ("pair_queries_ptr", "pair_lists_ptr", "pair_columns_ptr", "item_pairs_ptr", "item_rows_ptr")
    types |= dict.fromkeys((*numbers, "starts_ptr", "sizes_ptr"), "*i64")
    types |= {"n_pairs": "i32", "slots_ptr": "*i64" if mask else None}
    constants = {
        "BLOCK_QUERIES": blocks.queries,
        "BLOCK_ROWS": blocks.rows,
        "BLOCK_FEATURES": blocks.features,
        "RANGE": LIST_RANGE if by_list else QUERY_RANGE,
        "GROUP": group,
        "EVEN": dim % blocks.features == 0,
        "PAIR_MASK": mask == "pairs",
    }
    words = [kernel.__name__.removesuffix("_kernel"), _NAMES[dtype], f"D {dim}"]
    words += ([] if terms else ["products only"]) + ([f"mask of {mask}"] if mask else [])
    tensor = by_list and (dtype != torch.float32 or target == "gfx942")
    return Case(
        name=", ".join(words),
        kernel=kernel,
        types={name: types[name] for name in kernel.arg_names if name in types},
        constants={name: value for name, value in constants.items() if name in kernel.arg_names},
        warps=blocks.warps,
        stages=blocks.stages,
        unaligned=("n_pairs",) + (("dim",) if dim % 16 else ()),
        scores=blocks.queries * blocks.rows if by_list and dtype != torch.float32 else 0,
        budget=_LIST_BUDGETS[target] + _LIST_MASKS[mask],
        tensor=_TENSOR[target] if tensor else "",
    )


def _list_cases(target: str) -> Iterator[Case]:
    yield _list_case("by list", target, torch.int8, 128)
    yield _list_case("by list", target, torch.int8, 768, mask="pairs")
    yield _list_case("by list", target, torch.bfloat16, 384)
    yield _list_case("by list", target, torch.bfloat16, 768, mask="rows")
    yield _list_case("by list", target, torch.bfloat16, 64, terms=False)
    yield _list_case("by list", target, torch.float16, 112)
    yield _list_case("by list", target, torch.float32, 128)
    yield _list_case("by query", target, torch.int8, 128)
    yield _list_case("by query", target, torch.bfloat16, 768)
    yield _list_case("by query", target, torch.float16, 96, mask="rows")
    yield _list_case("by query", target, torch.float32, 384, terms=False)


def _rescore_cases() -> Iterator[Case]:
    types: dict[str, str | None] = {
        "queries_ptr": "*fp32",
        "database_ptr": "*fp32",
        "scores_ptr": "*fp64",
        **dict.fromkeys(("pair_queries_ptr", "pair_groups_ptr", "work_ptr"), "*i64"),
        **dict.fromkeys(("n_pairs", "n_places", "dim", "query_stride", "row_stride"), "i32"),
    }
    for metric, p in (("l2", 0.0), ("cosine", 0.0), ("jensenshannon", 0.0), ("lp", 2.5)):
        yield Case(
            name=f"rescore, {metric}",
            kernel=rescore.rescore_kernel,
            types=types | {"rows_ptr": None},
            constants={"METRIC": metric, "P": p, "GROUP": _GROUP, **rescore.blocks_for(metric, _GROUP)},
            warps=rescore.warps_for(_GROUP),
            unaligned=("n_pairs", "n_places"),
        )
    for metric in ("l2", "cosine"):
        blocks = rescore.blocks_for(metric, _LIST_GROUP)
        yield Case(
            name=f"rescore in lists, {metric}",
            kernel=rescore.rescore_kernel,
            types=types | {"rows_ptr": "*i64"},
            constants={"METRIC": metric, "P": 0.0, "GROUP": _LIST_GROUP, **blocks},
            warps=rescore.warps_for(_LIST_GROUP),
            unaligned=("n_pairs", "n_places"),
        )


def _distance_cases() -> Iterator[Case]:
    types: dict[str, str | None] = {
        "mask_ptr": None,
        **dict.fromkeys(("queries_ptr", "database_ptr", "minima_ptr"), "*fp32"),
        **dict.fromkeys(("n_queries", "n_rows", "dim", "n_groups"), "i32"),
        **dict.fromkeys(("query_stride", "row_stride", "mask_stride"), "i32"),
    }
    blocks = {
        "BLOCK_ROWS": max(_GROUP, distance.LEAST_ROWS),
        "BLOCK_FEATURES": distance.BLOCK_FEATURES,
    }
    for name in ("l1", "braycurtis", "jensenshannon", "lp"):
        metric = resolve_metric(name, 2.5 if name == "lp" else None)
        yield Case(
            name=f"distance_group_min, {name}",
            kernel=distance.distance_group_min_kernel,
            types=types,
            constants={
                "METRIC": name,
                "P": metric.p,
                "GROUP": _GROUP,
                "EVEN": True,
                "PAIR_MASK": False,
                "BLOCK_QUERIES": distance.queries_at_once(metric),
                **blocks,
            },
            warps=distance.WARPS,
            stages=1,
            unaligned=("n_queries", "n_rows", "n_groups"),
        )


def _selection_cases() -> Iterator[Case]:
    digits = {"PASSES": select.PASSES, "BINS": select.BINS, "DIGIT_BITS": select.DIGIT_BITS}
    types = {
        "values_ptr": "*fp32",
        "result_ptr": "*fp32",
        **dict.fromkeys(("before_ptr", "after_ptr", "counts_ptr", "state_ptr"), "*i32"),
        **dict.fromkeys(("n_columns", "part_size", "n_parts", "row_stride", "k"), "i32"),
    }
    for number in (0, 2):
        yield _plain_case(
            f"kth_largest, pass {number}",
            select.digit_counts_kernel,
            types,
            {"PASS": number, "BLOCK": select.BLOCK, **digits},
            select.WARPS,
            ("n_columns", "n_parts", "row_stride", "k"),
        )
    yield _plain_case("kth_largest, last digit", select.last_digit_kernel, types, digits, 1, ("n_parts",))


def _merge_cases() -> Iterator[Case]:
    types = {
        **dict.fromkeys(("keys_ptr", "best_ptr"), "*i64"),
        **dict.fromkeys(("n_columns", "part_size", "key_stride", "best_stride", "k"), "i32"),
    }
    for k in (10, 1024):
        kept, block, warps = merge.blocks_for(k)
        yield _plain_case(
            f"merge_keys, k {k}",
            merge.merge_keys_kernel,
            types,
            {"K": kept, "BLOCK": block, "EMPTY": EMPTY_KEY},
            warps,
            ("n_columns", "key_stride", "best_stride", "k"),
        )


def _plain_case(
    name: str,
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    warps: int,
    unaligned: tuple[str, ...],
) -> Case:
    # Rows of any length begin at any address, so nothing wider than an element is loaded.
    known = {argument: types[argument] for argument in kernel.arg_names if argument in types}
    return Case(name, kernel, known, constants, warps, 1, unaligned, wide_loads=False)


def cases(target: str) -> list[Case]:
    """Return everything that is compiled for a target."""
    return [
        *_scan_cases(target),
        *_list_cases(target),
        *_distance_cases(),
        *_selection_cases(),
        *_rescore_cases(),
        *_merge_cases(),
    ]
