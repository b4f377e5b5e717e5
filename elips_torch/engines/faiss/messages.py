"""What faiss says when it does not do something."""

import re

# How its messages begin: with the function, and with the place in its sources.
_WHERE = re.compile(r"^Error in .*? at \S+:\d+: (?:Error: )?", re.DOTALL)


def reason_of(error: BaseException) -> str:
    """Return why, without where in faiss's sources it says so; the kind of error where it says nothing."""
    return _WHERE.sub("", str(error).strip()) or type(error).__name__
