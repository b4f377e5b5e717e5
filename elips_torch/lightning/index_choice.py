"""The index that a user names for a callback: one to make, or one that is there."""

import difflib
from collections.abc import Callable
from typing import TypeAlias

import torch
from lightning.pytorch import LightningModule

from elips_torch.core.errors import ArgumentError, DtypeError
from elips_torch.core.metric import resolve_metric
from elips_torch.indexes.base import Index
from elips_torch.indexes.factory import index_factory
from elips_torch.indexes.factory_parts import parse
from elips_torch.indexes.flat import FlatIndex

# A class, a description for `index_factory`, or a function that takes D.
IndexChoice: TypeAlias = Callable[[int], Index] | str | None
# The name of a module's attribute, an index, or a function of the module.
IndexPlace: TypeAlias = str | Index | Callable[[LightningModule], Index]


def check_choice(index: IndexChoice, metric: str) -> None:
    """Check the choice of an index as far as that goes without the size of a vector.

    Raises:
        DtypeError: neither a class, a description nor a function.
        FactoryError: the description has a mistake.
        MetricError: the metric is unknown.
    """
    resolve_metric(metric)
    if isinstance(index, str):
        parse(index)
    if isinstance(index, Index) or not (index is None or isinstance(index, str) or callable(index)):
        raise DtypeError(
            f"index is a {type(index).__name__}, expected a class, a description such as 'IVF256,Flat', or a "
            "callable that makes an empty index, such as lambda dim: FlatIndex(dim)"
        )


def make_index(choice: IndexChoice, dim: int, metric: str, device: torch.device) -> Index:
    """Return the empty index that a choice stands for.

    Args:
        choice: a class, which is called with D and the metric; a description for `index_factory`; a
            function, which is called with D and decides about the metric itself; None is `FlatIndex`.
        dim: D, size of a vector.
        metric: name of the distance kind.
        device: where the index is to lie.

    Raises:
        DtypeError: the function returned something else, or the class takes more than that.

    >>> make_index("PCA2,Flat", 4, "cosine", torch.device("cpu")).metric
    'cosine'
    """
    index: object
    if choice is None:
        index = FlatIndex(dim, metric)
    elif isinstance(choice, str):
        index = index_factory(dim, choice, metric)
    elif isinstance(choice, type):
        try:
            index = choice(dim, metric=metric)
        except TypeError as error:
            raise DtypeError(
                f"{choice.__name__} takes more than dim and metric ({error}): give a description such as "
                f"'IVF256,Flat', or a function such as lambda dim: {choice.__name__}(dim, ...)"
            ) from error
    else:
        index = choice(dim)
    if not isinstance(index, Index):
        raise DtypeError(f"index made a {type(index).__name__}, expected an Index")
    return index.to(device)


def check_place(place: IndexPlace) -> None:
    """Check that a place is a name, an index or a function, as far as that goes without the module.

    Raises:
        ElipsError: it is something else.
    """
    if isinstance(place, str) and ("," in place or not all(map(str.strip, place.split(".")))):
        raise ArgumentError(
            f"index is {place!r}, expected the name of the module's attribute, such as 'index', where the "
            "module has made it: self.index = index_factory(dim, description)"
        )
    if not isinstance(place, (str, Index)) and not callable(place):
        raise DtypeError(f"index is a {type(place).__name__}, expected a name, an index or a function")


def name_of(place: IndexPlace) -> str:
    """Return what a place is called, "" if it has no name that lasts from run to run."""
    return place if isinstance(place, str) else ""


def index_at(place: IndexPlace, pl_module: LightningModule) -> Index:
    """Return the index that a place stands for.

    Args:
        place: the name of the module's attribute, such as "index" or "memory.index"; the index itself; or a
            function of the module.
        pl_module: the module.

    Raises:
        ArgumentError: there is none.
    """
    index: object = pl_module
    if isinstance(place, Index):
        index = place
    elif isinstance(place, str):
        for part in place.split("."):
            if not hasattr(index, part):
                raise ArgumentError(_nothing_at(place, part, pl_module))
            index = getattr(index, part)
    else:
        index = place(pl_module)
    if not isinstance(index, Index):
        raise ArgumentError(
            f"index is {place!r}, which in {type(pl_module).__name__} is a {type(index).__name__}, "
            "expected an Index"
        )
    return index


def _nothing_at(place: str, part: str, pl_module: LightningModule) -> str:
    """Return the message for a name that stands for nothing."""
    indexes = [name for name, each in pl_module.named_modules() if name and isinstance(each, Index)]
    near = difflib.get_close_matches(place, indexes)
    if near:
        known = f"did you mean {' or '.join(map(repr, near))}?"
    elif indexes:
        known = f"its indexes are {', '.join(map(repr, indexes))}"
    else:
        known = "it holds no index: make one there, as in self.index = FlatIndex(dim)"
    return f"index is {place!r}, and {type(pl_module).__name__} has no attribute {part!r}; {known}"
