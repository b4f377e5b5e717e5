"""The nearest row of each of many vectors, exactly, in C++: one pass that keeps no products.

It answers as `nearest_row` does, for few rows and many vectors, such as the centroids and the vectors
of k-means. See `native/assign.h`.
"""

import torch
from torch import Tensor

from elips_torch.core.hardware import device_facts
from elips_torch.core.metric import Metric
from elips_torch.core.native import native_threads
from elips_torch.kernels.plane import LARGEST_NORM
from elips_torch.kernels.screen import rounded_units
from elips_torch.kernels.search_native import (
    METRICS,
    VECTOR_TYPES,
    library_compiles,
    library_is_ready,
    library_reasons,
    native_assign,
)

# Vectors are coded in blocks of so many, features in steps of so many.
_BLOCK, _STEP = 64, 4
# From so many features on, codes of 8 bits are faster (measured on two AVX-512 cores). Sums of products
# fit 32 bits up to the second number.
_INT8_FEATURES, _MOST_INT8_FEATURES = 48, 2**16
# Multiplications below which one thread is faster, and below which nothing is compiled.
_WORTH_THREADS, _WORTH_COMPILING = 10**7, 10**9
# Bytes of a thread for each feature, and besides; of a row besides its codes.
_FEATURE_BYTES, _THREAD_BYTES, _ROW_BYTES = 1100, 450 * 2**10, 96


class VectorCodes:
    """Vectors coded once, for several calls with other rows and the same metric.

    Args:
        vectors: ``(N, D)`` float32, float16 or bfloat16, on a CPU; unchanged while this is in use.
        mean: ``(D,)`` float32, what the codes are relative to: close to the vectors.
    """

    def __init__(self, vectors: Tensor, mean: Tensor) -> None:
        n, dim = _padded(vectors)
        self.mean = mean.contiguous()
        self.codes = torch.empty(n, dim, dtype=_code_type(vectors.shape[1]), device=vectors.device)
        self.terms = torch.empty(4, n, dtype=torch.float32, device=vectors.device)
        self.is_filled = False


def code_bytes(vectors: Tensor) -> int:
    """Return how many bytes the codes of vectors take."""
    n, dim = _padded(vectors)
    return n * (dim * _code_type(vectors.shape[1]).itemsize + 16)


def assigns_natively(vectors: Tensor, rows: Tensor, workspace_bytes: int) -> bool:
    """Whether `native_nearest_rows` serves vectors ``(N, D)`` and rows ``(K, D)``."""
    n, dim = vectors.shape
    if not vectors.numel() or not rows.numel() or vectors.dtype not in VECTOR_TYPES:
        return False
    if library_reasons(vectors.device):
        return False
    memory = native_threads() * (dim * _FEATURE_BYTES + _THREAD_BYTES)
    memory += len(rows) * (dim * (4 + _code_type(dim).itemsize) + _ROW_BYTES)
    if memory > workspace_bytes:
        return False
    if n * len(rows) * dim <= _WORTH_COMPILING and not library_is_ready(vectors.device):
        return False
    return library_compiles()


def native_nearest_rows(
    vectors: Tensor,  # (N, D) float32, float16 or bfloat16
    rows: Tensor,  # (K, D) likewise
    metric: Metric,  # "l2", "ip" or "cosine"
    codes: VectorCodes | None = None,
) -> Tensor:  # (N,) int64
    """Return the best row of each vector by the metric's definition, of equals the lowest.

    -1 stands where it could not be told, which is rare.
    """
    # Named, so that they live as long as the call.
    vectors, rows = vectors.contiguous(), rows.float().contiguous()
    n, dim = vectors.shape
    labels = torch.empty(n, dtype=torch.int64, device=vectors.device)
    mean = rows.mean(0) if codes is None else codes.mean
    code_type = _code_type(dim)
    served = native_assign(
        vectors=vectors,
        centroids=rows,
        mean=mean,
        codes=None if codes is None else codes.codes,
        terms=None if codes is None else codes.terms,
        labels=labels,
        rounded=rounded_units("fp32" if code_type == torch.float32 else "int8", dim),
        largest=LARGEST_NORM / dim,
        n_vectors=n,
        n_centroids=len(rows),
        dim=dim,
        metric=METRICS[metric.name],
        code_type=int(code_type == torch.int8),
        vector_type=VECTOR_TYPES[vectors.dtype],
        is_coded=int(codes is not None and codes.is_filled),
        n_threads=native_threads() if n * len(rows) * dim > _WORTH_THREADS else 1,
    )
    if not served:
        return labels.fill_(-1)
    if codes is not None:
        codes.is_filled = True
    return labels


def _code_type(dim: int) -> torch.dtype:
    is_int8 = _INT8_FEATURES <= dim <= _MOST_INT8_FEATURES and device_facts("cpu").vnni
    return torch.int8 if is_int8 else torch.float32


def _padded(vectors: Tensor) -> tuple[int, int]:
    n, dim = vectors.shape
    return -(-n // _BLOCK) * _BLOCK, -(-dim // _STEP) * _STEP
