"""Choosing one of several implementations of an operation."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from elips_torch.core.errors import ImplementationError
from elips_torch.core.hardware import device_facts
from elips_torch.core.metric import Metric

logger = logging.getLogger("elips_torch")


@dataclasses.dataclass(frozen=True)
class Request:
    """A call as the choice sees it: static facts only, never a value of a tensor."""

    device: torch.device
    query_dtype: torch.dtype
    dtype: torch.dtype
    n_queries: int
    n_rows: int
    dim: int
    metric: Metric
    k: int | None = None
    screen: str = "none"

    @classmethod
    def of(
        cls,
        queries: Tensor,
        database: Tensor,
        metric: Metric,
        k: int | None = None,
        screen: str = "none",
    ) -> "Request":
        """Describe a search of ``(Q, D)`` queries in a ``(N, D)`` database."""
        n_rows, dim = database.shape
        return cls(
            queries.device, queries.dtype, database.dtype, queries.shape[0], n_rows, dim, metric, k, screen
        )

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        k = f", k={self.k}" if self.k is not None else ""
        shape = f"{self.n_queries} x {self.n_rows} x {self.dim}"
        screen = f", screen {self.screen}" if self.screen != "none" else ""
        return f"{shape} {dtype}, {self.metric.name}{k}{screen} on {device_facts(self.device)}"


def _no_reasons(request: Request) -> list[str]:
    return []


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to run an operation, and what it cannot do, as data.

    Attributes:
        name: what users pass as ``implementation=``.
        run: the function; all implementations of an operation share one signature.
        unsupported_reasons: given a description of the call, returns why this implementation cannot
            serve it; empty when it can.
        unwise_reasons: returns why the automatic choice passes it over though it could serve.
    """

    name: str
    run: Callable[..., Any]
    unsupported_reasons: Callable[[Request], list[str]]
    unwise_reasons: Callable[[Request], list[str]] = _no_reasons

    def reasons_against(self, request: Request, requested: str) -> list[str]:
        """Return why it does not serve a request under which ``requested`` was asked for."""
        reasons = self.unsupported_reasons(request)
        return reasons if reasons or requested == self.name else self.unwise_reasons(request)


@dataclasses.dataclass(frozen=True, repr=False)
class Explanation:
    """Which implementation serves a call and why the others do not; shown as text.

    Attributes:
        operation: name of the operation.
        chosen: name of the implementation, or None when nothing fits.
        reasons: for each implementation, in order of preference, why it cannot serve the call.
        request: the call and the device, in words.
    """

    operation: str
    chosen: str | None
    reasons: dict[str, list[str]]
    request: str

    def __str__(self) -> str:
        lines = [f"{self.operation} of {self.request}"]
        for name, reasons in self.reasons.items():
            verdict = "; ".join(reasons) or ("chosen" if name == self.chosen else "possible")
            lines.append(f"  {name:<12} {verdict}")
        if self.chosen is None:
            lines.append("  so the call would raise")
        return "\n".join(lines)

    # A prompt and a notebook show what a call returns.
    __repr__ = __str__


@functools.lru_cache(maxsize=1024)
def _log_once(message: str) -> None:
    logger.info(message)


def float64_reasons(request: Request) -> list[str]:
    """Return why a device cannot compute scores as they are defined; empty where it can."""
    if request.device.type == "mps":
        return ["scores are defined in float64, which MPS does not have; move to the CPU"]
    return []


def check_name(operation: str, names: Iterable[str], requested: str) -> None:
    """Check that one of these implementations is asked for, or "auto".

    Raises:
        ImplementationError: another; the message lists these.
    """
    known = ("auto", *names)
    if requested not in known:
        listed = ", ".join(map(repr, known))
        raise ImplementationError(f"implementation is {requested!r}, {operation} has {listed}")


def choose(
    operation: str, implementations: Sequence[Implementation], request: Request, requested: str = "auto"
) -> Implementation:
    """Return the first implementation that can serve the request, or the one asked for.

    Args:
        operation: name for messages.
        implementations: fastest first.
        request: description of the call.
        requested: "auto", or the name of one implementation, which is then used or refused.

    Raises:
        ImplementationError: the name is unknown, or nothing that is allowed can serve the call;
            the message lists every reason.
    """
    skipped: list[str] = []
    for candidate in implementations:
        if requested != candidate.name and requested != "auto":
            continue
        reasons = candidate.reasons_against(request, requested)
        if not reasons:
            if skipped:
                _log_once(f"{operation} runs as {candidate.name!r}; " + "; ".join(skipped))
            return candidate
        skipped.append(f"{candidate.name!r} cannot: " + ", ".join(reasons))
    check_name(operation, (each.name for each in implementations), requested)
    failed = "nothing can serve this call" if requested == "auto" else "this call cannot be served as asked"
    raise ImplementationError(f"{operation}: {failed}; " + "; ".join(skipped))


def explain_choice(
    operation: str,
    implementations: Sequence[Implementation],
    request: Request,
    requested: str,
) -> Explanation:
    """Return what `choose` would do and why; raises only for an unknown name."""
    check_name(operation, (each.name for each in implementations), requested)
    reasons = {each.name: each.reasons_against(request, requested) for each in implementations}
    if requested != "auto":
        for name in reasons:
            if name != requested:
                reasons[name] = [f"implementation={requested!r} was asked for", *reasons[name]]
    chosen = next((name for name, why in reasons.items() if not why), None)
    return Explanation(operation, chosen, reasons, str(request))
