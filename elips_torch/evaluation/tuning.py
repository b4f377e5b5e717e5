"""Finding the cheapest search parameters that reach a recall."""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from elips_torch.core.errors import ArgumentError, DtypeError, ParameterError
from elips_torch.core.user_warnings import warn_user
from elips_torch.core.validation import check_count
from elips_torch.evaluation.own_recall import ExactScores
from elips_torch.indexes.base import Index

# Short searches are repeated until they took so many seconds together, at most this many times.
_ENOUGH_SECONDS, _MOST_REPEATS = 0.3, 15
# Where nothing says how large a parameter may usefully be.
_MOST = 4096
# An index of codes loses no more than this many candidates.
_MOST_FACTOR = 64


@dataclasses.dataclass(frozen=True)
class TuningPoint:
    """One setting of the search parameters, and what came of it.

    Attributes:
        parameters: value of each, by name.
        recall: against exact search.
        queries_per_second: by the median time of a search with all queries.
    """

    parameters: dict[str, float]
    recall: float
    queries_per_second: float


@dataclasses.dataclass(frozen=True, repr=False)
class TuningCurve:
    """What `tune` has measured; shown as a table.

    Attributes:
        points: every setting tried, by rising recall, then speed.
        target_recall: what was asked for.
        k: number of neighbours.
        n_queries: how many queries were searched at once.
        best: the cheapest point that reaches the target; None if no point does.
    """

    points: tuple[TuningPoint, ...]
    target_recall: float
    k: int
    n_queries: int
    best: TuningPoint | None

    @property
    def highest(self) -> TuningPoint:
        """The fastest of the points with the highest recall."""
        return self.points[-1]

    @property
    def explanation(self) -> str:
        """What was found, or why the target is out of reach, in a sentence."""
        if self.best is not None:
            return (
                f"{_format(self.best.parameters)} reaches recall@{self.k} {self.best.recall:.4f} "
                f"(target {self.target_recall:g}) at {self.best.queries_per_second:,.0f} queries per second"
            )
        return (
            f"recall@{self.k} {self.target_recall:g} is out of reach: the highest is "
            f"{self.highest.recall:.4f}, by {_format(self.highest.parameters)}; larger values find more "
            "where there are any, and so does a RefineIndex around an index of codes"
        )

    def __repr__(self) -> str:
        names = list(self.points[0].parameters)
        rows = [[*names, f"recall@{self.k}", "queries/s", ""]]
        for point in self.points:
            values = [f"{value:g}" for value in point.parameters.values()]
            mark = "<- best" if point is self.best else ""
            rows.append([*values, f"{point.recall:.4f}", f"{point.queries_per_second:,.0f}", mark])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False))
            + f"  {row[-1]}"
            for row in rows
        ]
        return "\n".join([*(line.rstrip() for line in lines), self.explanation])


def tune(
    index: Index,
    queries: Tensor,  # (Q, D)
    target_recall: float = 0.95,
    k: int = 10,
    *,
    parameters: Mapping[str, Sequence[float]] | None = None,
    database: Tensor | None = None,  # (ntotal, D)
    ground_truth: Tensor | None = None,  # (Q, K)
    sample: int | None = None,
    seed: int = 0,
) -> TuningCurve:
    """Find the cheapest search parameters that reach a recall, and set them on the index.

    Values double from 1 until nothing more can be found; then the smallest that reaches the target is
    searched between the two around it. Which values are tried depends on recall alone, so it is the same
    on every run. Of several parameters, such as ``nprobe`` and ``k_factor``, each value of the others
    gets its smallest ``nprobe``; the fastest of these is the best. Where none reaches the target, the
    index stays as it is and a warning says what can be reached.

    Args:
        index: a filled index; one without parameters to tune gives a single point.
        queries: ``(Q, D)`` like those to come, on the index's device; a thousand give recall to
            about 0.005. All are searched at once, so speed is that of batches of this size.
        target_recall: above 0, at most 1.
        k: number of neighbours.
        parameters: values to try, by name of the search parameter; default is what is known to trade
            recall for speed.
        database: as for `index_recall`: without it, recall leaves out what coding lost.
        ground_truth: as for `index_recall`.
        sample: as for `index_recall`.
        seed: as for `index_recall`.

    Returns:
        TuningCurve: every point that was measured.

    Raises:
        ElipsError: an argument of wrong type, shape, device or value; the index is unchanged then.

    >>> import torch
    >>> from elips_torch import IVFFlatIndex
    >>> vectors = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    >>> index = IVFFlatIndex(dim=8, nlist=16).fit(vectors)
    >>> ids = index.add(vectors)
    >>> curve = tune(index, vectors[:100], target_recall=0.9)
    >>> index.nprobe == curve.best.parameters["nprobe"]
    True
    >>> curve.best.recall >= 0.9
    True
    """
    if not isinstance(index, Index):
        raise DtypeError(f"index is a {type(index).__name__}, expected an Index")
    if isinstance(target_recall, bool) or not isinstance(target_recall, (int, float)):
        raise DtypeError(f"target_recall is {target_recall!r}, expected a number")
    if not 0.0 < target_recall <= 1.0:
        raise ArgumentError(f"target_recall is {target_recall}, expected above 0, at most 1")
    check_count("k", k)
    grids = _known_grids(index, k) if parameters is None else _check_grids(index, parameters)
    exact = ExactScores(
        index, queries, k, database=database, ground_truth=ground_truth, sample=sample, seed=seed
    )
    measured: dict[tuple[float, ...], TuningPoint] = {}

    def measure(setting: dict[str, float]) -> TuningPoint:
        key = tuple(setting.values())
        if key not in measured:
            measured[key] = _measure(index, exact, k, setting)
        return measured[key]

    with torch.no_grad():
        enough = _explore(grids, target_recall, measure, between=parameters is None)
    points = sorted(measured.values(), key=lambda point: (point.recall, point.queries_per_second))
    best = max(enough, key=lambda point: point.queries_per_second, default=None)
    curve = TuningCurve(tuple(points), target_recall, k, len(exact.queries), best)
    if best is None:
        warn_user(curve.explanation)
    else:
        for name, value in best.parameters.items():
            setattr(index, name, value)
    return curve


def _explore(
    grids: dict[str, list[float]],
    target_recall: float,
    measure: Callable[[dict[str, float]], TuningPoint],
    *,
    between: bool,
) -> list[TuningPoint]:
    """Measure settings, and return for each of the outer parameters the least that reaches the target."""
    name = next(iter(grids), None)
    if name is None:
        point = measure({})
        return [point] if point.recall >= target_recall else []
    reached = []
    for values in itertools.product(*(grids[other] for other in list(grids)[1:])):
        rest = dict(zip(list(grids)[1:], values, strict=True))
        points = []
        for value in grids[name]:
            points.append(measure({name: value, **rest}))
            if points[-1].recall == 1.0:
                break
        least = next((i for i, point in enumerate(points) if point.recall >= target_recall), None)
        if least is None:
            continue
        point = points[least]
        if between and least:
            low, high = int(points[least - 1].parameters[name]), int(point.parameters[name])
            while high - low > 1:
                middle = measure({name: (low + high) // 2, **rest})
                if middle.recall >= target_recall:
                    point, high = middle, (low + high) // 2
                else:
                    low = (low + high) // 2
        reached.append(point)
    return reached


def _measure(index: Index, exact: ExactScores, k: int, setting: dict[str, Any]) -> TuningPoint:
    recall = exact.recall(index.search(exact.queries, k, **setting).ids)
    seconds: list[float] = []
    while len(seconds) < 3 or (sum(seconds) < _ENOUGH_SECONDS and len(seconds) < _MOST_REPEATS):
        _finish(index.device)
        start = time.perf_counter()
        index.search(exact.queries, k, **setting)
        _finish(index.device)
        seconds.append(time.perf_counter() - start)
    return TuningPoint(setting, recall, len(exact.queries) / statistics.median(seconds))


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _known_grids(index: Index, k: int) -> dict[str, list[float]]:
    """Return the values to try, by parameter: those that trade recall for speed, inner ones first."""
    lists: list[Any] = [getattr(each, "nlist", None) for each in layers(index)]
    most = {
        "nprobe": next((nlist for nlist in lists if isinstance(nlist, int)), _MOST),
        "efSearch": _MOST,
        "ef_search": _MOST,
        "k_factor": max(1, min(_MOST_FACTOR, index.ntotal // k)),
    }
    return {name: _doubled(limit) for name, limit in most.items() if name in index.search_parameters}


def layers(index: Index) -> Iterator[Index]:
    """Yield an index, the one inside it, and so on."""
    layer: object = index
    while isinstance(layer, Index):
        yield layer
        layer = getattr(layer, "index", None)


def _doubled(limit: int) -> list[float]:
    return [*(2**i for i in range((limit - 1).bit_length())), limit]


def _check_grids(index: Index, parameters: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    grids = {name: sorted(set(values)) for name, values in parameters.items()}
    for name, values in grids.items():
        if name not in index.search_parameters:
            known = ", ".join(index.search_parameters)
            raise ParameterError(f"{type(index).__name__} has no search parameter {name!r}, it has {known}")
        if not values:
            raise ArgumentError(f"parameters has no value for {name!r}, expected at least one")
    return grids


def _format(parameters: dict[str, float]) -> str:
    return ", ".join(f"{name}={value:g}" for name, value in parameters.items()) or "the index as it is"
