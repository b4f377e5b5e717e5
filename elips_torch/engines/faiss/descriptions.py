"""What an index of faiss is made of, as settings and plain tensors.

`describe` makes these from an index of faiss, `construct` makes an index of faiss from these; who holds
one needs no faiss. All tensors lie on the CPU. Metrics have the names of this library.
"""

import dataclasses
from typing import TypeAlias

from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class ScalarDescription:
    """Codes feature by feature.

    Attributes:
        dim: D.
        qtype: as `ScalarQuantizer` names it.
        minimum: ``(D,)`` float32, None where nothing was learned or is to be.
        extent: ``(D,)`` float32, likewise.
    """

    dim: int
    qtype: str
    minimum: Tensor | None
    extent: Tensor | None


@dataclasses.dataclass(frozen=True, eq=False)
class ProductDescription:
    """Codes by parts.

    Attributes:
        dim: D.
        m: number of parts.
        nbits: bits per part.
        codebooks: ``(m, 2**nbits, D / m)`` float32, None before training.
    """

    dim: int
    m: int
    nbits: int
    codebooks: Tensor | None


CodeDescription: TypeAlias = ScalarDescription | ProductDescription


@dataclasses.dataclass(frozen=True, eq=False)
class FlatDescription:
    """Vectors as they are.

    Attributes:
        metric: canonical name.
        p: exponent of metric "lp".
        vectors: ``(N, D)`` float32.
    """

    metric: str
    p: float | None
    vectors: Tensor

    @property
    def dim(self) -> int:
        """Size of a vector."""
        return self.vectors.shape[1]


@dataclasses.dataclass(frozen=True, eq=False)
class BitsDescription:
    """Vectors of bits, compared by the Hamming distance.

    Attributes:
        codes: ``(N, D / 8)`` uint8, the lowest bit of a byte first.
    """

    codes: Tensor

    @property
    def dim(self) -> int:
        """Size of a vector, in bits."""
        return 8 * self.codes.shape[1]

    @property
    def metric(self) -> str:
        """The Hamming distance, which is the squared distance of zeros and ones."""
        return "l2"


@dataclasses.dataclass(frozen=True, eq=False)
class CodedDescription:
    """Codes, all of which a search sees.

    Attributes:
        metric: canonical name.
        quantizer: what the codes mean.
        codes: ``(N, code_size)`` uint8.
    """

    metric: str
    quantizer: CodeDescription
    codes: Tensor

    @property
    def dim(self) -> int:
        """Size of a vector."""
        return self.quantizer.dim


@dataclasses.dataclass(frozen=True, eq=False)
class IVFDescription:
    """Vectors or codes in inverted lists.

    Attributes:
        dim: D.
        metric: canonical name.
        p: exponent of metric "lp".
        nlist: number of lists.
        nprobe: number of lists that a search reads.
        coarse: the index of the centroids, empty before training.
        assignments: ``(N,)`` int64, the list of each row.
        ids: ``(N,)`` int64, the label of each row.
        rows: ``(N, D)`` float32 vectors, or ``(N, code_size)`` uint8 codes.
        quantizer: what codes mean; None for vectors.
        by_residual: codes are of the difference to the centroid.
        precomputed_tables: whether faiss keeps tables of products of centroids, which make searches of
            product-quantized residuals faster; None leaves that to faiss.
    """

    dim: int
    metric: str
    p: float | None
    nlist: int
    nprobe: int
    coarse: "Description"
    assignments: Tensor
    ids: Tensor
    rows: Tensor
    quantizer: CodeDescription | None = None
    by_residual: bool = False
    precomputed_tables: bool | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class LinearDescription:
    """The transform ``matrix @ vector + bias``.

    Attributes:
        kind: "linear", "pca", "opq", "rotation" or "itq": how the matrix came about.
        dim_in: D.
        dim_out: size of a transformed vector.
        matrix: ``(dim_out, dim_in)`` float32, None before training.
        bias: ``(dim_out,)`` float32, None for zero.
        mean: ``(dim_in,)`` float32, that of the training vectors; of "pca".
        variances: ``(dim_out,)`` float32, along each direction; of "pca".
        whiten: whether directions are scaled to one variance; of "pca".
        m: number of parts that "opq" is for.
    """

    kind: str
    dim_in: int
    dim_out: int
    matrix: Tensor | None
    bias: Tensor | None = None
    mean: Tensor | None = None
    variances: Tensor | None = None
    whiten: bool = False
    m: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class CentringDescription:
    """The transform that subtracts ``mean (D,)``, which is None before training."""

    dim_in: int
    mean: Tensor | None


@dataclasses.dataclass(frozen=True, eq=False)
class NormalizationDescription:
    """The transform that scales vectors to length 1."""

    dim_in: int


TransformDescription: TypeAlias = LinearDescription | CentringDescription | NormalizationDescription


@dataclasses.dataclass(frozen=True, eq=False)
class PreTransformDescription:
    """An index of transformed vectors.

    Attributes:
        chain: the transforms, the first one first.
        index: of what the last one gives.
    """

    chain: tuple[TransformDescription, ...]
    index: "Description"

    @property
    def dim(self) -> int:
        """Size of a vector."""
        return self.chain[0].dim_in if self.chain else self.index.dim

    @property
    def metric(self) -> str:
        """Metric of the inner index."""
        return self.index.metric


@dataclasses.dataclass(frozen=True, eq=False)
class IDMapDescription:
    """An index whose label i stands for ``ids[i]``; ids ``(N,)`` int64."""

    index: "Description"
    ids: Tensor

    @property
    def dim(self) -> int:
        """Size of a vector."""
        return self.index.dim

    @property
    def metric(self) -> str:
        """Metric of the inner index."""
        return self.index.metric


@dataclasses.dataclass(frozen=True, eq=False)
class RefineDescription:
    """An index whose ``k * k_factor`` best are rescored by another one.

    Attributes:
        index: the one that searches.
        refine: the one that rescores; its row i is label i of the first.
        k_factor: at least 1.
    """

    index: "Description"
    refine: "Description"
    k_factor: float

    @property
    def dim(self) -> int:
        """Size of a vector."""
        return self.index.dim

    @property
    def metric(self) -> str:
        """Metric of the inner index."""
        return self.index.metric


Description: TypeAlias = (
    FlatDescription
    | BitsDescription
    | CodedDescription
    | IVFDescription
    | PreTransformDescription
    | IDMapDescription
    | RefineDescription
)
