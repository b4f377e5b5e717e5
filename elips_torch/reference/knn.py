"""k-nearest-neighbour search, the obvious way."""

import torch
from torch import Tensor

from elips_torch.core.metric import resolve_metric
from elips_torch.core.results import SearchResult
from elips_torch.reference.pairwise_distance import pairwise_distance


def knn(
    queries: Tensor,  # (Q, D)
    database: Tensor,  # (N, D)
    k: int,
    metric: str = "l2",
    p: float | None = None,
    ids: Tensor | None = None,  # (N,)
    mask: Tensor | None = None,  # (N,) or (Q, N), True keeps
    exclude: Tensor | None = None,  # (Q, M) ids
) -> SearchResult:
    """Sort all visible rows of each query by (score, id) and keep k."""
    kind = resolve_metric(metric, p)
    sign = -1.0 if kind.higher_is_better else 1.0
    labels = list(range(database.shape[0])) if ids is None else ids.tolist()
    scores = torch.full((queries.shape[0], k), kind.worst, dtype=torch.float32)
    found = torch.full((queries.shape[0], k), -1, dtype=torch.int64)
    for i, row in enumerate(pairwise_distance(queries, database, metric, p).tolist()):
        hidden = set() if exclude is None else set(exclude[i].tolist())
        keep = [True] * len(labels) if mask is None else (mask if mask.ndim == 1 else mask[i]).tolist()
        visible = [
            (sign * s, label)
            for s, label, ok in zip(row, labels, keep, strict=True)
            if ok and label not in hidden
        ]
        for place, (score, label) in enumerate(sorted(visible)[:k]):
            scores[i, place] = sign * score
            found[i, place] = label
    return SearchResult(scores, found)
