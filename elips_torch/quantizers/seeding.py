"""Where k-means starts, and which vectors it learns from."""

import torch
from torch import Tensor

# k-means++ chooses among so many vectors per centroid; its result hardly depends on more.
_SEEDED_PER_CENTROID = 32


def sample_rows(n_rows: int, n_chosen: int, generator: torch.Generator) -> Tensor:
    """Return ``(n_chosen,)`` different row numbers in random order, on the CPU."""
    return torch.randperm(n_rows, generator=generator, device="cpu", dtype=torch.int64)[:n_chosen]


def sampled_start(vectors: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Return k of the vectors ``(N, D)``, drawn without replacement."""
    return vectors[sample_rows(len(vectors), k, generator).to(vectors.device)]


def plus_plus_start(vectors: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Return k of the vectors, each drawn with odds of its squared distance to the nearest so far.

    Arthur and Vassilvitskii, k-means++: the advantages of careful seeding, 2007; from a sample where
    there are very many vectors.
    """
    rows = sample_rows(len(vectors), max(k, min(len(vectors), _SEEDED_PER_CENTROID * k)), generator)
    pool = vectors[rows.to(vectors.device)]
    chosen = torch.empty(k, dtype=torch.int64, device=vectors.device)
    # The pool is in random order.
    chosen[0] = 0
    nearest = torch.full((len(pool),), torch.inf, dtype=torch.float32, device=vectors.device)
    for place in range(1, k):
        last = pool.index_select(0, chosen[place - 1 : place])
        # Pair by pair: a matrix product would depend on the number of threads.
        distances = torch.cdist(pool, last, compute_mode="donot_use_mm_for_euclid_dist")[:, 0]
        torch.minimum(nearest, distances.square_(), out=nearest)
        # The first of exponential clocks that run at these rates rings with these odds; a vector at
        # distance 0 has no rate. Unlike a cumulative sum this needs no order of addition.
        clocks = torch.empty(len(pool), dtype=torch.float32, device="cpu").exponential_(generator=generator)
        chosen[place] = (nearest / clocks.to(vectors.device)).argmax()
    return pool[chosen]
