"""From a description of an index of faiss to an index."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from elips_torch.core.errors import ConversionError, DamagedIndexError
from elips_torch.core.metric import resolve_metric
from elips_torch.core.validation import check_values
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
)
from elips_torch.indexes.base import Index
from elips_torch.indexes.described_transforms import transform_parts
from elips_torch.indexes.flat import FlatIndex
from elips_torch.indexes.ivf_flat import IVFFlatIndex
from elips_torch.indexes.ivf_pq import IVFPQIndex
from elips_torch.indexes.ivf_sq import IVFSQIndex
from elips_torch.indexes.pq import PQIndex
from elips_torch.indexes.refine import RefineIndex
from elips_torch.indexes.sq import SQIndex
from elips_torch.indexes.wrappers import PreTransformIndex
from elips_torch.quantizers.bits import unpack_bits

_SHORT = {"fp16": torch.float16, "bf16": torch.bfloat16}
# How far from 1 the squared length of a float32 vector may be that was normalised.
_UNIT = 1e-3


@dataclasses.dataclass(frozen=True)
class IndexParts:
    """What makes an index: its class, its settings and its state, as a file of an index has them.

    Attributes:
        kind: the class.
        config: settings, as from `Index.config`; what is left out has its default.
        state: the state dictionary.
        ids_key: where that has the ids.
        metric: canonical name.
    """

    kind: type[Index]
    config: dict[str, Any]
    state: dict[str, Tensor]
    ids_key: str
    metric: str

    def with_ids(self, ids: Tensor) -> "IndexParts":
        """Return the parts with other ids ``(N,)``."""
        largest = int(ids.max()) if ids.numel() else -1
        next_key = self.ids_key.removesuffix("ids") + "next_id"
        next_id = torch.tensor(max(0, largest + 1), dtype=torch.int64, device="cpu")
        return dataclasses.replace(self, state={**self.state, self.ids_key: ids, next_key: next_id})


def restore_index(description: Description, device: torch.device | str) -> Index:
    """Make an index of a description.

    Raises:
        ConversionError: it has no counterpart here, or its ids are negative or occur twice.
        NonFiniteError: vectors hold NaN, infinity or what the metric does not take.
    """
    parts = index_parts(description)
    index = parts.kind._from_config(parts.config, "cpu")
    try:
        index.load_state_dict(parts.state, assign=True)
    except RuntimeError as error:
        _, _, faults = str(error).partition(":\n\t")
        raise DamagedIndexError(
            f"the index of faiss does not fit a {parts.kind.__name__}: {faults}"
        ) from error
    return index.to(device)


def index_parts(description: Description, *, cosine: bool = True) -> IndexParts:
    """Return what makes the index of a description.

    Args:
        description: of an index of faiss.
        cosine: take inner products of normalised vectors for the metric "cosine".
    """
    if isinstance(description, PreTransformDescription):
        return _pre_transform(description, cosine)
    if isinstance(description, IDMapDescription):
        return _id_map(description, cosine)
    return _MAKERS[type(description)](description)


def _numbered(kind: type[Index], config: dict[str, Any], state: dict[str, Tensor], n: int) -> IndexParts:
    parts = IndexParts(kind, config, state, "ids", config["metric"])
    return parts.with_ids(torch.arange(n, device="cpu"))


def _flat(description: FlatDescription) -> IndexParts:
    metric, p = description.metric, description.p
    check_values("vectors", description.vectors, resolve_metric(metric, p))
    config = {"dim": description.dim, "metric": metric, "p": p}
    return _numbered(FlatIndex, config, {"vectors": description.vectors}, len(description.vectors))


def _bits(description: BitsDescription) -> IndexParts:
    # Zeros and ones, which add up without rounding in any dtype that searches compute in.
    config = {"dim": description.dim, "metric": description.metric, "dtype": "float16"}
    vectors = unpack_bits(description.codes, torch.float16)
    return _numbered(FlatIndex, config, {"vectors": vectors}, len(vectors))


def _coded(description: CodedDescription) -> IndexParts:
    kind: type[Index]
    kind = PQIndex if isinstance(description.quantizer, ProductDescription) else SQIndex
    config = {"dim": description.dim, "metric": description.metric, **_settings(description.quantizer)}
    state = {"codes": description.codes, **_learned(description.quantizer)}
    return _numbered(kind, config, state, len(description.codes))


def _settings(quantizer: CodeDescription) -> dict[str, Any]:
    if isinstance(quantizer, ProductDescription):
        return {"m": quantizer.m, "nbits": quantizer.nbits}
    return {"qtype": quantizer.qtype}


def _learned(quantizer: CodeDescription) -> dict[str, Tensor]:
    empty = torch.empty(0, dtype=torch.float32, device="cpu")
    if isinstance(quantizer, ProductDescription):
        tensors = {"codebooks": quantizer.codebooks}
    else:
        tensors = {"minimum": quantizer.minimum, "extent": quantizer.extent}
    return {f"quantizer.{name}": empty if t is None else t for name, t in tensors.items()}


def _inverted_file(description: IVFDescription) -> IndexParts:
    metric, quantizer = description.metric, description.quantizer
    # Faiss keeps no order of all rows: that of the ids is the order of insertion where faiss numbers them.
    order = description.ids.argsort(stable=True)
    rows = description.rows.index_select(0, order)
    config: dict[str, Any] = {
        "dim": description.dim,
        "nlist": description.nlist,
        "metric": metric,
        "p": description.p,
        "nprobe": description.nprobe,
    }
    state = {
        "assignments": description.assignments[order].to(torch.int32),
        "nprobe": torch.tensor(description.nprobe, dtype=torch.int64, device="cpu"),
    }
    kind: type[Index] = IVFFlatIndex
    if quantizer is None:
        check_values("vectors", rows, resolve_metric(metric, description.p))
        state["vectors"] = rows
    else:
        kind = IVFPQIndex if isinstance(quantizer, ProductDescription) else IVFSQIndex
        config |= {**_settings(quantizer), "by_residual": description.by_residual}
        state |= {"codes": rows, **_learned(quantizer)}
    coarse = index_parts(description.coarse)
    usual = metric if metric in ("ip", "cosine") else "l2"
    if coarse.kind is not FlatIndex or coarse.metric != usual:
        config["coarse"] = [coarse.kind.__name__, coarse.config]
    state |= {f"coarse.{name}": tensor for name, tensor in coarse.state.items()}
    return IndexParts(kind, config, state, "ids", metric).with_ids(description.ids[order])


def _id_map(description: IDMapDescription, cosine: bool) -> IndexParts:
    parts = index_parts(description.index, cosine=cosine)
    labels = parts.state[parts.ids_key]
    n = len(description.ids)
    if len(labels) != n or (n and not 0 <= int(labels.min()) <= int(labels.max()) < n):
        raise DamagedIndexError(
            f"the map has {n} ids for an index of {len(labels)} vectors, expected one for each label"
        )
    return parts.with_ids(description.ids[labels])


def _pre_transform(description: PreTransformDescription, cosine: bool) -> IndexParts:
    chain, inner = description.chain, description.index
    if cosine and chain and isinstance(chain[-1], NormalizationDescription):
        folded = _as_cosine(inner)
        if folded is not None:
            chain, inner = chain[:-1], folded
    parts = index_parts(inner, cosine=cosine)
    for transform in reversed(transform_parts(chain, _product_quantizer(inner))):
        state = {f"transform.{name}": tensor for name, tensor in transform.state.items()}
        state |= {f"index.{name}": tensor for name, tensor in parts.state.items()}
        config = {
            "transform": [transform.kind.__name__, transform.config],
            "index": [parts.kind.__name__, parts.config],
        }
        parts = IndexParts(PreTransformIndex, config, state, f"index.{parts.ids_key}", parts.metric)
    return parts


def _product_quantizer(description: Description) -> ProductDescription | None:
    while isinstance(description, IDMapDescription | RefineDescription):
        description = description.index
    if isinstance(description, CodedDescription | IVFDescription):
        quantizer = description.quantizer
        return quantizer if isinstance(quantizer, ProductDescription) else None
    return None


def _as_cosine(description: Description) -> Description | None:
    """Return an index of the cosine that finds what this one finds for normalised queries, or None."""
    if isinstance(description, IDMapDescription):
        inner = _as_cosine(description.index)
        return None if inner is None else dataclasses.replace(description, index=inner)
    if description.metric != "ip":
        return None
    if isinstance(description, FlatDescription):
        return dataclasses.replace(description, metric="cosine") if _is_unit(description.vectors) else None
    if isinstance(description, IVFDescription) and description.quantizer is None:
        coarse = _as_cosine(description.coarse)
        if isinstance(coarse, FlatDescription) and _is_unit(description.rows):
            return dataclasses.replace(description, metric="cosine", coarse=coarse)
    return None


def _is_unit(vectors: Tensor) -> bool:
    squares = vectors.square().sum(1)
    return bool((((squares - 1).abs() <= _UNIT) | (squares == 0)).all())


def _refine(description: RefineDescription) -> IndexParts:
    refine, factor = description.refine, description.k_factor
    originals = _behind_normalisation(refine)
    parts = index_parts(description.index, cosine=originals is not None)
    n = len(parts.state[parts.ids_key])
    if not torch.equal(parts.state[parts.ids_key], torch.arange(n, device="cpu")):
        raise ConversionError("the labels of the index to refine are not the numbers of its rows")
    dtype, metric, vectors = "float32", refine.metric, None
    if isinstance(originals, FlatDescription):
        metric, vectors = "cosine", originals.vectors
    elif isinstance(refine, FlatDescription):
        vectors = refine.vectors
    elif isinstance(refine, CodedDescription) and not isinstance(refine.quantizer, ProductDescription):
        short = _SHORT.get(refine.quantizer.qtype)
        if short is not None:
            dtype = str(short).removeprefix("torch.")
            vectors = refine.codes.view(short)
    if vectors is None or len(vectors) != n or metric != parts.metric:
        raise ConversionError(
            "index refines by other than the vectors in float32, fp16 or bf16 under its own metric, which "
            "has no counterpart in this library; FaissIndex(index), or FaissIndex.read(path), serves it as "
            "it is"
        )
    config = {"index": [parts.kind.__name__, parts.config], "k_factor": factor, "dtype": dtype}
    state = {f"index.{name}": tensor for name, tensor in parts.state.items()}
    state["vectors"] = vectors
    state["k_factor"] = torch.tensor(factor, dtype=torch.float64, device="cpu")
    return IndexParts(RefineIndex, config, state, f"index.{parts.ids_key}", parts.metric)


def _behind_normalisation(description: Description) -> Description | None:
    """Return the index of the cosine that stands behind nothing but a normalisation, or None."""
    if not isinstance(description, PreTransformDescription) or len(description.chain) != 1:
        return None
    first = description.chain[0]
    return _as_cosine(description.index) if isinstance(first, NormalizationDescription) else None


_MAKERS: dict[type[Any], Callable[[Any], IndexParts]] = {
    FlatDescription: _flat,
    BitsDescription: _bits,
    CodedDescription: _coded,
    IVFDescription: _inverted_file,
    RefineDescription: _refine,
}
