"""Warnings at the line of the program that called into this library."""

import inspect
import warnings

_OWN = ("elips_torch", "torch")


def warn_user(message: str) -> None:
    """Warn with a `UserWarning` at the last line that was called which is neither this library's nor torch's.

    A fixed ``stacklevel`` would point into the library: what is called from outside is often called from
    within as well, and through wrappers.
    """
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _OWN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)
