"""Range search, the obvious way."""

import torch
from torch import Tensor

from elips_torch.core.metric import resolve_metric
from elips_torch.core.results import RangeResult
from elips_torch.reference.knn import knn


def range_search(
    queries: Tensor,  # (Q, D)
    database: Tensor,  # (N, D)
    radius: float | Tensor,  # or (Q,)
    metric: str = "l2",
    p: float | None = None,
    ids: Tensor | None = None,  # (N,)
    mask: Tensor | None = None,  # (N,) or (Q, N), True keeps
    exclude: Tensor | None = None,  # (Q, M) ids
) -> RangeResult:
    """Sort all rows of each query and cut the list at the radius."""
    kind = resolve_metric(metric, p)
    limits = torch.as_tensor(radius, dtype=torch.float32).expand(queries.shape[0])
    full = knn(queries, database, max(1, database.shape[0]), metric, p, ids, mask, exclude)
    lims, scores, found = [0], [torch.empty(0, dtype=torch.float32)], [torch.empty(0, dtype=torch.int64)]
    for score, label, limit in zip(full.scores, full.ids, limits, strict=True):
        within = (score > limit if kind.higher_is_better else score < limit) & (label >= 0)
        scores.append(score[within])
        found.append(label[within])
        lims.append(lims[-1] + int(within.sum()))
    return RangeResult(torch.tensor(lims), torch.cat(scores), torch.cat(found))
