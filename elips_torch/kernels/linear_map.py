"""Linear maps whose results do not depend on how many vectors are mapped at once.

A matrix product adds its terms in an order that varies with its shape. Here it runs in float64, with
error bound e: where s - e and s + e round to the same float32, so does the sum in any order (Ziv, Fast
evaluation of elementary mathematical functions with correctly rounded last bit, 1991). The few
other entries are added up one by one in the order of the features.
"""

import torch
from torch import Tensor

from elips_torch.core.tiling import spans

# Unit roundoff of float64.
_UNIT = 2.0**-53
# Results computed at a time: the temporaries stay in cache.
_CELLS = 2**18


def linear_map(
    vectors: Tensor,  # (N, I)
    matrix: Tensor,  # (O, I)
    before: Tensor | None = None,  # (I,)
    after: Tensor | None = None,  # (O,)
) -> Tensor:  # (N, O) float32
    """Return ``(vectors - before) @ matrix.T + after``, accumulated in float64 and rounded once."""
    n, (n_out, n_in) = len(vectors), matrix.shape
    mapped = torch.empty(n, n_out, dtype=torch.float32, device=vectors.device)
    rows = matrix.double()
    shift = None if before is None else before.double()
    offset = rows.new_zeros(n_out) if after is None else after.double()
    norms = torch.linalg.vector_norm(rows, dim=1)
    # The factor of two covers the norms and the bound itself.
    slack = 2.0 * (n_in + 4) * _UNIT
    for start, stop in spans(n, max(1, _CELLS // max(n_in, n_out))):
        x = vectors[start:stop].double()
        if shift is not None:
            x = x - shift
        sums = torch.addmm(offset[None], x, rows.T)
        errors = torch.outer(torch.linalg.vector_norm(x, dim=1) * slack, norms) + slack * offset.abs()
        low = (sums - errors).float()
        unsure = (low != (sums + errors).float()).nonzero()
        if len(unsure):
            row, column = unsure.unbind(1)
            exact = (x[row] * rows[column]).sum(1) + offset[column]
            low[row, column] = exact.float()
        # Zero has no sign.
        torch.add(low, 0.0, out=mapped[start:stop])
    return mapped
