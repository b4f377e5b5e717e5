"""What the C++ of `native/search.cpp` takes, and calling it."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from elips_torch.core.errors import ImplementationError
from elips_torch.core.hardware import device_facts
from elips_torch.core.native import NativeLibrary, instruction_options, native_reasons

METRICS = {"l2": 0, "ip": 1, "cosine": 2}
CODE_TYPES = {torch.float32: 0, torch.int8: 1}
VECTOR_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# Rows that a reservoir's memory holds beside its capacity.
SPARE = 16
# What becomes of a query: its result is certain; too much survived; a score's last bit is open.
CERTIFIED, UNCERTIFIED, UNSURE = range(3)

LIBRARY = NativeLibrary(Path(__file__).parent / "native" / "search.cpp")


def library_reasons(device: torch.device) -> list[str]:
    """Return why the C++ code cannot serve tensors on a device; empty where it can."""
    facts = device_facts(device)
    reasons = native_reasons(facts)
    if not reasons and LIBRARY.has_failed(instruction_options(facts)):
        reasons.append("its C++ code does not compile here; see the log")
    return reasons


def library_is_ready(device: torch.device) -> bool:
    """Whether the code need not be compiled first."""
    return LIBRARY.is_ready(instruction_options(device_facts(device)))


def library_compiles() -> bool:
    """Compile the code where that has not been done, and return whether it could be."""
    return LIBRARY.load(instruction_options(device_facts("cpu"))) is not None


_FAILURES = {1: "there is not enough memory", 2: "a type is not known"}
# Returned where a centroid is too large.
_UNBOUNDED = 3


class Arguments(ctypes.Structure):
    """`struct Arguments` of search.cpp, field by field; tensors go in as their addresses."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("terms", ctypes.c_void_p),
        ("names", ctypes.c_void_p),
        ("n_rows", ctypes.c_int64),
        ("list_starts", ctypes.c_void_p),
        ("list_sizes", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("probes", ctypes.c_void_p),
        ("n_lists", ctypes.c_int64),
        ("n_probes", ctypes.c_int64),
        ("query_codes", ctypes.c_void_p),
        ("query_terms", ctypes.c_void_p),
        ("rounding", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("usable", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("mask_rows", ctypes.c_void_p),
        ("mask_stride", ctypes.c_int64),
        ("exclude", ctypes.c_void_p),
        ("n_excluded", ctypes.c_int64),
        ("vectors", ctypes.c_void_p),
        ("queries", ctypes.c_void_p),
        ("ranks", ctypes.c_void_p),
        ("reservoir_rows", ctypes.c_void_p),
        ("reservoir_upper", ctypes.c_void_p),
        ("reservoir_lower", ctypes.c_void_p),
        ("scores", ctypes.c_void_p),
        ("found", ctypes.c_void_p),
        ("status", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
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
        ("is_exact", ctypes.c_int32),
    )


class Coding(ctypes.Structure):
    """`struct Coding` of coding.h."""

    _fields_ = (
        ("queries", ctypes.c_void_p),
        ("mean", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("terms", ctypes.c_void_p),
        ("rounding", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("usable", ctypes.c_void_p),
        ("rounded", ctypes.c_double),
        ("largest", ctypes.c_double),
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


def native_search(**arguments: Tensor | float | None) -> None:
    """Run `elips_search`, which writes into the tensors of the results.

    Args:
        **arguments: the fields of `Arguments`; tensors are contiguous.

    Raises:
        ImplementationError: the code could not be compiled, or failed.
    """
    _call("elips_search", Arguments, arguments)


def native_code(**arguments: Tensor | float | None) -> None:
    """Run `elips_code`, which writes into the tensors of the results.

    Args:
        **arguments: the fields of `Coding`; tensors are contiguous.

    Raises:
        ImplementationError: the code could not be compiled, or failed.
    """
    _call("elips_code", Coding, arguments)


def native_assign(**arguments: Tensor | float | None) -> bool:
    """Run `elips_assign`, which writes into the labels, and return whether it could bound the centroids.

    Args:
        **arguments: the fields of `Assigning`; tensors are contiguous.

    Raises:
        ImplementationError: the code could not be compiled, or failed.
    """
    return _call("elips_assign", Assigning, arguments) != _UNBOUNDED


def _call(
    function: str, structure: type[ctypes.Structure], arguments: dict[str, Tensor | float | None]
) -> int:
    library = LIBRARY.load(instruction_options(device_facts("cpu")))
    if library is None:
        raise ImplementationError("the C++ code of exact search does not compile here; see the log")
    values = {
        name: value.data_ptr() if isinstance(value, Tensor) else value for name, value in arguments.items()
    }
    failure: int = getattr(library, function)(ctypes.byref(structure(**values)))
    if failure in _FAILURES:
        raise ImplementationError(f"exact search in C++ failed: {_FAILURES[failure]}")
    return failure
