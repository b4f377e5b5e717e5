"""Linear maps whose results do not depend on how many vectors are mapped at once.

A matrix product adds its terms in an order that varies with its shape. Here it runs in float64, with
error bound e: where s - e and s + e round to the same float32, so does the sum in any order (Ziv, Fast
evaluation of elementary mathematical functions with correctly rounded last bit, 1991). The few
other entries are added up one by one in the order of the features.
"""

import torch
from torch import Tensor

from elips_torch.core.tiling import spans
from elips_torch.kernels.search_native import NO_MEMORY, OPEN, SOURCE_TYPES, library_is_loaded, native_map

# Unit roundoff of float64.
_UNIT = 2.0**-53
# Results computed at a time: the temporaries stay in cache.
_CELLS = 2**18
# So many vectors, and terms of their sums, C++ maps where it is loaded; more by matrix products (measured).
_FEW, _FEW_TERMS = 8, 2**21


def linear_map(
    vectors: Tensor,  # (N, I)
    matrix: Tensor,  # (O, I)
    before: Tensor | None = None,  # (I,)
    after: Tensor | None = None,  # (O,)
) -> Tensor:  # (N, O) float32
    """Return ``(vectors - before) @ matrix.T + after``, accumulated in float64 and rounded once."""
    if 0 < len(vectors) <= _FEW and len(vectors) * matrix.numel() <= _FEW_TERMS:
        mapped = _in_cpp(vectors, matrix, before, after)
        if mapped is not None:
            return mapped
    n, n_out = len(vectors), len(matrix)
    mapped = torch.empty(n, n_out, dtype=torch.float32, device=vectors.device)
    rows = matrix.double()
    shift = None if before is None else before.double()
    offset = rows.new_zeros(n_out) if after is None else after.double()
    norms = torch.linalg.vector_norm(rows, dim=1)
    slack = _slack(matrix)
    for start, stop in spans(n, max(1, _CELLS // max(matrix.shape))):
        x = vectors[start:stop].double()
        if shift is not None:
            x = x - shift
        sums = torch.addmm(offset[None], x, rows.T)
        errors = torch.outer(torch.linalg.vector_norm(x, dim=1) * slack, norms) + slack * offset.abs()
        low = (sums - errors).float()
        unsure = (low != (sums + errors).float()).nonzero()
        if len(unsure):
            row, column = unsure.unbind(1)
            low[row, column] = _in_order(x[row], rows[column], offset[column])
        # Zero has no sign.
        torch.add(low, 0.0, out=mapped[start:stop])
    return mapped


def _slack(matrix: Tensor) -> float:
    """Return the share of its terms' size that a sum may err by."""
    # The factor of two covers the norms and the bound itself.
    return 2.0 * (matrix.shape[1] + 4) * _UNIT


def _in_order(vectors: Tensor, rows: Tensor, offset: Tensor) -> Tensor:
    """Return sums ``(M,)`` over the products of float64 vectors and rows ``(M, I)``, one by one."""
    return ((vectors * rows).sum(1) + offset).float()


def _in_cpp(vectors: Tensor, matrix: Tensor, before: Tensor | None, after: Tensor | None) -> Tensor | None:
    """Return the mapped vectors; None where C++ does not serve."""
    n, (n_out, n_in) = len(vectors), matrix.shape
    if vectors.device.type != "cpu" or vectors.dtype not in SOURCE_TYPES or vectors.shape[1] != n_in:
        return None
    plain = _is_plain(matrix, (n_out, n_in)) and _is_plain(before, (n_in,)) and _is_plain(after, (n_out,))
    if not (plain and library_is_loaded()):
        return None
    vectors = vectors.resolve_neg().contiguous()
    mapped = torch.empty(n, n_out, dtype=torch.float32, device="cpu")
    outcome = native_map(
        vectors=vectors,
        matrix=matrix,
        before=before,
        after=after,
        mapped=mapped,
        slack=_slack(matrix),
        n=n,
        n_in=n_in,
        n_out=n_out,
        vector_type=SOURCE_TYPES[vectors.dtype],
    )
    if outcome == NO_MEMORY:
        return None
    if outcome == OPEN:
        row, column = mapped.isnan().nonzero().unbind(1)
        x = vectors[row].double()
        if before is not None:
            x = x - before.double()
        offset = x.new_zeros(()) if after is None else after[column].double()
        # Zero has no sign.
        mapped[row, column] = _in_order(x, matrix[column].double(), offset) + 0.0
    return mapped


def _is_plain(tensor: Tensor | None, shape: tuple[int, ...]) -> bool:
    """Whether a tensor, if there is one, has a shape and lies on the CPU as C++ reads it."""
    if tensor is None:
        return True
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or tensor.shape != shape:
        return False
    return tensor.is_contiguous() and not tensor.is_neg()
