"""The steps of k-means on tensors: assign, average, repair."""

import heapq

import torch
from torch import Tensor

from elips_torch.core.tiling import spans
from elips_torch.kernels.segment_sums import label_order, segment_sums

# Vectors whose distances are computed at a time: the temporaries stay in cache.
_FEATURES_AT_ONCE = 2**18


def squared_distances(vectors: Tensor, centroids: Tensor, labels: Tensor) -> Tensor:
    """Return ``|x - c|**2`` ``(N,)`` float32 of each vector and its centroid."""
    distances = torch.empty(len(vectors), dtype=torch.float32, device=vectors.device)
    for start, stop in spans(len(vectors), max(1, _FEATURES_AT_ONCE // vectors.shape[1])):
        difference = vectors[start:stop] - centroids.index_select(0, labels[start:stop])
        torch.sum(difference.square_(), 1, out=distances[start:stop])
    return distances


def full_step(
    vectors: Tensor,  # (N, D) float32
    centroids: Tensor,  # (K, D) float32
    labels: Tensor,  # (N,) int64
    spherical: bool,
) -> tuple[Tensor, float]:
    """Return the new centroids and the mean squared distance to the old ones."""
    k = len(centroids)
    order, starts, counts = label_order(labels, k)
    distances = squared_distances(vectors, centroids, labels)
    errors = segment_sums(distances[:, None].double(), order, starts, counts)[:, 0]
    means = segment_sums(vectors, order, starts, counts) / counts.clamp_min(1)[:, None]
    new = normalised(means, centroids) if spherical else means
    empty = counts == 0
    if bool(empty.any()):
        new = replace_unused(vectors, new, labels, empty)
    # One sum that stands alone would depend on the number of threads.
    total = sum(errors.tolist())
    return new, total / len(vectors)


def batch_step(
    vectors: Tensor,  # (B, D) float32
    centroids: Tensor,  # (K, D) float32
    labels: Tensor,  # (B,) int64
    seen: Tensor,  # (K,) float64, vectors that each centroid has averaged so far; updated
    spherical: bool,
) -> tuple[Tensor, float]:
    """Return the centroids moved towards the means of a batch, and the sum of its squared distances.

    Each vector moves its centroid by one over the number of vectors that the centroid has seen
    (Sculley, Web-scale k-means clustering, 2010).
    """
    order, starts, counts = label_order(labels, len(centroids))
    distances = squared_distances(vectors, centroids, labels)
    errors = segment_sums(distances[:, None].double(), order, starts, counts)[:, 0]
    seen += counts
    weight = (counts / seen.clamp_min(1)).float()[:, None]
    means = segment_sums(vectors, order, starts, counts) / counts.clamp_min(1)[:, None]
    new = torch.where(counts[:, None] > 0, centroids + (means - centroids) * weight, centroids)
    return normalised(new, centroids) if spherical else new, sum(errors.tolist())


def replace_unused(
    vectors: Tensor,  # (B, D)
    centroids: Tensor,  # (K, D)
    labels: Tensor,  # (B,)
    unused: Tensor,  # (K,) bool
) -> Tensor:
    """Return the centroids with vectors of the widest clusters in the place of unused ones."""
    order, starts, counts = label_order(labels, len(centroids))
    distances = squared_distances(vectors, centroids, labels)
    errors = segment_sums(distances[:, None].double(), order, starts, counts)[:, 0]
    rows = torch.tensor(_substitutes(int(unused.sum()), errors, starts, counts), device=vectors.device)
    return centroids.index_copy(0, unused.nonzero()[:, 0], vectors[order[rows]])


def normalised(vectors: Tensor, instead: Tensor) -> Tensor:
    """Return vectors of length 1; where there is no direction, those given instead."""
    norms = torch.linalg.vector_norm(vectors.double(), dim=1, keepdim=True)
    return torch.where(norms == 0, instead, (vectors / norms).float())


def _substitutes(n_empty: int, errors: Tensor, starts: Tensor, counts: Tensor) -> list[int]:
    """Return places in the order of labels, of vectors that take the place of empty clusters.

    Each splits the cluster with the largest sum of squared distances, shared among the vectors that
    it has given already. Copies of one vector have no distances, and so are never split.
    """
    first, size = starts.tolist(), counts.tolist()
    given = [0] * len(size)
    heap = [(-error, label) for label, error in enumerate(errors.tolist()) if size[label]]
    heapq.heapify(heap)
    donors = []
    for _ in range(n_empty):
        error, label = heap[0]
        given[label] += 1
        donors.append((label, given[label]))
        heapq.heapreplace(heap, (error * given[label] / (given[label] + 1), label))
    # Spread evenly over the vectors of the cluster.
    return [first[label] + size[label] * number // (given[label] + 1) for label, number in donors]
