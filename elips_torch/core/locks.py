"""Locks that a forked process finds free."""

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any


class ForkSafeLock:
    """A lock that is free in a forked process, whichever thread held it in the parent.

    Threads do not survive a fork: the worker of a data loader would wait for one that does not exist.

    Args:
        make: `threading.Lock`, or `threading.RLock` for one that a thread may take several times.

    >>> lock = ForkSafeLock()
    >>> with lock:
    ...     pass
    """

    def __init__(self, make: Callable[[], Any] = threading.Lock) -> None:
        self._make = make
        self.renew()
        _locks.add(self)

    def renew(self) -> None:
        """Forget who holds it."""
        self._lock = self._make()

    def acquire(self, blocking: bool = True) -> bool:
        """Take the lock, or return False where another thread has it and nobody waits."""
        return bool(self._lock.acquire(blocking=blocking))

    def release(self) -> None:
        """Let others have the lock."""
        self._lock.release()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


_locks: "weakref.WeakSet[ForkSafeLock]" = weakref.WeakSet()


def _renew_all() -> None:
    for lock in list(_locks):
        lock.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
