"""Search of probed lists, the obvious way."""

import torch
from torch import Tensor

from elips_torch.core.results import SearchResult
from elips_torch.reference.knn import knn


def ivf_search(
    queries: Tensor,  # (Q, D)
    database: Tensor,  # (N, D)
    assignments: Tensor,  # (N,), the list of each row
    probes: Tensor,  # (Q, P), the lists that each query probes
    k: int,
    metric: str = "l2",
    p: float | None = None,
    ids: Tensor | None = None,  # (N,)
    mask: Tensor | None = None,  # (N,) or (Q, N), True keeps
    exclude: Tensor | None = None,  # (Q, M) ids
) -> SearchResult:
    """Sort all visible rows of the probed lists of each query by (score, id) and keep k."""
    probed = torch.stack([torch.isin(assignments, lists) for lists in probes])
    keep = probed if mask is None else probed & mask
    return knn(queries, database, k, metric, p, ids, keep, exclude)
