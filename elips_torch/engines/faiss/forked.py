"""One thread for faiss in forked processes, where more than one hangs."""

import threading

from elips_torch.core.compilation import was_forked
from elips_torch.engines.faiss.builds import FaissBuild, set_threads

# OpenMP keeps the number of threads for each thread that calls it.
_told = threading.local()


def use_one_thread_if_forked(build: FaissBuild) -> None:
    """Set a build to one thread where this process was forked, as the workers of a DataLoader are.

    OpenMP's threads do not survive a fork, and whoever waits for them waits for ever.
    """
    if was_forked() and build not in _told.__dict__.setdefault("builds", set()):
        set_threads(build, 1)
        _told.builds.add(build)
