import itertools

import pytest
import torch

from elips_torch.cli import timing
from elips_torch.cli.contenders import Contender
from elips_torch.cli.timing import clock_for, measure


class Recorder(Contender):
    """Writes into a list when it runs; how long that takes is what its variant says."""

    def __init__(self, name, log, durations=(0.5,)):
        super().__init__(name)
        self.log, self.durations = log, durations
        self.seconds = durations[0]

    def variants(self, n_queries, k):
        return self.durations

    def use(self, variant):
        self.seconds, self.setting = variant, f"{variant} s"

    def search(self, n_queries, k):
        self.log.append(self.name)
        return torch.tensor([[n_queries, k, len(self.log)]])


def clock(call):
    # Whatever the machine does, the call takes what its contender says.
    return call.func.__self__.seconds, call()


def test_rounds_rotate_after_a_warm_up_of_everyone():
    log = []
    contenders = [Recorder(name, log) for name in "abc"]
    timings = measure(contenders, 4, 2, repeats=4, seconds=100.0, clock=clock)
    warm, rounds = "".join(log[:-12]), "".join(log[-12:])
    assert warm == "aabbcc"
    assert rounds == "abc" + "bca" + "cab" + "abc"
    assert {len(each.seconds) for each in timings.values()} == {4}
    assert timings["a"].ids[0, :2].tolist() == [4, 2]


def test_the_fastest_variant_is_measured():
    log = []
    timings = measure(
        [Recorder("a", log, durations=(0.9, 0.3, 0.6))], 1, 1, repeats=2, seconds=100.0, clock=clock
    )
    assert timings["a"].seconds == [0.3, 0.3]
    assert timings["a"].first_call_seconds == 0.9
    assert timings["a"].setting == "0.3 s"


def test_a_short_search_runs_untimed_for_a_while_before_each_round(monkeypatch):
    # Every look at the time finds 20 ms gone.
    ticks = itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: 0.02 * next(ticks))
    log, clocked = [], []

    def clock(call):
        clocked.append(len(log))
        return (0.004, 0.001, 0.002)[len(clocked) % 3], call()

    timings = measure([Recorder("a", log)], 1, 1, repeats=3, seconds=100.0, clock=clock)
    warm = 2 + timing._TRIES
    turn = 2 + timing._FEW
    assert len(log) == warm + 3 * turn
    assert clocked[warm : warm + timing._FEW] == [warm + 2, warm + 3, warm + 4]
    assert timings["a"].seconds == [0.002] * 3


def test_the_time_limit_leaves_one_round(monkeypatch):
    ticks = itertools.count(0, 10)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(ticks))
    log = []
    timings = measure(
        [Recorder("a", log, durations=(0.5, 0.1)), Recorder("b", log)],
        1,
        1,
        repeats=5,
        seconds=1.0,
        clock=clock,
    )
    assert [len(each.seconds) for each in timings.values()] == [1, 1]
    assert timings["a"].setting == "0.5 s"


def test_the_clock_of_a_cpu_measures_and_passes_the_result_on():
    seconds, result = clock_for(torch.device("cpu"))(lambda: torch.zeros(3))
    assert 0 <= seconds < 1
    assert torch.equal(result, torch.zeros(3))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_clock_of_a_gpu_waits_for_the_work():
    matrix = torch.randn(4096, 4096, device="cuda")
    time_on_gpu = clock_for(matrix.device)
    time_on_gpu(lambda: matrix @ matrix)
    one, _ = time_on_gpu(lambda: matrix @ matrix)

    def ten():
        for _ in range(10):
            result = matrix @ matrix
        return result

    many, _ = time_on_gpu(ten)
    assert many > 5 * one
