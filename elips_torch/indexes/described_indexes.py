"""From an index to a description of what faiss has for it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from elips_torch.core.errors import ArgumentError, ConversionError
from elips_torch.engines.faiss.descriptions import (
    BitsDescription,
    CodedDescription,
    CodeDescription,
    Description,
    FlatDescription,
    IDMapDescription,
    IVFDescription,
    NormalizationDescription,
    PreTransformDescription,
    ProductDescription,
    RefineDescription,
    ScalarDescription,
)
from elips_torch.indexes.base import Index
from elips_torch.indexes.coded import CodedIndex
from elips_torch.indexes.described_transforms import describe_transform
from elips_torch.indexes.flat import FlatIndex
from elips_torch.indexes.ivf_coded import IVFCodedIndex
from elips_torch.indexes.ivf_flat import IVFFlatIndex
from elips_torch.indexes.refine import RefineIndex
from elips_torch.indexes.unit_length import normalized
from elips_torch.indexes.wrappers import PreTransformIndex
from elips_torch.quantizers.bits import pack_bits
from elips_torch.quantizers.product import ProductQuantizer
from elips_torch.quantizers.quantizer import Quantizer
from elips_torch.quantizers.scalar import ScalarQuantizer

_SHORT = {torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclasses.dataclass(frozen=True)
class DescriptionOptions:
    """What an index does not say of its counterpart.

    Attributes:
        precomputed_tables: as for `IVFDescription`.
    """

    precomputed_tables: bool | None = None


def describe_index(index: Index, labels: Tensor | None, options: DescriptionOptions) -> Description:
    """Describe an index.

    Args:
        index: any index.
        labels: ``(N,)`` int64, under which its rows are to be found; None for their numbers.
        options: what the index does not say.

    Raises:
        ConversionError: it, or one inside it, has no counterpart in faiss.
    """
    for kind, describe in _DESCRIBERS:
        if isinstance(index, kind):
            return describe(index, labels, options)
    raise ConversionError(f"{type(index).__name__} has no counterpart in faiss")


def describe_bits(index: Index) -> Description:
    """Describe an index of zeros and ones as one of bits, under its ids.

    Raises:
        ConversionError: it is none.
    """
    if not isinstance(index, FlatIndex):
        raise ConversionError(f"{type(index).__name__} holds no bits, binary=True is for a FlatIndex")
    if index.metric != "l2":
        raise ConversionError(
            f"faiss compares bits by their Hamming distance, which is 'l2', not {index.metric!r}"
        )
    try:
        codes = pack_bits(index.vectors.detach())
    except ArgumentError as error:
        raise ConversionError(f"binary=True is for vectors of bits: {error}") from error
    return _labelled(BitsDescription(codes.cpu()), index.ids)


def _labelled(description: Description, labels: Tensor | None) -> Description:
    """Put labels in front of an index that numbers its rows, unless they are the numbers."""
    if labels is None or torch.equal(labels, torch.arange(len(labels), device=labels.device)):
        return description
    return IDMapDescription(description, labels.cpu())


def _flat(index: Any, labels: Tensor | None, options: DescriptionOptions) -> Description:
    vectors = index.vectors.detach()
    if index.metric == "cosine":
        inner = _labelled(FlatDescription("ip", None, normalized(vectors).cpu()), labels)
        return PreTransformDescription((NormalizationDescription(index.dim),), inner)
    return _labelled(FlatDescription(index.metric, index.p, vectors.float().cpu()), labels)


def _coded(index: Any, labels: Tensor | None, options: DescriptionOptions) -> Description:
    _check_not_cosine(index)
    description = CodedDescription(index.metric, _quantizer(index.quantizer), index.codes.cpu())
    return _labelled(description, labels)


def _check_not_cosine(index: Index) -> None:
    if index.metric == "cosine":
        raise ConversionError(
            f"faiss has no cosine of decoded vectors, which {type(index).__name__} computes; "
            "PreTransformIndex(L2Normalize(dim), index) under 'ip' is what it has"
        )


def _quantizer(quantizer: Quantizer) -> CodeDescription:
    trained = quantizer.is_trained
    if isinstance(quantizer, ProductQuantizer):
        codebooks = quantizer.codebooks.cpu() if trained else None
        return ProductDescription(quantizer.dim, quantizer.m, quantizer.nbits, codebooks)
    if isinstance(quantizer, ScalarQuantizer):
        if not trained or not quantizer.minimum.numel():
            return ScalarDescription(quantizer.dim, quantizer.qtype, None, None)
        ranges = quantizer.minimum.cpu(), quantizer.extent.cpu()
        return ScalarDescription(quantizer.dim, quantizer.qtype, *ranges)
    raise ConversionError(f"{type(quantizer).__name__} has no counterpart in faiss")


def _inverted_file(index: Any, labels: Tensor | None, options: DescriptionOptions) -> Description:
    coded = isinstance(index, IVFCodedIndex)
    if coded:
        _check_not_cosine(index)
        rows = index.codes
    else:
        cosine = index.metric == "cosine"
        rows = normalized(index.vectors.detach()) if cosine else index.vectors.detach().float()
    metric = "ip" if index.metric == "cosine" else index.metric
    if index.metric == "cosine" and index.coarse.metric not in ("ip", "cosine"):
        raise ConversionError(
            f"faiss normalises queries before it chooses lists: a coarse index under {index.coarse.metric!r} "
            "does not fit the metric 'cosine'"
        )
    coarse = describe_index(index.coarse, None, options)
    if index.metric == "cosine":
        coarse = _inside_normalized(coarse)
    description = IVFDescription(
        index.dim,
        metric,
        index.p,
        index.nlist,
        index.nprobe,
        coarse,
        index.assignments.long().cpu(),
        torch.arange(index.ntotal, device="cpu") if labels is None else labels.cpu(),
        rows.cpu(),
        _quantizer(index.quantizer) if coded else None,
        coded and index.by_residual,
        options.precomputed_tables,
    )
    if index.metric == "cosine":
        return PreTransformDescription((NormalizationDescription(index.dim),), description)
    return description


def _inside_normalized(coarse: Description) -> Description:
    """Take a normalisation away that comes after another one."""
    if isinstance(coarse, PreTransformDescription) and isinstance(coarse.chain[0], NormalizationDescription):
        rest = coarse.chain[1:]
        return PreTransformDescription(rest, coarse.index) if rest else coarse.index
    return coarse


def _pre_transform(index: Any, labels: Tensor | None, options: DescriptionOptions) -> Description:
    inner = describe_index(index.index, labels, options)
    chain = describe_transform(index.transform)
    if isinstance(inner, PreTransformDescription):
        return PreTransformDescription((*chain, *inner.chain), inner.index)
    return PreTransformDescription(chain, inner)


def _refine(index: Any, labels: Tensor | None, options: DescriptionOptions) -> Description:
    inner = describe_index(index.index, None, options)
    vectors = index.vectors.detach()
    refine: Description
    if index.metric == "cosine":
        unit = FlatDescription("ip", None, normalized(vectors).cpu())
        refine = PreTransformDescription((NormalizationDescription(index.dim),), unit)
    elif index.dtype in _SHORT and index.metric in ("l2", "ip"):
        quantizer = ScalarDescription(index.dim, _SHORT[index.dtype], None, None)
        refine = CodedDescription(index.metric, quantizer, vectors.cpu().contiguous().view(torch.uint8))
    else:
        refine = FlatDescription(index.metric, index.p, vectors.float().cpu())
    return _labelled(RefineDescription(inner, refine, index.k_factor), labels)


_Describer = Callable[[Any, Tensor | None, DescriptionOptions], Description]
_DESCRIBERS: tuple[tuple[type[Index], _Describer], ...] = (
    (FlatIndex, _flat),
    (CodedIndex, _coded),
    (IVFFlatIndex, _inverted_file),
    (IVFCodedIndex, _inverted_file),
    (PreTransformIndex, _pre_transform),
    (RefineIndex, _refine),
)
