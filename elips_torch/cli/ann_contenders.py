"""Indexes with inverted lists that hold the same vectors: ours, and those of builds of faiss."""

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from elips_torch.cli.contenders import Contender, peer_vectors
from elips_torch.cli.datasets import Dataset
from elips_torch.core.errors import ArgumentError
from elips_torch.core.metric import Metric
from elips_torch.engines.faiss.builds import FaissBuild
from elips_torch.engines.faiss.inverted_file import PARALLEL_MODES, FaissInvertedFile
from elips_torch.indexes.factory import index_factory
from elips_torch.indexes.factory_parts import Place, parse
from elips_torch.indexes.flat import FlatIndex
from elips_torch.indexes.ivf import IVFIndex

NITER = 20
# Enough vectors for the mean of their distances.
_SAMPLE = 20_000


class Lists(Contender):
    """A contender whose searches read the nearest lists.

    Attributes:
        nprobe: how many.
        facts: seconds of training and adding, and what else is known of the filled index, for JSON.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.nprobe = 1
        self.facts: dict[str, Any] = {}

    def _fill(self, fit: Callable[[], object], add: Callable[[], object]) -> None:
        for name, step in (("fit_seconds", fit), ("add_seconds", add)):
            begin = time.perf_counter()
            step()
            self.facts[name] = time.perf_counter() - begin


class OurLists(Lists):
    """An index of this library, with gradients off."""

    def __init__(self, dataset: Dataset, metric: Metric, description: str) -> None:
        super().__init__("ours")
        made = index_factory(dataset.dim, description, metric.name, niter=NITER)
        if not isinstance(made, IVFIndex):
            raise ArgumentError(
                f"--index is {description!r}, expected lists and how vectors are stored in them"
            )
        self.index = made
        self._queries = dataset.queries
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            self._fill(lambda: self.index.fit(dataset.database), lambda: self._add(dataset.database))
        self.warnings = [str(each.message) for each in said]
        self.facts |= {
            "memory_bytes": self.index.memory_bytes(),
            "imbalance_factor": self.index.imbalance_factor(),
            "quantization_error": quantization_error(dataset, metric, self.index.centroids),
        }

    def _add(self, vectors: Tensor) -> None:
        self.index.add(vectors)
        # The first search would make them.
        _ = self.index.lists

    def search(self, n_queries: int, k: int) -> Tensor:
        """Search the index."""
        with torch.inference_mode():
            return self.index.search(self._queries[:n_queries], k, nprobe=self.nprobe).ids


class FaissLists(Lists):
    """An inverted file of a build of faiss, over queries or over lists in parallel, whichever is faster."""

    def __init__(
        self,
        name: str,
        build: FaissBuild,
        dataset: Dataset,
        metric: Metric,
        description: str,
        centroids: Tensor | None,
    ) -> None:
        super().__init__(name)
        self._queries, database = peer_vectors(dataset, metric)
        kind = "l2" if metric.name == "l2" else "ip"
        said = {name: value for part in parse(description) for name, value in part.values.items()}
        self._file = FaissInvertedFile(build, dataset.dim, metric=kind, niter=NITER, **said)
        self._mode = PARALLEL_MODES[0]
        self._fill(lambda: self._file.train(database, centroids), lambda: self._file.add(database))
        self.facts["quantization_error"] = quantization_error(dataset, metric, self._file.centroids)

    def search(self, n_queries: int, k: int) -> Tensor:
        """Call faiss."""
        return self._file.search(self._queries[:n_queries], k, self.nprobe, self._mode)

    def variants(self, n_queries: int, k: int) -> Sequence[int]:
        """Return the ways to share the work among threads."""
        return PARALLEL_MODES

    def use(self, variant: int) -> None:
        """Share the work in a way."""
        self._mode, self.setting = variant, f"parallel_mode={variant}"


def check_description(description: str, dim: int) -> int:
    """Check that a description is one of plain inverted lists, and return their number.

    Raises:
        ArgumentError: it has no lists, or more than both libraries are given here.
    """
    parts = parse(description)
    places = [part.kind.place for part in parts]
    if places != [Place.LISTS, Place.VECTORS]:
        raise ArgumentError(
            f"--index is {description!r}, expected lists and how vectors are stored in them, such as "
            "IVF1024,Flat: transforms and refinement are not compared here"
        )
    index_factory(dim, description)
    return int(parts[0].values["nlist"])


def quantization_error(dataset: Dataset, metric: Metric, centroids: Tensor) -> float:
    """Return the mean squared distance of vectors to their nearest centroid, for "cosine" normalised."""
    database = dataset.database[:: max(1, len(dataset.database) // _SAMPLE)].float()
    if metric.name == "cosine":
        database = torch.nn.functional.normalize(database, dim=1)
    index = FlatIndex(dataset.dim, "l2", screen="none")
    index.add(centroids.float())
    return float(index.search(database, 1).scores.double().mean())
