"""What the C++ of `native/search.cpp` takes, and calling it."""

import ctypes
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from elips_torch.core.errors import ImplementationError
from elips_torch.core.hardware import device_facts
from elips_torch.core.native import NativeLibrary, instruction_options, native_reasons

METRICS = {
    name: number
    for number, name in enumerate(
        ("l2", "ip", "cosine", "l1", "linf", "lp", "canberra", "braycurtis", "jensenshannon", "gower")
    )
}
CODE_TYPES = {torch.float32: 0, torch.int8: 1, torch.bfloat16: 2}
VECTOR_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
SOURCE_TYPES = {**VECTOR_TYPES, torch.float64: 3}
# How rows are packed: kind and bits of a `PackedTable`.
PACKINGS = {
    ("scalars", 8): 1,
    ("parts", 8): 2,
    ("parts", 4): 3,
    ("scalars", 6): 4,
    ("scalars", 4): 5,
    ("fp16", 16): 6,
    ("bf16", 16): 7,
}
# Rows that a reservoir's memory holds beside its capacity.
SPARE = 16
# What becomes of a query: its result is certain; too much survived; a score's last bit is open.
CERTIFIED, UNCERTIFIED, UNSURE = range(3)

LIBRARY = NativeLibrary(Path(__file__).parent / "native" / "search.cpp")


def library_reasons(device: torch.device) -> list[str]:
    """Return why the C++ code cannot serve tensors on a device; empty where it can."""
    if device.type != "cpu":
        return [f"C++ code runs on a CPU, the tensors are on {device.type}"]
    facts = device_facts(device)
    reasons = native_reasons(facts)
    if not reasons and LIBRARY.has_failed(instruction_options(facts)):
        reasons.append("its C++ code does not compile here; see the log")
    return reasons


def library_is_loaded() -> bool:
    """Whether the code runs at once; tensors on a CPU are all that it then asks for."""
    return LIBRARY.is_loaded(instruction_options(device_facts("cpu")))


def library_is_ready(device: torch.device) -> bool:
    """Whether the code need not be compiled first."""
    return LIBRARY.is_ready(instruction_options(device_facts(device)))


def library_compiles() -> bool:
    """Compile the code where that has not been done, and return whether it could be."""
    return LIBRARY.load(instruction_options(device_facts("cpu"))) is not None


@functools.cache
def int8_products_are_right() -> bool:
    """Search among extreme codes, whose products are known; instructions that saturate fail."""
    return all(_products_are_right(dim, n_queries) for dim in (67, 300) for n_queries in (1, 20, 40, 72))


def _products_are_right(dim: int, n_queries: int) -> bool:
    n_rows = 72
    signs = torch.where(torch.arange(dim, device="cpu") % 3 == 0, -1, 1)
    rows = torch.stack([127 * signs, -128 * torch.ones_like(signs), 127 * torch.ones_like(signs)])
    rows = torch.cat([rows, -rows.clamp_min(-127), (signs * torch.arange(dim, device="cpu"))[None]])
    rows = rows.repeat(-(-n_rows // len(rows)), 1)[:n_rows].to(torch.int8)
    terms = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float32, device="cpu").repeat(n_rows, 1)
    queries = rows[:n_queries].contiguous()
    products = (queries.double() @ rows.double().t()).sort(1, descending=True).values
    zeros = torch.zeros(3, n_queries, dtype=torch.float64, device="cpu")
    factors = torch.zeros(3, n_queries, dtype=torch.float32, device="cpu")
    factors[0] = 1.0
    scores = torch.empty(n_queries, n_rows, dtype=torch.float32, device="cpu")
    found = torch.empty(n_queries, n_rows, dtype=torch.int64, device="cpu")
    native_search(
        codes=rows,
        terms=terms,
        n_rows=n_rows,
        query_codes=queries,
        query_terms=factors,
        rounding=zeros,
        offsets=zeros,
        usable=torch.ones(n_queries, dtype=torch.bool, device="cpu"),
        vectors=rows,
        queries=queries.double(),
        memory=torch.empty(3, n_queries, 2 * n_rows + SPARE, dtype=torch.float32, device="cpu"),
        scores=scores,
        found=found,
        status=torch.empty(2, n_queries, dtype=torch.int32, device="cpu"),
        dim=dim,
        n_queries=n_queries,
        k=n_rows,
        capacity=2 * n_rows,
        n_threads=1,
        n_parts=1,
        metric=METRICS["ip"],
        code_type=CODE_TYPES[torch.int8],
        is_exact=1,
    )
    return torch.equal(scores.double(), products)


# `enum Outcome` of outcome.h.
DONE, NO_MEMORY, _UNKNOWN_TYPE, _UNBOUNDED, OPEN, SHORT = range(6)


class Packed(ctypes.Structure):
    """`struct Packed` of unpack.h; the default is what is not packed."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("places", ctypes.c_void_p),
        ("slot_places", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("low", ctypes.c_void_p),
        ("centroids", ctypes.c_void_p),
        ("assignments", ctypes.c_void_p),
        ("packing", ctypes.c_int32),
        ("code_size", ctypes.c_int32),
        ("parts", ctypes.c_int32),
        ("ksub", ctypes.c_int32),
    )


class Grid(ctypes.Structure):
    """`struct Grid` of grid.h; the default is no grid."""

    _fields_ = (
        ("steps", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("scalars", ctypes.c_void_p),
        ("terms", ctypes.c_void_p),
        ("features", ctypes.c_void_p),
        ("residual", ctypes.c_float),
        ("rounded", ctypes.c_float),
    )


class GridTerms(ctypes.Structure):
    """`struct GridTerms` of grid.h."""

    _fields_ = (
        ("packed", Packed),
        ("grid", Grid),
        ("mean", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("places", ctypes.c_void_p),
        ("terms", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("dim", ctypes.c_int32),
        ("metric", ctypes.c_int32),
        ("n_threads", ctypes.c_int32),
    )


class Arguments(ctypes.Structure):
    """`struct Arguments` of arguments.h, field by field; tensors go in as their addresses."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("terms", ctypes.c_void_p),
        ("names", ctypes.c_void_p),
        ("n_rows", ctypes.c_int64),
        ("list_starts", ctypes.c_void_p),
        ("list_sizes", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("probes", ctypes.c_void_p),
        ("coarse", ctypes.c_void_p),
        ("n_lists", ctypes.c_int64),
        ("n_slots", ctypes.c_int64),
        ("n_probes", ctypes.c_int64),
        ("source", ctypes.c_void_p),
        ("mean", ctypes.c_void_p),
        ("rounded", ctypes.c_double),
        ("largest", ctypes.c_double),
        ("power", ctypes.c_double),
        ("step", ctypes.c_double),
        ("query_codes", ctypes.c_void_p),
        ("query_terms", ctypes.c_void_p),
        ("rounding", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("usable", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("mask_rows", ctypes.c_void_p),
        ("mask_stride", ctypes.c_int64),
        ("mask_step", ctypes.c_int64),
        ("exclude", ctypes.c_void_p),
        ("n_excluded", ctypes.c_int64),
        ("candidates", ctypes.c_void_p),
        ("n_candidates", ctypes.c_int64),
        ("radius", ctypes.c_void_p),
        ("vectors", ctypes.c_void_p),
        ("packed", Packed),
        ("grid", Grid),
        ("queries", ctypes.c_void_p),
        ("ranks", ctypes.c_void_p),
        ("memory", ctypes.c_void_p),
        ("scores", ctypes.c_void_p),
        ("found", ctypes.c_void_p),
        ("status", ctypes.c_void_p),
        ("most_scored", ctypes.c_int64),
        ("scored", ctypes.c_void_p),
        ("slack", ctypes.c_float),
        ("dim", ctypes.c_int32),
        ("n_queries", ctypes.c_int32),
        ("k", ctypes.c_int32),
        ("capacity", ctypes.c_int32),
        ("n_threads", ctypes.c_int32),
        ("n_parts", ctypes.c_int32),
        ("metric", ctypes.c_int32),
        ("code_type", ctypes.c_int32),
        ("vector_type", ctypes.c_int32),
        ("source_type", ctypes.c_int32),
        ("is_exact", ctypes.c_int32),
        ("codes_in_slots", ctypes.c_int32),
    )


class Coding(ctypes.Structure):
    """`struct Coding` of coding.h."""

    _fields_ = (
        ("queries", ctypes.c_void_p),
        ("mean", ctypes.c_void_p),
        ("steps", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("terms", ctypes.c_void_p),
        ("rounding", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("usable", ctypes.c_void_p),
        ("rounded", ctypes.c_double),
        ("largest", ctypes.c_double),
        ("step", ctypes.c_double),
        ("dim", ctypes.c_int32),
        ("n_queries", ctypes.c_int32),
        ("metric", ctypes.c_int32),
        ("code_type", ctypes.c_int32),
        ("n_threads", ctypes.c_int32),
    )


class Assigning(ctypes.Structure):
    """`struct Assigning` of assign.h."""

    _fields_ = (
        ("vectors", ctypes.c_void_p),
        ("centroids", ctypes.c_void_p),
        ("mean", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("terms", ctypes.c_void_p),
        ("labels", ctypes.c_void_p),
        ("rounded", ctypes.c_double),
        ("largest", ctypes.c_double),
        ("n_vectors", ctypes.c_int64),
        ("n_centroids", ctypes.c_int32),
        ("dim", ctypes.c_int32),
        ("metric", ctypes.c_int32),
        ("code_type", ctypes.c_int32),
        ("vector_type", ctypes.c_int32),
        ("is_coded", ctypes.c_int32),
        ("n_threads", ctypes.c_int32),
    )


class LinearMap(ctypes.Structure):
    """`struct LinearMap` of linear_map.h."""

    _fields_ = (
        ("vectors", ctypes.c_void_p),
        ("matrix", ctypes.c_void_p),
        ("before", ctypes.c_void_p),
        ("after", ctypes.c_void_p),
        ("mapped", ctypes.c_void_p),
        ("slack", ctypes.c_double),
        ("n", ctypes.c_int64),
        ("n_in", ctypes.c_int32),
        ("n_out", ctypes.c_int32),
        ("vector_type", ctypes.c_int32),
    )


def native_search(**arguments: Tensor | float | ctypes.Structure | None) -> int:
    """Run `elips_search`, which writes into the tensors of the results.

    Args:
        **arguments: the fields of `Arguments`; tensors are contiguous.

    Returns:
        `DONE` where every query is certified, `SHORT` where some have also found fewer than k rows; `OPEN`
        where the status says which; `NO_MEMORY` where nothing was written that means anything.
    """
    return call_search(search_arguments(**arguments))


def search_arguments(**arguments: Tensor | float | ctypes.Structure | None) -> Arguments:
    """Return what `call_search` takes; whoever keeps it keeps the tensors, too."""
    return Arguments(**_addresses(arguments))


def call_search(arguments: Arguments) -> int:
    """Run `elips_search` and return its outcome, as `native_search` does."""
    return _call("elips_search", arguments)


def call_rank(arguments: Arguments) -> int:
    """Run `elips_rank`, which writes scores, rows, and the status ``(Q,)`` where there is a place for it.

    Returns:
        `DONE` where every score is certain; `SHORT` where some queries have also found fewer than k rows;
        `OPEN` where a score is in doubt, or a query is not finite; the status says which. `NO_MEMORY` where
        nothing was written that means anything.
    """
    return _call("elips_rank", arguments)


def native_code(**arguments: Tensor | float | None) -> bool:
    """Run `elips_code`, which writes into the tensors of the results; a search does that by itself.

    Args:
        **arguments: the fields of `Coding`; tensors are contiguous.

    Returns:
        Whether there was memory enough; else nothing was written that means anything.
    """
    return _call("elips_code", Coding(**_addresses(arguments))) == DONE


def native_terms(**arguments: Tensor | float | ctypes.Structure | None) -> bool:
    """Run `elips_terms`, which writes into the terms of rows on a grid.

    Args:
        **arguments: the fields of `GridTerms`; tensors are contiguous.

    Returns:
        Whether there was memory enough; else the terms mean nothing.
    """
    return _call("elips_terms", GridTerms(**_addresses(arguments))) == DONE


def native_assign(**arguments: Tensor | float | None) -> bool:
    """Run `elips_assign`, which writes into the labels.

    Args:
        **arguments: the fields of `Assigning`; tensors are contiguous.

    Returns:
        Whether it could bound the centroids and had memory enough; else the labels mean nothing.
    """
    return _call("elips_assign", Assigning(**_addresses(arguments))) == DONE


def native_map(**arguments: Tensor | float | None) -> int:
    """Run `elips_map`, which writes into the mapped vectors.

    Args:
        **arguments: the fields of `LinearMap`; tensors are contiguous.

    Returns:
        `DONE` where every entry is certain; `OPEN` where those that are not are NaN; `NO_MEMORY` where
        nothing was written that means anything.
    """
    return _call("elips_map", LinearMap(**_addresses(arguments)))


def _addresses(
    arguments: Mapping[str, Tensor | float | ctypes.Structure | None],
) -> dict[str, float | ctypes.Structure | None]:
    return {
        name: value.data_ptr() if isinstance(value, Tensor) else value for name, value in arguments.items()
    }


def _call(function: str, arguments: ctypes.Structure) -> int:
    outcome = int(_function(function)(ctypes.byref(arguments)))
    if outcome == _UNKNOWN_TYPE:
        raise ImplementationError("exact search in C++ does not know a type that it was given")
    return outcome


def _function(name: str) -> Callable[..., int]:
    library = LIBRARY.load(instruction_options(device_facts("cpu")))
    if library is None:
        raise ImplementationError("the C++ code of exact search does not compile here; see the log")
    _check_sizes(library)
    function: Callable[..., int] = getattr(library, name)
    return function


@functools.cache
def _check_sizes(library: ctypes.CDLL) -> None:
    """Compare the structures here with those of the code."""
    for which, structure in enumerate((Arguments, Coding, Packed, Grid, GridTerms, Assigning, LinearMap)):
        size = library.elips_size(which)
        if size != ctypes.sizeof(structure):
            raise ImplementationError(
                f"{structure.__name__} has {ctypes.sizeof(structure)} bytes, the C++ code has {size}"
            )
