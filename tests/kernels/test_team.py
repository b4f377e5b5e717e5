"""Threads share the work of a call in C++, each part once, whoever else calls and forks."""

import ctypes
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import elips_torch.kernels
from elips_torch.core.hardware import device_facts
from elips_torch.core.native import NativeLibrary, instruction_options, native_reasons

HERE = native_reasons(device_facts("cpu"))
OPTIONS = instruction_options(device_facts("cpu"))
pytestmark = pytest.mark.skipif(bool(HERE), reason="; ".join(HERE))
CODE = """
#include <immintrin.h>
#include <omp.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <new>
// To choose which threads there are.
#define private public
#include "team.h"

extern "C" bool spins() { return Team::team().spins(); }
extern "C" void rest(bool forever) { Team::team().paused_until_ = forever ? INT64_MAX : 0; }

// A call of which the last thread came, the first was done and all were after so many microseconds.
extern "C" void judge(long latest, long done, long end) {
    const auto begin = Team::Clock::now();
    const auto at = [&](long us) { return begin + std::chrono::microseconds(us); };
    Team::team().judge(begin, at(latest), at(done), at(end));
}
extern "C" long pause_us() {
    const auto now = Team::Clock::now().time_since_epoch();
    const Team::Clock::duration left = Team::Clock::duration(Team::team().paused_until_) - now;
    return std::chrono::duration_cast<std::chrono::microseconds>(left).count();
}

// How often each of n numbers is called, and by which thread.
extern "C" void numbers(int n, int work, int* calls, long* threads) {
    Team::run(n, [&](int i) {
        for (volatile int j = 0; j < work; j = j + 1) {}
        __atomic_fetch_add(calls + i, 1, __ATOMIC_RELAXED);
        threads[i] = syscall(SYS_gettid);
    });
}

// How often each of n numbers is dealt out.
extern "C" void pieces(int n_threads, long n, long size, int* dealt) {
    Pieces pieces(n, size);
    Team::run(n_threads, [&](int) {
        if (!pieces.are_left()) return;
        for (int64_t i, last; pieces.take(i, last);)
            for (; i < last; ++i) __atomic_fetch_add(dealt + i, 1, __ATOMIC_RELAXED);
    });
}
"""


def compiled(folder):
    source = Path(elips_torch.kernels.__file__).parent / "native" / "team.h"
    shutil.copy(source, folder)
    (folder / "main.cpp").write_text(CODE)
    library = NativeLibrary(folder / "main.cpp").load(OPTIONS)
    library.spins.restype = ctypes.c_bool
    library.rest.argtypes = [ctypes.c_bool]
    library.pause_us.restype = ctypes.c_long
    return library


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("code"))


@pytest.fixture(params=[False, True], ids=["openmp", "own"])
def library(code, request):
    """The code with OpenMP's threads, and with its own."""
    code.rest(request.param)
    yield code
    code.rest(False)


def numbers(library, n, work=0):
    calls, threads = (ctypes.c_int * n)(), (ctypes.c_long * n)()
    library.numbers(n, work, calls, threads)
    return list(calls), list(threads)


def test_each_number_is_called_once_and_the_first_by_the_caller(library):
    for n in [*range(1, 20)] * 50:
        calls, threads = numbers(library, n)
        assert calls == [1] * n
        assert threads[0] == threading.get_native_id()


def test_others_help_where_there_is_work(library):
    several = [len(set(numbers(library, 4, work=10**6)[1])) > 1 for _ in range(20)]
    assert any(several)


@pytest.mark.parametrize(("n", "size"), [(0, 1), (1, 0), (7, 3), (1000, 1), (1000, 64), (5, 99)])
def test_pieces_are_dealt_out_once(library, n, size):
    for n_threads in (1, 2, 5):
        dealt = (ctypes.c_int * max(n, 1))()
        library.pieces(n_threads, ctypes.c_long(n), ctypes.c_long(size), dealt)
        assert list(dealt)[:n] == [1] * n


def test_several_callers_get_what_is_theirs(library):
    wrong = []

    def call(seed):
        for i in range(300):
            n = 1 + (7 * i + seed) % 9
            calls, threads = numbers(library, n, work=100 * (i % 5))
            if calls != [1] * n or threads[0] != threading.get_native_id():
                wrong.append((seed, i))

    callers = [threading.Thread(target=call, args=(seed,)) for seed in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def test_openmp_is_not_waited_for_after_a_thread_came_late(code):
    code.rest(False)
    # Uneven work, a short wait, and one that is short beside the work.
    for times in ((10, 100, 9000), (300, 100, 290), (300, 9000, 9500)):
        code.judge(*map(ctypes.c_long, times))
        assert code.pause_us() < 0
    lengths = []
    for _ in range(6):
        code.judge(*map(ctypes.c_long, (3000, 100, 5000)))
        lengths.append(code.pause_us() / 1000)
    # Longer each time, up to 400 ms; the call ends in 5.
    for length, wanted in zip(lengths, (25, 50, 100, 200, 400, 400), strict=True):
        assert wanted - 20 < length <= wanted + 5
    code.judge(*map(ctypes.c_long, (10, 100, 200)))
    code.judge(*map(ctypes.c_long, (3000, 100, 5000)))
    assert code.pause_us() <= 30_000
    code.rest(False)


FORKING = """
import os, sys, threading, warnings
import torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_team
library = test_team.compiled(Path(sys.argv[2]))
warnings.simplefilter("ignore", DeprecationWarning)
def check():
    assert not library.spins()
    right = (test_team.numbers(library, n, work=1000)[0] == [1] * n for n in [*range(1, 6)] * 20)
    os._exit(0 if all(right) else 1)
# Also where OpenMP's threads are there, and this code has not called them.
torch.set_num_threads(2)
torch.rand(10**7).sum()
child = os.fork()
if not child:
    check()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
is_over = False
def call():
    while not is_over:
        test_team.numbers(library, 3, work=1000)
callers = [threading.Thread(target=call) for _ in range(2)]
for caller in callers:
    caller.start()
for _ in range(20):
    child = os.fork()
    if not child:
        check()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
is_over = True
"""


def test_a_process_forked_while_others_call_makes_its_own_threads(tmp_path):
    command = [sys.executable, "-c", FORKING, str(Path(__file__).parent), str(tmp_path)]
    subprocess.run(command, timeout=120, check=True)
