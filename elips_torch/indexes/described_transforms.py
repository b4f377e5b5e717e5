"""Transforms of this library from and to descriptions of those of faiss."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from elips_torch.core.errors import ConversionError
from elips_torch.engines.faiss.descriptions import (
    CentringDescription,
    LinearDescription,
    NormalizationDescription,
    ProductDescription,
    TransformDescription,
)
from elips_torch.quantizers.affine import AffineMap, Centring
from elips_torch.quantizers.itq import ITQ
from elips_torch.quantizers.opq import OPQ
from elips_torch.quantizers.pca import PCA
from elips_torch.quantizers.transform import LinearTransform, Transform
from elips_torch.quantizers.transforms import L2Normalize, RandomRotation

# Largest entry by which float32 matrices that are meant to be orthonormal miss that.
_ORTHONORMAL = 1e-3
# Relative error of a bias that was computed in float32.
_ROUNDED = 1e-4


@dataclasses.dataclass(frozen=True)
class TransformParts:
    """What makes a transform: its class, its constructor keywords and its state."""

    kind: type[Transform]
    config: dict[str, Any]
    state: dict[str, Tensor]


def describe_transform(transform: Transform) -> tuple[TransformDescription, ...]:
    """Return what faiss has for a transform, which may be two of its own.

    Raises:
        ConversionError: it has nothing.
    """
    trained = transform.is_trained
    if isinstance(transform, L2Normalize):
        return (NormalizationDescription(transform.dim_in),)
    if isinstance(transform, Centring):
        return (CentringDescription(transform.dim_in, _plain(transform.mean) if trained else None),)
    if not isinstance(transform, LinearTransform) or type(transform).__name__ not in _KINDS:
        raise ConversionError(f"{type(transform).__name__} has no counterpart in faiss")
    sizes = (transform.dim_in, transform.dim_out)
    matrix = _plain(transform.matrix) if trained else None
    kind = _KINDS[type(transform).__name__]
    if isinstance(transform, PCA):
        if matrix is None:
            return (LinearDescription(kind, *sizes, None, whiten=transform.whiten),)
        mean = _plain(transform.mean)
        bias = -(matrix.double() @ mean.double()).float()
        variances = _plain(transform.variances)
        return (LinearDescription(kind, *sizes, matrix, bias, mean, variances, transform.whiten),)
    if isinstance(transform, OPQ):
        return (LinearDescription(kind, *sizes, matrix, m=transform.m),)
    if matrix is None:
        raise ConversionError(
            f"an untrained {type(transform).__name__} has no counterpart in faiss; train it first"
        )
    if isinstance(transform, ITQ):
        # What faiss calls an ITQTransform also normalises.
        centring = CentringDescription(transform.dim_in, _plain(transform.mean))
        return (centring, LinearDescription(kind, *sizes, matrix))
    added = _plain(transform.bias) if isinstance(transform, AffineMap) else None
    return (LinearDescription(kind, *sizes, matrix, added),)


def transform_parts(
    chain: Sequence[TransformDescription], parts: ProductDescription | None
) -> list[TransformParts]:
    """Return what makes the transforms of a chain, the first one first.

    Args:
        chain: descriptions.
        parts: the product quantizer behind the chain, which tells a rotation that was learned for one.
    """
    found: list[TransformParts] = []
    left = list(chain)
    while left:
        first = left.pop(0)
        second = left[0] if left else None
        if _is_itq(first) and isinstance(second, LinearDescription) and second.kind == "itq":
            left.pop(0)
            found.append(_itq(first, second))
        elif isinstance(first, LinearDescription):
            found.append(_linear_parts(first, None if left else parts))
        elif isinstance(first, CentringDescription):
            found.append(TransformParts(Centring, {"dim": first.dim_in}, {"mean": _or_empty(first.mean)}))
        else:
            found.append(TransformParts(L2Normalize, {"dim": first.dim_in}, {}))
    return found


def _is_itq(first: TransformDescription) -> bool:
    return isinstance(first, CentringDescription) and first.mean is not None


def _itq(centring: Any, linear: LinearDescription) -> TransformParts:
    config = {"dim_in": linear.dim_in, "dim_out": linear.dim_out}
    return TransformParts(ITQ, config, {"matrix": _or_empty(linear.matrix), "mean": centring.mean})


def _linear_parts(linear: LinearDescription, parts: ProductDescription | None) -> TransformParts:
    sizes = {"dim_in": linear.dim_in, "dim_out": linear.dim_out}
    matrix = _or_empty(linear.matrix)
    if linear.kind == "pca" and _bias_is_of_mean(linear):
        learned = {"matrix": matrix, "mean": _or_empty(linear.mean), "variances": _or_empty(linear.variances)}
        return TransformParts(PCA, {**sizes, "whiten": linear.whiten}, learned)
    if linear.bias is None:
        if linear.kind == "rotation":
            return TransformParts(RandomRotation, sizes, {"matrix": matrix})
        m = linear.m if linear.kind == "opq" else _parts_of_rotation(linear, parts)
        if m is not None and linear.dim_out % m == 0 and linear.dim_out <= linear.dim_in:
            config = {"dim": linear.dim_in, "dim_out": linear.dim_out, "m": m}
            if parts is not None:
                config["nbits"] = parts.nbits
            return TransformParts(OPQ, config, {"matrix": matrix})
    bias = torch.zeros(linear.dim_out, device="cpu") if linear.bias is None else linear.bias
    return TransformParts(AffineMap, sizes, {"matrix": matrix, "bias": bias if matrix.numel() else matrix})


def _bias_is_of_mean(linear: LinearDescription) -> bool:
    if linear.matrix is None:
        return True
    if linear.bias is None or linear.mean is None or linear.variances is None:
        return False
    if len(linear.mean) != linear.dim_in or len(linear.variances) != linear.dim_out:
        return False
    wanted = -(linear.matrix.double() @ linear.mean.double())
    size = linear.matrix.double().abs() @ linear.mean.double().abs()
    return bool(((linear.bias.double() - wanted).abs() <= _ROUNDED * size).all())


def _parts_of_rotation(linear: LinearDescription, parts: ProductDescription | None) -> int | None:
    """Return the number of parts that a plain matrix was learned for; files say of OPQ no more than that."""
    if parts is None or linear.kind != "linear" or linear.matrix is None:
        return None
    wide = linear.matrix.double()
    miss = (wide @ wide.T - torch.eye(linear.dim_out, dtype=torch.float64, device="cpu")).abs().max()
    return parts.m if float(miss) <= _ORTHONORMAL else None


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu()


def _or_empty(tensor: Tensor | None) -> Tensor:
    return torch.empty(0, dtype=torch.float32, device="cpu") if tensor is None else tensor


_KINDS = {
    "PCA": "pca",
    "OPQ": "opq",
    "RandomRotation": "rotation",
    "ITQ": "itq",
    "AffineMap": "linear",
}
