"""All pairwise scores, the obvious way."""

import torch
from torch import Tensor

from elips_torch.core.metric import resolve_metric


def pairwise_distance(
    queries: Tensor,  # (Q, D)
    database: Tensor,  # (N, D)
    metric: str = "l2",
    p: float | None = None,
) -> Tensor:  # (Q, N) float32
    """Evaluate the definition in float64 for one query after the other."""
    kind = resolve_metric(metric, p)
    vectors = database.double().contiguous()
    scores = torch.empty(queries.shape[0], database.shape[0], dtype=torch.float32)
    for i, query in enumerate(queries.double().contiguous()):
        # The bits of a score do not depend on the rows beside.
        scores[i] = kind.rounded_score(query, vectors)
    return scores
