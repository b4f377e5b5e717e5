"""The parts that a description of an index consists of, and reading one into them."""

import dataclasses
import enum
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from elips_torch.core.errors import DtypeError, FactoryError
from elips_torch.indexes.flat import FlatIndex
from elips_torch.indexes.ivf_flat import IVFFlatIndex
from elips_torch.indexes.ivf_pq import IVFPQIndex
from elips_torch.indexes.ivf_sq import IVFSQIndex
from elips_torch.indexes.pq import PQIndex
from elips_torch.indexes.refine import RefineIndex
from elips_torch.indexes.sq import SQIndex
from elips_torch.quantizers.itq import ITQ
from elips_torch.quantizers.opq import OPQ
from elips_torch.quantizers.pca import PCA
from elips_torch.quantizers.transforms import L2Normalize, RandomRotation


class Place(enum.Enum):
    """What a part is, in words for messages."""

    TRANSFORM = "transform"
    LISTS = "lists"
    VECTORS = "stored vectors"
    REFINEMENT = "refinement"
    IDS = "ids"


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of part.

    Attributes:
        example: how it is written, for messages.
        place: what it is.
        pattern: what its text matches; groups are named after keywords of the constructors.
        makers: what it stands for. Transforms: one after another. Stored vectors: the index without lists,
            and that with them. Refinement: the index around the others.
        says: further keywords of the constructors.
    """

    example: str
    place: Place
    pattern: str
    makers: tuple[Callable[..., Any], ...] = ()
    says: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a description.

    Attributes:
        kind: its kind.
        text: as it is written.
        number: which part it is, from 1.
        start: where in the description it begins, in characters.
        values: what it says, by keyword of the constructors.
    """

    kind: Kind
    text: str
    number: int
    start: int
    values: Mapping[str, Any]


_N = r"0*[1-9]\d*"
# A new family is a line here.
KINDS: tuple[Kind, ...] = (
    Kind("PCA64", Place.TRANSFORM, rf"PCA(?P<dim_out>{_N})", (PCA,)),
    Kind("PCAR64", Place.TRANSFORM, rf"PCAR(?P<dim_out>{_N})", (PCA, RandomRotation)),
    Kind("PCAW64", Place.TRANSFORM, rf"PCAW(?P<dim_out>{_N})", (PCA,), {"whiten": True}),
    Kind("PCAWR64", Place.TRANSFORM, rf"PCAWR(?P<dim_out>{_N})", (PCA, RandomRotation), {"whiten": True}),
    Kind("OPQ32 or OPQ32_64", Place.TRANSFORM, rf"OPQ(?P<m>{_N})(?:_(?P<dim_out>{_N}))?", (OPQ,)),
    Kind("RR64", Place.TRANSFORM, rf"RR(?P<dim_out>{_N})?", (RandomRotation,)),
    Kind("ITQ64", Place.TRANSFORM, rf"ITQ(?P<dim_out>{_N})?", (ITQ,)),
    Kind("L2norm", Place.TRANSFORM, "L2norm", (L2Normalize,)),
    Kind("IVF1024", Place.LISTS, rf"IVF(?P<nlist>{_N}[kM]?)"),
    Kind("Flat", Place.VECTORS, "Flat", (FlatIndex, IVFFlatIndex)),
    Kind(
        "SQ8, SQ6, SQ4, SQfp16, SQbf16", Place.VECTORS, r"SQ(?P<qtype>8|6|4|fp16|bf16)", (SQIndex, IVFSQIndex)
    ),
    Kind(
        "PQ32 or PQ32x4", Place.VECTORS, rf"PQ(?P<m>{_N})(?:x(?P<nbits>{_N}))?(?:np)?", (PQIndex, IVFPQIndex)
    ),
    Kind("RFlat", Place.REFINEMENT, r"RFlat|Refine\(Flat\)", (RefineIndex,), {"dtype": torch.float32}),
    Kind("Refine(SQfp16)", Place.REFINEMENT, r"Refine\(SQfp16\)", (RefineIndex,), {"dtype": torch.float16}),
    Kind("Refine(SQbf16)", Place.REFINEMENT, r"Refine\(SQbf16\)", (RefineIndex,), {"dtype": torch.bfloat16}),
    Kind("IDMap or IDMap2", Place.IDS, "IDMap2?"),
)
_OFFER = "FaissIndex.from_factory(dim, description) makes an index of faiss"
# What faiss has beyond that, and what to do about it.
_ABSENT: tuple[tuple[str, str], ...] = (
    (
        r"PQ\d+x\d+fs\w*",
        f"faiss' fast-scan layout is not here; without 'fs' the codes take as many bits, and {_OFFER}",
    ),
    (r"PQ\d+\+\d+", "residuals of codes are not coded again here; RFlat refines by the originals"),
    (r"IVF\d+[kM]?(_|\().*", "the centroids are searched exactly; pass coarse= for another way"),
    (r"Refine\(.*\)?", "originals are kept as numbers, in float32, float16 or bfloat16"),
    (r"SQ.*", "there are codes of 8, 6 and 4 bits with a range for each feature, and of 16 bits"),
    (r"(HNSW|NSG).*", f"there are no graph indexes here; {_OFFER}"),
    (
        r"(IMI|LSH|RQ|LSQ|PRQ|PLSQ|RCQ|RaBitQ|Residual|Pad|ZnLattice|Hamming).*",
        f"faiss has it, this library does not; {_OFFER}",
    ),
)

_FIRST = (Place.TRANSFORM, Place.LISTS, Place.VECTORS, Place.IDS)
_LAST = (Place.REFINEMENT, Place.IDS)
# What may follow; None is the beginning.
_FOLLOWS: dict[Place | None, tuple[Place, ...]] = {
    None: _FIRST,
    Place.TRANSFORM: _FIRST,
    Place.LISTS: (Place.VECTORS,),
    Place.VECTORS: _LAST,
    Place.REFINEMENT: _LAST,
}
_THOUSANDS = {"k": 2**10, "M": 2**20}


def parse(description: str) -> list[Part]:
    """Read a description of an index.

    Args:
        description: parts with commas between them, in faiss's grammar.

    Returns:
        The parts; among them one of stored vectors.

    Raises:
        FactoryError: a part means nothing, or cannot stand where it does.
        DtypeError: the description is no string.
    """
    if not isinstance(description, str):
        raise DtypeError(f"description is {description!r}, expected a string such as 'IVF1024,Flat'")
    parts: list[Part] = []
    allowed = _FOLLOWS[None]
    start, complete = 0, False
    for number, piece in enumerate(description.split(","), 1):
        text = piece.strip()
        at = start + len(piece) - len(piece.lstrip())
        part = _read(text, number, at if text else start)
        if part is None or part.kind.place not in allowed:
            raise FactoryError(_complaint(description, text, number, at if text else start, part, allowed))
        parts.append(part)
        complete = complete or part.kind.place is Place.VECTORS
        # Ids change nothing, nor what may stand beside them.
        allowed = _FOLLOWS.get(part.kind.place, allowed)
        start += len(piece) + 1
    if not complete:
        raise FactoryError(_complaint(description, "", len(parts) + 1, len(description), None, allowed))
    return parts


def point_at(description: str, number: int, text: str, start: int, fault: str) -> str:
    """Return a message about a part of a description, with a line that shows where it is."""
    what = f"part {number}, {text!r}" if text else f"part {number}"
    marks = " " * start + "^" * max(1, len(text))
    return f"description {description!r}, {what}: {fault}\n    {description}\n    {marks}"


def _read(text: str, number: int, start: int) -> Part | None:
    for kind in KINDS:
        match = re.fullmatch(kind.pattern, text, re.ASCII)
        if match is not None:
            said = {name: _value(name, word) for name, word in match.groupdict().items() if word is not None}
            return Part(kind, text, number, start, {**kind.says, **said})
    return None


def _value(name: str, word: str) -> int | str:
    if name == "qtype":
        return f"int{word}" if word.isdecimal() else word
    return int(word.rstrip("kM")) * _THOUSANDS.get(word[-1], 1)


def _complaint(
    description: str, text: str, number: int, start: int, part: Part | None, allowed: tuple[Place, ...]
) -> str:
    """Return what is wrong with a part, and what could stand there."""
    possible = "; ".join(
        f"{place.value} ({', '.join(kind.example for kind in KINDS if kind.place is place)})"
        for place in allowed
    )
    expected = f"expected {possible}"
    if not text:
        found = "nothing stands there"
    elif part is not None:
        found = f"{part.kind.place.value} cannot stand there"
    else:
        reasons = (reason for pattern, reason in _ABSENT if re.fullmatch(pattern, text))
        found = next(reasons, "no such part")
    if Place.VECTORS not in allowed and Place.LISTS not in allowed:
        expected += "; or the end"
    return point_at(description, number, text, start, f"{found}; {expected}")
