"""What faiss says when it does not do something."""

import os
import re

# How its messages begin: with the function, and with the place in its sources.
_WHERE = re.compile(r"^Error in .*? at \S+:\d+: (?:Error: )?", re.DOTALL)
# What it adds to it of the machine where a file ends too early.
_TOO_SHORT = re.compile(r"read error in .*: (\d+) != (\d+) \([^()]*\)$", re.DOTALL)


def reason_of(error: BaseException) -> str:
    """Return why, without where in faiss's sources it says so; the kind of error where it says nothing."""
    text = _WHERE.sub("", str(error).strip())
    text = _TOO_SHORT.sub(r"it ends after \1 of the \2 numbers that should follow", text)
    return text or type(error).__name__


def expected_instead_of(given: object) -> str:
    """Return what was expected where no index of faiss was given."""
    is_path = isinstance(given, str | os.PathLike)
    return "an index of faiss" + ("; read_faiss and FaissIndex.read read files" if is_path else "")
