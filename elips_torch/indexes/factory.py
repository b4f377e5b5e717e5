"""Indexes from a line of text, in faiss's grammar."""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from elips_torch.core.errors import ArgumentError, FactoryError, ParameterError
from elips_torch.core.metric import resolve_metric
from elips_torch.core.validation import check_count
from elips_torch.indexes.base import Index
from elips_torch.indexes.factory_parts import KINDS, Part, Place, parse, point_at
from elips_torch.indexes.wrappers import PreTransformIndex
from elips_torch.quantizers.transform import Transform

# What `index_factory` gives every constructor itself.
_OWN = {"dim", "dim_in", "index", "metric", "p"}
# What descriptions say, and options therefore cannot.
_WRITTEN = {name for kind in KINDS for name in re.compile(kind.pattern).groupindex}


def index_factory(
    dim: int, description: str, metric: str = "l2", *, p: float | None = None, **options: Any
) -> Index:
    """Make the index that a description stands for, empty.

    A description is ``[transforms,] [lists,] stored vectors [, refinement]`` in the grammar of
    `faiss.index_factory`:

    ========================  ===========================================================================
    ``PCA64``, ``PCAR64``     `PCA` to 64 features; with R rotated at random after, with W whitened
    ``OPQ32``, ``OPQ32_64``   `OPQ` for 32 parts; of 64 features after it
    ``RR``, ``RR64``          `RandomRotation`
    ``ITQ``, ``ITQ64``        `ITQ`
    ``L2norm``                `L2Normalize`
    ``IVF1024``               1,024 lists (``IVF1k``); without it every search sees all vectors
    ``Flat``                  vectors as they are: `FlatIndex`, `IVFFlatIndex`
    ``SQ8``, ``SQfp16``       `SQIndex`, `IVFSQIndex`; also SQ6, SQ4, SQbf16
    ``PQ32``, ``PQ32x4``      `PQIndex`, `IVFPQIndex` of 32 parts, in 8 or 4 bits each
    ``RFlat``                 `RefineIndex`; ``Refine(SQfp16)`` and ``Refine(SQbf16)`` keep half as much
    ``IDMap``, ``IDMap2``     nothing: every index has ids
    ========================  ===========================================================================

    Args:
        dim: D, size of a vector.
        description: such as ``"OPQ32,IVF1024,PQ32x4,RFlat"``; spaces around commas are ignored.
        metric: name of the distance kind, or an alias.
        p: exponent of metric "lp".
        **options: keywords of the constructors, such as ``nprobe=32``, ``device="cuda"``,
            ``k_factor=8``, ``seed=1``; each goes to all parts that take it and whose text does not say it.

    Returns:
        The index. Refinement asks for 4 times k candidates (``k_factor``), where faiss asks for k.

    Raises:
        FactoryError: the description has a mistake; the message shows where, and what could stand there.
        ParameterError: no part takes an option.
        ElipsError: an argument has a wrong type or value.

    >>> index = index_factory(64, "PCA32,IVF256,PQ16,RFlat", "cosine", nprobe=16)
    >>> type(index).__name__, type(index.index).__name__, type(index.index.index).__name__
    ('RefineIndex', 'PreTransformIndex', 'IVFPQIndex')
    >>> index.nprobe, index.k_factor
    (16, 4)
    """
    width = check_count("dim", dim)
    name = resolve_metric(metric, p).name
    parts = parse(description)
    listed = _of(Place.LISTS, parts)
    used = [(part, maker) for part in parts for maker in _makers(part, bool(listed))]
    _check_options(description, options, used)
    transforms: list[Transform] = []
    for part, maker in used:
        if part.kind.place is Place.TRANSFORM:
            transforms.append(_make(description, part, maker, options, width))
            width = transforms[-1].dim_out
    (vectors,) = _of(Place.VECTORS, parts)
    (maker,) = _makers(vectors, bool(listed))
    sized = listed[0].values if listed else {}
    index: Index = _make(description, vectors, maker, options, width, metric=name, p=p, **sized)
    for transform in reversed(transforms):
        index = PreTransformIndex(transform, index)
    for part in _of(Place.REFINEMENT, parts):
        for maker in part.kind.makers:
            index = _make(description, part, maker, options, index)
    return index


def _of(place: Place, parts: Iterable[Part]) -> list[Part]:
    return [part for part in parts if part.kind.place is place]


def _makers(part: Part, has_lists: bool) -> tuple[Callable[..., Any], ...]:
    """Return the constructors that a part stands for."""
    makers = part.kind.makers
    return (makers[has_lists],) if part.kind.place is Place.VECTORS else makers


def _make(
    description: str,
    part: Part,
    maker: Callable[..., Any],
    options: Mapping[str, Any],
    *arguments: Any,
    **sized: Any,
) -> Any:
    """Call the constructor of a part, and blame the part for what it says."""
    said = {name: value for name, value in part.values.items() if name in _keywords(maker)}
    given = {name: options[name] for name in _open(part, maker) if name in options}
    try:
        return maker(*arguments, **sized, **said, **given)
    except ArgumentError as error:
        if given:
            # An option may be what is wrong: then the constructor is right without it.
            _make(description, part, maker, {}, *arguments, **sized)
            raise
        fault = point_at(description, part.number, part.text, part.start, str(error))
        raise FactoryError(fault) from error


def _keywords(maker: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(maker).parameters) - _OWN


def _open(part: Part, maker: Callable[..., Any]) -> set[str]:
    """Return the keywords of a part's constructor that options may give."""
    return _keywords(maker) - _WRITTEN - set(part.kind.says)


def _check_options(
    description: str, options: Mapping[str, Any], used: Iterable[tuple[Part, Callable[..., Any]]]
) -> None:
    known = set().union(*(_open(part, maker) for part, maker in used))
    for name in options:
        if name not in known:
            raise ParameterError(
                f"no part of {description!r} takes the option {name!r}; they take {', '.join(sorted(known))}"
            )
