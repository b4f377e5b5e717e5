"""Threads share the work of a call in C++, each part once, whoever else calls and forks."""

import ctypes
import shutil
import subprocess
import sys
import threading
import time
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

// The first number is done at once, the others take a while.
extern "C" void wait_for_others() {
    Team::run(2, [](int i) { if (i) usleep(20000); });
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


def test_openmp_is_not_waited_for_after_a_long_wait(code):
    code.rest(False)
    # The scheduler may have kept the threads waiting before.
    for _ in range(50):
        numbers(code, 2, work=10**5)
        if code.spins():
            break
        time.sleep(0.5)
    assert code.spins()
    code.wait_for_others()
    assert not code.spins()
    time.sleep(0.5)
    assert code.spins()


FORKING = """
import os, sys, threading, warnings
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_team
library = test_team.compiled(Path(sys.argv[2]))
warnings.simplefilter("ignore", DeprecationWarning)
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
        assert not library.spins()
        right = (test_team.numbers(library, n, work=1000)[0] == [1] * n for n in [*range(1, 6)] * 20)
        os._exit(0 if all(right) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
is_over = True
"""


def test_a_process_forked_while_others_call_makes_its_own_threads(tmp_path):
    command = [sys.executable, "-c", FORKING, str(Path(__file__).parent), str(tmp_path)]
    subprocess.run(command, timeout=120, check=True)
