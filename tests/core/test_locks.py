"""Locks that a forked process finds free."""

import copy
import os
import threading

import pytest

from elips_torch.core.locks import ForkSafeLock


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("make", [threading.Lock, threading.RLock])
def test_a_lock_that_another_thread_holds_is_free_in_a_forked_process(make):
    lock, held, done = ForkSafeLock(make), threading.Event(), threading.Event()

    def hold():
        with lock:
            held.set()
            done.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    child = os.fork()
    if not child:
        # Waiting here would be for ever.
        is_free = lock.acquire(blocking=False)
        os._exit(0 if is_free else 1)
    try:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert not lock.acquire(blocking=False)
    finally:
        done.set()
        holder.join()
    assert lock.acquire(blocking=False)
    lock.release()


def test_it_excludes():
    lock, inside, most = ForkSafeLock(), 0, 0

    def work():
        nonlocal inside, most
        for _ in range(200):
            with lock:
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_it_is_let_go_after_an_error():
    lock = ForkSafeLock()
    with pytest.raises(ValueError, match="inside"), lock:
        raise ValueError("inside")
    assert lock.acquire(blocking=False)
    with pytest.raises(TypeError):
        copy.deepcopy(lock)
