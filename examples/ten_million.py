"""Build and search an index of ten million vectors within eight gigabytes of memory.

    python examples/ten_million.py

Vectors come in batches, as from files too large for memory, and are kept in 8 bits per feature in inverted
lists. It prints how long each step takes, the most memory that the process has used so far, and the recall.
With fewer vectors it takes less:

    python examples/ten_million.py --n 1000000 --nlist 1024
"""

import argparse
import resource
import sys
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from elips_torch import SearchResult, index_factory, knn
from elips_torch.evaluation import RecallAtK

N_CENTRES = 10_000
NOISE = 0.7


def batches(n: int, dim: int, size: int) -> Iterator[Tensor]:
    """Yield ``n`` seeded vectors in clusters, ``(size, dim)`` at a time; the same ones each time."""
    centres = torch.randn(N_CENTRES, dim, generator=torch.Generator().manual_seed(0))
    for number, start in enumerate(range(0, n, size), 1):
        generator = torch.Generator().manual_seed(number)
        rows = torch.randint(N_CENTRES, (min(size, n - start),), generator=generator)
        vectors = centres[rows]
        yield vectors.add_(torch.randn(vectors.shape, generator=generator), alpha=NOISE)


def nearest(queries: Tensor, parts: Iterator[Tensor], k: int) -> Tensor:
    """Return the true ids ``(Q, K)``, from batches whose ids ascend from 0."""
    best, start = (
        SearchResult(torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)),
        0,
    )
    for vectors in parts:
        found = knn(queries, vectors, k)
        scores = torch.cat([best.scores, found.scores], 1)
        ids = torch.cat([best.ids, found.ids + start], 1)
        # Stable: of equal scores the lower id, which came first.
        order = scores.argsort(dim=1, stable=True)[:, :k]
        best, start = SearchResult(scores.gather(1, order), ids.gather(1, order)), start + len(vectors)
    return best.ids


def peak_gigabytes() -> float:
    """Return the most memory that the process has used so far, in 10**9 bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Steps:
    """Prints what each step took."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()

    def done(self, what: str) -> None:
        """Say that a step has ended, and begin the next."""
        now = time.perf_counter()
        print(f"{what:<40}{now - self._begin:8.1f} s   peak {peak_gigabytes():5.2f} GB", flush=True)
        self._begin = time.perf_counter()


def main(arguments: Sequence[str] | None = None) -> float:
    """Build, search, and return the recall."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=10_000_000, help="number of vectors (default: 10000000)")
    parser.add_argument("--dim", type=int, default=64, help="size of a vector (default: 64)")
    parser.add_argument("--nlist", type=int, default=4096, help="number of lists (default: 4096)")
    parser.add_argument("--nprobe", type=int, default=32, help="lists that a search reads (default: 32)")
    parser.add_argument("--batch", type=int, default=200_000, help="vectors at a time (default: 200000)")
    parser.add_argument("--queries", type=int, default=1000, help="number of queries (default: 1000)")
    parser.add_argument("--k", type=int, default=10, help="number of neighbours (default: 10)")
    options = parser.parse_args(arguments)

    steps = Steps()
    index = index_factory(options.dim, f"IVF{options.nlist},SQ8", nprobe=options.nprobe, k=options.k)
    sample = min(options.n, 64 * options.nlist)
    index.fit(torch.cat(list(batches(sample, options.dim, options.batch))))
    steps.done(f"trained on {sample:,} vectors")
    for vectors in batches(options.n, options.dim, options.batch):
        index.add(vectors)
    steps.done(f"added {index.ntotal:,}")
    (queries,) = batches(options.queries, options.dim, options.queries)
    # Nudged, so that no query is a stored vector.
    queries += 0.1 * torch.randn(queries.shape, generator=torch.Generator().manual_seed(0))
    index.search(queries)
    steps.done("first search, which makes the lists")
    found = index.search(queries)
    steps.done(f"search of {options.queries:,} queries")
    print(index)
    print(f"the index itself: {index.memory_bytes() / 1e9:.2f} GB")
    truth = nearest(queries, batches(options.n, options.dim, options.batch), options.k)
    recall = RecallAtK(k=options.k)
    recall.update(found.ids, truth)
    share = float(recall.compute()[f"recall@{options.k}"])
    steps.done(f"recall@{options.k} {share:.4f}, from exact search")
    return share


if __name__ == "__main__":
    main()
