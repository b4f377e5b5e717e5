"""Timing contenders against each other: warm first, then interleaved rounds in rotating order.

Each library brings threads of its own, which keep spinning for a while after a call. A pause before
each turn lets those of the others fall asleep. Short searches then run untimed for a while, as in a loop
that calls nothing else: the first ones pay for waking threads, for clocks that rise and for caches that
others have filled, torch's own product most of all.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from elips_torch.cli.contenders import Contender

_PAUSE = 0.03
# Below this many seconds, how a turn begins matters and repeating costs little; then a search runs untimed
# for so long, and its time is the median of a few.
_SHORT, _SETTLING, _FEW = 0.1, 0.06, 3
_TRIES = 3

Clock = Callable[[Callable[[], Tensor]], tuple[float, Tensor]]


@dataclasses.dataclass(frozen=True)
class Timing:
    """How long one contender took for one search.

    Attributes:
        seconds: one number per round.
        first_call_seconds: the very first call of this shape, compilation and caches included.
        setting: the variant that ran, chosen as the fastest before the rounds.
        ids: ``(Q, K)`` what the last round found.
    """

    seconds: list[float]
    first_call_seconds: float
    setting: str
    ids: Tensor = dataclasses.field(repr=False)

    @property
    def median(self) -> float:
        """Median of the rounds, in seconds."""
        return statistics.median(self.seconds)

    def quantile(self, fraction: float) -> float:
        """Return a quantile of the rounds, in seconds, between neighbours linearly."""
        return float(torch.tensor(self.seconds, dtype=torch.float64).quantile(fraction))


def clock_for(device: torch.device) -> Clock:
    """Return a function that runs a call and says how many seconds it took on the device."""
    return _time_on_gpu if device.type == "cuda" else _time_on_cpu


def _time_on_cpu(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def _time_on_gpu(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    result = call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1e3, result


def measure(
    contenders: Sequence[Contender],
    n_queries: int,
    k: int,
    *,
    repeats: int,
    seconds: float,
    clock: Clock,
) -> dict[str, Timing]:
    """Time every contender on one search.

    Args:
        contenders: with different names.
        n_queries: Q.
        k: number of neighbours.
        repeats: rounds; in each one every contender runs once, and each round begins with another one.
        seconds: after about this long no further variant is tried and no further round begun; each
            contender runs at least once to warm up and once to be measured.
        clock: times one call.

    Returns:
        A timing per name.
    """
    begin = time.perf_counter()
    first = {each.name: _warm_up(each, n_queries, k, begin + seconds / 2, clock) for each in contenders}
    taken: dict[str, list[float]] = {each.name: [] for each in contenders}
    ids: dict[str, Tensor] = {}
    for turn in range(repeats):
        if turn and time.perf_counter() - begin > seconds:
            break
        shift = turn % len(contenders)
        for each in [*contenders[shift:], *contenders[:shift]]:
            call = functools.partial(each.search, n_queries, k)
            time.sleep(_PAUSE)
            duration, ids[each.name] = _take_turn(call, clock, first[each.name].usual < _SHORT)
            taken[each.name].append(duration)
    return {
        each.name: Timing(taken[each.name], first[each.name].first, each.setting, ids[each.name])
        for each in contenders
    }


def _take_turn(call: Callable[[], Tensor], clock: Clock, is_short: bool) -> tuple[float, Tensor]:
    """Return the seconds that a call takes, and what it returns."""
    if not is_short:
        return clock(call)
    until = time.perf_counter() + _SETTLING
    while time.perf_counter() < until:
        call()
    results = [clock(call) for _ in range(_FEW)]
    return statistics.median(duration for duration, _ in results), results[-1][1]


class _WarmUp(NamedTuple):
    """Seconds of the first call, and of a later one with the fastest variant."""

    first: float
    usual: float


def _warm_up(contender: Contender, n_queries: int, k: int, until: float, clock: Clock) -> _WarmUp:
    """Let a contender run, and settle on the fastest of its variants."""
    call = functools.partial(contender.search, n_queries, k)
    variants = contender.variants(n_queries, k)
    contender.use(variants[0])
    time.sleep(_PAUSE)
    first, _ = clock(call)
    usual, best = _usual_seconds(call, clock), variants[0]
    for variant in variants[1:]:
        if time.perf_counter() > until:
            break
        contender.use(variant)
        duration = _usual_seconds(call, clock)
        if duration < usual:
            usual, best = duration, variant
    contender.use(best)
    return _WarmUp(first, usual)


def _usual_seconds(call: Callable[[], Tensor], clock: Clock) -> float:
    """Return the time of one call, or the best of a few where that costs nothing."""
    best, _ = clock(call)
    for _ in range(_TRIES if best < _SHORT else 0):
        best = min(best, clock(call)[0])
    return best
