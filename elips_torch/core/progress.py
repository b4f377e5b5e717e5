"""Progress bars, for whoever asks for one."""

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def with_progress(items: Iterable[T], show: bool, what: str, unit: str) -> Iterable[T]:
    """Return the items, counted by a progress bar while they are taken if wanted.

    Args:
        items: what is counted; its length, where it has one, is the goal.
        show: whether there is a bar.
        what: what goes on, written before the bar.
        unit: what one item is.

    Raises:
        ImportError: a bar is wanted and tqdm is not installed.
    """
    if not show:
        return items
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ImportError("progress=True needs tqdm: pip install tqdm") from error
    bar: Iterable[T] = tqdm(items, desc=what, unit=unit)
    return bar
