"""What is measured: this library, torch, and builds of faiss, each holding the same vectors."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from elips_torch.cli.datasets import Dataset
from elips_torch.core.dispatch import Explanation
from elips_torch.core.metric import Metric
from elips_torch.engines.faiss.brute_force import (
    SETTINGS,
    FaissSettings,
    apply_settings,
    current_settings,
    knn_faiss,
    knn_faiss_gpu,
)
from elips_torch.engines.faiss.builds import FaissBuild
from elips_torch.indexes.flat import FlatIndex

# A tile of scores larger than this is no faster, and several would not fit a laptop.
_SCORE_BYTES = 2 * 2**30


class Contender(ABC):
    """One way to search the dataset.

    Args:
        name: for tables, unique among the contenders.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.setting = "defaults"

    @abstractmethod
    def search(self, n_queries: int, k: int) -> Tensor:
        """Return ``(Q, K)`` row numbers for the first queries of the dataset."""

    def variants(self, n_queries: int, k: int) -> Sequence[Any]:
        """Return the settings worth trying for a search; the first one is the usual."""
        return [None]

    def use(self, variant: Any) -> None:
        """Search with one of the variants from now on, and note its name as ``setting``."""
        self.setting = "defaults" if variant is None else str(variant)


def make_index(dataset: Dataset, metric: Metric, screen: str) -> FlatIndex:
    """Return an index of the dataset, on its device and in its dtype."""
    settings: dict[str, Any] = {
        "screen": screen,
        "dtype": dataset.database.dtype,
        "device": dataset.database.device,
    }
    index = FlatIndex(dataset.dim, metric.name, **settings)
    index.add(dataset.database)
    return index


class Ours(Contender):
    """`FlatIndex`, with gradients off."""

    def __init__(self, dataset: Dataset, metric: Metric, screen: str) -> None:
        super().__init__("ours")
        self.index = make_index(dataset, metric, screen)
        self._queries = dataset.queries
        self._implementation = "auto"

    def search(self, n_queries: int, k: int) -> Tensor:
        """Search the index."""
        with torch.inference_mode():
            return self.index.search(self._queries[:n_queries], k, implementation=self._implementation).ids

    def variants(self, n_queries: int, k: int) -> Sequence[str]:
        """Return the one implementation to measure: the Triton kernels on a GPU if they can serve."""
        possible = self.explain(n_queries, k).reasons.get("triton") == []
        return ["triton" if possible and self.index.device.type == "cuda" else "auto"]

    def use(self, variant: str) -> None:
        """Ask for an implementation."""
        self._implementation = self.setting = variant

    def explain(self, n_queries: int, k: int) -> Explanation:
        """Return which implementation serves a search."""
        return self.index.explain(self._queries[:n_queries], k, implementation=self._implementation)


class TorchTopk(Contender):
    """Eager torch: one matrix product and `topk`, for blocks of queries."""

    def __init__(self, dataset: Dataset, metric: Metric) -> None:
        super().__init__("torch")
        queries, self._database = peer_vectors(dataset, metric)
        self._queries = queries
        self._squares = self._database.square().sum(1)[None] if metric.name == "l2" else None
        self._block = 1

    def search(self, n_queries: int, k: int) -> Tensor:
        """Multiply and select."""
        found = [self._nearest(part, k) for part in self._queries[:n_queries].split(self._block)]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _nearest(self, queries: Tensor, k: int) -> Tensor:
        if self._squares is None:
            return (queries @ self._database.T).topk(k).indices
        # The norm of the query is the same for all rows.
        costs = torch.addmm(self._squares, queries, self._database.T, alpha=-2.0)
        return costs.topk(k, largest=False).indices

    def variants(self, n_queries: int, k: int) -> Sequence[int]:
        """Return numbers of queries to multiply at once: all of them, or as the memory allows, and fewer."""
        most = max(1, _SCORE_BYTES // (len(self._database) * self._database.element_size()))
        return [min(n_queries, most), *(block for block in (512, 128) if block < min(n_queries, most))]

    def use(self, variant: int) -> None:
        """Multiply this many queries at once."""
        self._block = variant
        self.setting = f"blocks of {variant} queries"


class FaissBruteForce(Contender):
    """`faiss.knn`, with the fastest of its settings."""

    def __init__(self, name: str, build: FaissBuild, dataset: Dataset, metric: Metric) -> None:
        super().__init__(name)
        self._build = build
        self._metric = "l2" if metric.name == "l2" else "ip"
        self._queries, self._database = peer_vectors(dataset, metric)
        self._original = current_settings(build)

    def search(self, n_queries: int, k: int) -> Tensor:
        """Call faiss."""
        return knn_faiss(self._build, self._queries[:n_queries], self._database, k, self._metric)[1]

    def variants(self, n_queries: int, k: int) -> Sequence[FaissSettings]:
        """Return the settings worth trying."""
        return SETTINGS

    def use(self, variant: FaissSettings) -> None:
        """Set what the whole build works with."""
        apply_settings(self._build, self._original)
        apply_settings(self._build, variant)
        self.setting = str(variant)


class FaissGpu(Contender):
    """`faiss.knn_gpu` on the current stream."""

    def __init__(self, name: str, build: FaissBuild, dataset: Dataset, metric: Metric) -> None:
        super().__init__(name)
        self._build = build
        self._metric = "l2" if metric.name == "l2" else "ip"
        self._queries, self._database = peer_vectors(dataset, metric)

    def search(self, n_queries: int, k: int) -> Tensor:
        """Call faiss."""
        return knn_faiss_gpu(self._build, self._queries[:n_queries], self._database, k, self._metric)[1]


def peer_vectors(dataset: Dataset, metric: Metric) -> tuple[Tensor, Tensor]:
    """Return queries and database as peers want them, outside the time that is measured.

    On a CPU that is float32, the fastest they have; for cosine the vectors are normalised.
    """
    vectors = dataset.queries, dataset.database
    dtype = torch.float32 if dataset.database.device.type == "cpu" else dataset.database.dtype
    if metric.name == "cosine":
        vectors = (
            torch.nn.functional.normalize(vectors[0].float(), dim=1),
            torch.nn.functional.normalize(vectors[1].float(), dim=1),
        )
    queries, database = (each.to(dtype).contiguous() for each in vectors)
    return queries, database
