"""Checks of what users pass in: each says which argument, what it got, what it expected."""

import operator
import sys
from collections.abc import Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

from elips_torch.core.errors import (
    ArgumentError,
    DeviceError,
    DtypeError,
    DuplicateIdError,
    NonFiniteError,
    ShapeError,
)
from elips_torch.core.metric import Metric
from elips_torch.core.tiling import MINIMUM_WORKSPACE_BYTES

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_SHOWN = 5


def check_vectors(
    name: str,
    vectors: Tensor,
    *,
    dim: int | None = None,
    owner: str = "the index",
    device: torch.device | None = None,
    allow_single: bool = False,
) -> None:
    """Check type, dtype, shape and device of vectors, without reading a value.

    Args:
        name: name of the argument.
        vectors: what was passed.
        dim: expected size of the last axis; None takes any.
        owner: what has that dim, for the message.
        device: expected device; None takes any.
        allow_single: accept a 1-D vector.
    """
    if not isinstance(vectors, Tensor):
        hint = "; torch.from_numpy makes one" if type(vectors).__name__ == "ndarray" else ""
        raise DtypeError(f"{name} is a {type(vectors).__name__}, expected a torch.Tensor{hint}")
    if vectors.layout != torch.strided:
        raise DtypeError(f"{name} is {vectors.layout}, expected a dense tensor; {name}.to_dense() makes one")
    if vectors.dtype not in FLOAT_DTYPES:
        raise DtypeError(f"{name} has dtype {vectors.dtype}, expected float32, float16, bfloat16 or float64")
    if vectors.ndim != 2 and not (allow_single and vectors.ndim == 1):
        expected = "(Q, D) or (D,)" if allow_single else "(N, D)"
        raise ShapeError(f"{name} has shape {tuple(vectors.shape)}, expected {expected}")
    if vectors.shape[-1] == 0:
        raise ShapeError(f"{name} has dim 0, expected at least 1")
    if dim is not None and vectors.shape[-1] != dim:
        raise ShapeError(f"{name} has dim {vectors.shape[-1]}, {owner} has dim {dim}")
    check_device(name, vectors, device, owner)


def check_device(name: str, tensor: Tensor, device: torch.device | None, owner: str) -> None:
    """Check that a tensor lies on a device."""
    if device is not None and tensor.device != device:
        raise DeviceError(f"{name} is on {tensor.device}, {owner} is on {device}")


def check_usable(name: str, device: torch.device | str | int | None) -> None:
    """Check that tensors can be put on a device, before any is made; None and the CPU cost nothing.

    Raises:
        DeviceError: no name of a device, or this machine has none of that kind or number.
    """
    if device is None or device == "cpu":
        return
    place = read_device(name, device)
    accelerators = getattr(torch, place.type, None)
    if place.type == "cpu" or accelerators is None or not hasattr(accelerators, "is_available"):
        try:
            # What torch has no module for, it judges itself.
            torch.empty(0, device=place)
        except (RuntimeError, ImportError) as error:
            raise DeviceError(f"{name} is {str(device)!r}, which torch cannot use here: {error}") from error
        return
    n = int(accelerators.device_count()) if accelerators.is_available() else 0
    kind = "CUDA device" if place.type == "cuda" else f"{place.type} device"
    if not n:
        raise DeviceError(f"{name} is {str(device)!r}, this machine has no {kind} that torch can use")
    if place.index is not None and place.index >= n:
        raise DeviceError(f"{name} is {str(device)!r}, this machine has {n} {kind}{'s' * (n > 1)}, from 0 on")


def read_device(
    name: str, device: object, expected: str = "a device such as 'cpu' or 'cuda:0'"
) -> torch.device:
    """Return the device that an argument stands for, whether or not there is one.

    Raises:
        DeviceError: no name of a device.
    """
    try:
        # Of bytes some functions of torch make a device, and others a number.
        if isinstance(device, torch.device | str | int) and not isinstance(device, bool):
            return torch.device(device)
    except RuntimeError as error:
        raise DeviceError(f"{name} is {device!r}, expected {expected}") from error
    raise DeviceError(f"{name} is {device!r}, expected {expected}")


def describe_rows(rows: Tensor) -> str:
    """Return the first few row numbers in words."""
    shown = rows[:_SHOWN].tolist()
    more = f" and {rows.numel() - len(shown)} more" if rows.numel() > len(shown) else ""
    return f"row{'s' if rows.numel() > 1 else ''} {', '.join(map(str, shown))}{more}"


def rows_outside_domain(vectors: Tensor, metric: Metric) -> Tensor:
    """Return bool ``(N,)``, True for rows with NaN, infinity or a value outside the domain."""
    low, high = metric.domain
    return ~(vectors.isfinite() & (vectors >= low) & (vectors <= high)).all(-1)


def check_values(name: str, vectors: Tensor, metric: Metric) -> None:
    """Check that every value is finite and in the metric's domain; reads the data.

    Raises:
        NonFiniteError: with the numbers of the first offending rows.
    """
    if not vectors.numel():
        return
    # One cheap pass decides for good data; NaN propagates through both extremes.
    smallest, largest = (float(extreme) for extreme in torch.aminmax(vectors))
    low, high = metric.domain
    if max(low, -sys.float_info.max) <= smallest and largest <= min(high, sys.float_info.max):
        return
    bad = rows_outside_domain(vectors, metric)
    where = describe_rows(bad.nonzero().flatten())
    if low == -torch.inf:
        raise NonFiniteError(f"{name} has NaN or infinity in {where}, expected finite {vectors.dtype} values")
    domain = f">= {low:g}" if high == torch.inf else f"in [{low:g}, {high:g}]"
    raise NonFiniteError(
        f"{name} has values outside the domain of metric {metric.name!r} in {where}, "
        f"expected finite values {domain}"
    )


def bad_queries(queries: Tensor, metric: Metric) -> Tensor | None:
    """Look for queries that no search can serve.

    On a CPU such a query is an error. On an accelerator raising would synchronise; there the rows
    come back as bool ``(Q,)`` and are to be answered with ids -1 and NaN scores.

    Raises:
        NonFiniteError: on a CPU, with the numbers of the first offending rows.
    """
    if queries.device.type == "cpu":
        check_values("queries", queries, metric)
        return None
    return rows_outside_domain(queries, metric)


def check_k(k: int) -> int:
    """Check the number of neighbours and return it."""
    return check_count("k", k)


def check_count(name: str, count: int, least: int = 1) -> int:
    """Check a number of things and return it."""
    if type(count) is not int:
        if isinstance(count, bool) or not isinstance(count, SupportsIndex):
            raise DtypeError(f"{name} is {count!r}, expected an int")
        try:
            count = operator.index(count)
        except TypeError as error:
            # Tensors and arrays of other than one integer.
            raise DtypeError(f"{name} is {count!r}, expected an int") from error
    if count < least:
        raise ArgumentError(f"{name} is {count}, expected at least {least}")
    return count


def check_flag(name: str, flag: bool) -> bool:
    """Check that something is True or False and return it: 'false' and 0.5 would count as True."""
    if not isinstance(flag, bool):
        raise DtypeError(f"{name} is {flag!r}, expected True or False")
    return flag


def check_workspace(workspace_bytes: int) -> int:
    """Check the size of the workspace and return it."""
    if isinstance(workspace_bytes, bool) or not isinstance(workspace_bytes, int):
        raise DtypeError(f"workspace_bytes is {workspace_bytes!r}, expected an int")
    if workspace_bytes < MINIMUM_WORKSPACE_BYTES:
        raise ArgumentError(
            f"workspace_bytes is {workspace_bytes}, expected at least {MINIMUM_WORKSPACE_BYTES}"
        )
    return workspace_bytes


def as_ids(name: str, ids: Tensor | Sequence[int] | int, device: torch.device) -> Tensor:
    """Return ids as an int64 tensor ``(N,)`` on a device; ints and sequences are taken too.

    Raises:
        DtypeError: not integers.
        ShapeError: not one-dimensional.
        ArgumentError: a negative id.
    """
    if not isinstance(ids, Tensor):
        try:
            ids = torch.as_tensor(ids, device=device)
        except (TypeError, ValueError, RuntimeError) as error:
            texts = isinstance(ids, Sequence) and any(isinstance(each, str) for each in ids)
            got = type(ids).__name__ + (" of str" if texts and not isinstance(ids, str) else "")
            raise DtypeError(f"{name} is a {got}, expected one integer or several") from error
        if ids.numel() == 0:
            ids = ids.to(torch.int64)
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise DtypeError(f"{name} has dtype {ids.dtype}, expected int64")
    if ids.ndim > 1:
        raise ShapeError(f"{name} has shape {tuple(ids.shape)}, expected (N,)")
    ids = ids.reshape(-1).to(device=device, dtype=torch.int64)
    if ids.numel() and int(ids.min()) < 0:
        raise ArgumentError(f"{name} has the negative id {int(ids.min())}, expected ids >= 0")
    return ids


def check_unique(name: str, ids: Tensor) -> None:
    """Check that no id occurs twice."""
    if ids.numel() < 2 or bool((ids[1:] > ids[:-1]).all()):
        return
    ordered = ids.sort().values
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if repeated.numel():
        raise DuplicateIdError(f"{name} has the id {int(repeated[0])} more than once, expected unique ids")


def check_mask(mask: Tensor | None, n_queries: int, n_rows: int, device: torch.device) -> None:
    """Check dtype, shape and device of a mask."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise DtypeError(f"mask is {got}, expected a bool tensor")
    if tuple(mask.shape) not in ((n_rows,), (n_queries, n_rows)):
        raise ShapeError(
            f"mask has shape {tuple(mask.shape)}, expected ({n_rows},) or ({n_queries}, {n_rows}): "
            "one column per row in the order of the ids"
        )
    check_device("mask", mask, device, "the database")


def check_exclude(exclude: Tensor | None, n_queries: int, device: torch.device) -> None:
    """Check dtype, shape and device of ids to exclude."""
    if exclude is None:
        return
    if not isinstance(exclude, Tensor) or exclude.dtype != torch.int64:
        got = exclude.dtype if isinstance(exclude, Tensor) else type(exclude).__name__
        raise DtypeError(f"exclude is {got}, expected an int64 tensor")
    if exclude.ndim != 2 or exclude.shape[0] != n_queries:
        raise ShapeError(f"exclude has shape {tuple(exclude.shape)}, expected ({n_queries}, M)")
    check_device("exclude", exclude, device, "the database")


def as_radius(radius: float | Tensor, n_queries: int, device: torch.device) -> Tensor:
    """Return the radius of each query, ``(Q,)`` float32.

    Raises:
        DtypeError: neither a number nor a tensor of numbers.
        ShapeError: neither one radius nor one per query.
        DeviceError: a tensor on another device.
        ArgumentError: NaN, where reading it costs no synchronisation.
    """
    if isinstance(radius, Tensor):
        if radius.dtype == torch.bool or radius.is_complex():
            raise DtypeError(f"radius has dtype {radius.dtype}, expected real numbers")
        if tuple(radius.shape) not in ((), (1,), (n_queries,)):
            raise ShapeError(f"radius has shape {tuple(radius.shape)}, expected one number or ({n_queries},)")
        if radius.ndim:
            check_device("radius", radius, device, "the database")
        limits = radius.detach().to(device=device, dtype=torch.float32)
    elif isinstance(radius, (int, float)) and not isinstance(radius, bool):
        if radius != radius:
            raise ArgumentError(f"radius is {radius}, expected a number")
        limits = torch.tensor(radius, dtype=torch.float32, device=device)
    else:
        raise DtypeError(f"radius is a {type(radius).__name__}, expected a number or a tensor")
    return limits.expand(n_queries)
