"""A low-precision copy of a database that searches screen with, and what bounds its error.

A row x is kept as a code c with mean m and scale s, so that x - m is close to s c. Subtracting the
mean changes no ranking and makes the codes finer. Beside each code lie upper bounds of |x - m| and
of the residual |x - m - s c|, from which `screen` bounds the error of every approximate score.

Bounds are computed in float32 and widened by what float32 may lose (Higham, Accuracy and Stability
of Numerical Algorithms, 2002, section 3.1), so that they hold for the vectors as they are stored.
"""

import dataclasses
import math

import torch
from torch import Tensor

from elips_torch.core.metric import Metric
from elips_torch.core.tiling import spans

CODE_DTYPES = {"int8": torch.int8, "bf16": torch.bfloat16}
KINDS = {torch.int8: "int8", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# Unit roundoff of float32.
UNIT = 2.0**-24
# Norms below this square, and multiply with those of a query, without overflow.
LARGEST_NORM = 2.0**60
# Scales above this multiply without underflow.
SMALLEST_SCALE = 2.0**-60
# Features encoded at a time: the temporaries stay in cache.
_FEATURES_AT_ONCE = 2**18


@dataclasses.dataclass(frozen=True)
class Plane:
    """Codes of ``N`` rows and what bounds their error.

    Attributes:
        codes: ``(N, D)`` int8 or bfloat16; or the vectors themselves, see `plain_plane`.
        terms: ``(N, 4)`` float32, what the bounds need of each row: its scale, above zero; at least
            the residual ``|x - mean - scale * code|``; at least the norm ``|x - mean|``; and a bias,
            close to ``-|x - mean|**2 / 2`` for "l2", zero for the others.
        mean: ``(D,)`` float32. For "cosine" all of this is of the normalised rows.
        is_integer: the vectors are the codes plus the mean, without any error.
        step: None, or that of codes whose differences are summed, see `elips_torch.kernels.difference_plane`:
            then scale and norm of a row are 1, its residual is a sum of magnitudes, and its bias is zero.
    """

    codes: Tensor
    terms: Tensor
    mean: Tensor
    is_integer: bool = False
    step: float | None = None

    @property
    def n_rows(self) -> int:
        """N, number of rows."""
        return self.codes.shape[0]

    @property
    def kind(self) -> str:
        """What the codes are: "int8", "bf16", "fp16" or "fp32"."""
        return KINDS[self.codes.dtype]


# Columns of a plane's terms.
SCALE, RESIDUAL, NORM, BIAS = range(4)


def norm_slack(dim: int) -> float:
    """Return by how much, relatively, a float32 norm of ``dim`` terms may err."""
    return (dim + 8) * UNIT


def directions(metric: Metric, vectors: Tensor) -> Tensor:
    """Return rows ``(N, D)`` as a plane encodes them: float32, normalised for "cosine"."""
    wide = vectors.float()
    if metric.name != "cosine":
        return wide
    # Squares of tiny or huge features leave float32; what holds NaN must stay NaN.
    norms = torch.linalg.vector_norm(wide, dim=1, keepdim=True, dtype=torch.float64)
    return torch.where(norms == 0, 0.0, wide / norms).float()


def mean_of(metric: Metric, vectors: Tensor) -> Tensor:
    """Return the mean ``(D,)`` float32 of the rows as a plane encodes them."""
    total = torch.zeros(vectors.shape[1], dtype=torch.float64, device=vectors.device)
    for start, stop in chunks_of(vectors):
        total += directions(metric, vectors[start:stop]).sum(0)
    return (total / max(1, vectors.shape[0])).float()


def integer_offset(metric: Metric, vectors: Tensor) -> float | None:
    """Return what to subtract from integer-valued rows to make them int8; None if they are not."""
    if metric.name == "cosine" or not vectors.numel():
        return None
    low, high = (float(each) for each in torch.aminmax(vectors))
    if not high - low <= 255 or not max(abs(low), abs(high)) <= 1024:
        return None
    offset = 0.0 if low >= -128 and high <= 127 else float(round((low + high + 1) / 2))
    for start, stop in chunks_of(vectors):
        part = vectors[start:stop]
        if not torch.equal(part, part.round()):
            return None
    return offset


def encode(
    metric: Metric,
    vectors: Tensor,  # (N, D) float32, float16 or bfloat16
    mean: Tensor,  # (D,) float32
    kind: str,
    *,
    is_integer: bool = False,
) -> Plane | None:
    """Return the plane of some rows; None where a row is not finite or too long to be bounded.

    Args:
        metric: "l2", "ip" or "cosine".
        vectors: ``(N, D)``.
        mean: ``(D,)`` float32, any point; the nearer to the rows, the finer the codes.
        kind: "int8" or "bf16".
        is_integer: the rows minus the mean are integers within int8.
    """
    n_rows, dim = vectors.shape
    device = vectors.device
    codes = torch.empty(n_rows, dim, dtype=CODE_DTYPES[kind], device=device)
    terms = torch.zeros(n_rows, 4, dtype=torch.float32, device=device)
    slack = norm_slack(dim)
    # Normalising loses as much as a norm; squares below the normal numbers, up to 2**-126 each.
    lost = slack if metric.name == "cosine" else math.sqrt(dim) * 2.0**-63
    for start, stop in chunks_of(vectors):
        part = slice(start, stop)
        centred = directions(metric, vectors[part]) - mean
        norm = torch.linalg.vector_norm(centred, dim=1)
        terms[part, NORM] = norm * (1 + slack) + lost
        if metric.name == "l2":
            terms[part, BIAS] = centred.double().square_().sum(1).mul_(-0.5).float()
        scale = torch.ones_like(norm)
        if is_integer:
            codes[part], terms[part, SCALE] = centred, scale
            continue
        if kind == "int8":
            scale = torch.maximum(centred.amax(1), -centred.amin(1)).div_(127.0).clamp_min_(SMALLEST_SCALE)
            code = (centred / scale[:, None]).round_().clamp_(-127.0, 127.0)
        else:
            code = centred.bfloat16().float()
        codes[part], terms[part, SCALE] = code, scale
        residual = torch.linalg.vector_norm(centred.sub_(code.mul_(scale[:, None])), dim=1)
        terms[part, RESIDUAL] = residual * (1 + slack) + (norm * (4 * UNIT * (1 + slack)) + lost)
    if n_rows and not bool(terms[:, NORM].max() < LARGEST_NORM):
        return None
    return Plane(codes, terms, mean, is_integer)


def make_plane(metric: Metric, vectors: Tensor, kind: str) -> Plane | None:
    """Return a plane of all rows ``(N, D)`` about their mean, or None as `encode` does."""
    offset = integer_offset(metric, vectors) if kind == "int8" else None
    if offset is not None:
        mean = torch.full((vectors.shape[1],), offset, dtype=torch.float32, device=vectors.device)
        return encode(metric, vectors, mean, kind, is_integer=True)
    return encode(metric, vectors, mean_of(metric, vectors), kind)


def plain_plane(metric: Metric, vectors: Tensor) -> Plane | None:
    """Return a plane whose codes are the vectors ``(N, D)``: only the queries' codes lose something."""
    terms = torch.zeros(vectors.shape[0], 4, dtype=torch.float32, device=vectors.device)
    slack = norm_slack(vectors.shape[1])
    # As in `encode`: squares below the normal numbers may be lost.
    lost = math.sqrt(vectors.shape[1]) * 2.0**-63
    for start, stop in chunks_of(vectors):
        part = slice(start, stop)
        wide = vectors[part].float()
        norm = torch.linalg.vector_norm(wide, dim=1)
        if metric.name == "cosine":
            # Where a norm may have underflowed, nothing is known.
            known = (norm > 2.0**-50) | (wide == 0).all(1)
            terms[part, SCALE] = torch.where(norm > 0, 1 / norm, 1.0)
            terms[part, RESIDUAL] = 2 * slack
            terms[part, NORM] = torch.where(known & (norm < LARGEST_NORM), 1 + 2 * slack, torch.inf)
        else:
            terms[part, SCALE] = 1.0
            terms[part, NORM] = norm * (1 + slack) + lost
        if metric.name == "l2":
            terms[part, BIAS] = wide.double().square_().sum(1).mul_(-0.5).float()
    if vectors.shape[0] and not bool(terms[:, NORM].max() < LARGEST_NORM):
        return None
    return Plane(vectors, terms, vectors.new_zeros(vectors.shape[1], dtype=torch.float32))


def chunks_of(vectors: Tensor) -> list[tuple[int, int]]:
    """Return from where to where rows are to be encoded at a time."""
    return list(spans(vectors.shape[0], max(1, _FEATURES_AT_ONCE // vectors.shape[1])))
