"""k-means clustering."""

from collections.abc import Iterable, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from elips_torch.core.errors import ArgumentError, NotFittedError
from elips_torch.core.metric import resolve_metric
from elips_torch.core.progress import with_progress
from elips_torch.core.tiling import DEFAULT_WORKSPACE_BYTES, even_cuts
from elips_torch.core.user_warnings import warn_user
from elips_torch.core.validation import (
    check_count,
    check_flag,
    check_k,
    check_values,
    check_vectors,
    check_workspace,
)
from elips_torch.ops.assign import assign, vector_codes
from elips_torch.quantizers.learned import Learned, in_float32, learning
from elips_torch.quantizers.lloyd import (
    batch_step,
    full_step,
    normalised,
    replace_unused,
    squared_distances,
)
from elips_torch.quantizers.seeding import plus_plus_start, sample_rows, sampled_start

_METRICS = ("l2", "ip", "cosine")
_STARTS = {"sample": sampled_start, "k-means++": plus_plus_start}


class KMeans(Learned):
    """k-means clustering (Lloyd, Least squares quantization in PCM, 1982).

    Centroids depend on the vectors and the seed alone: not on torch's own random numbers, the number
    of threads, or the settings of the caller. Vectors are assigned exactly, by the metric's definition,
    of equally near centroids to the first. A centroid that loses all its vectors takes the place of
    a vector in the cluster with the largest sum of squared distances.

    Args:
        k: K, number of clusters.
        niter: passes over the training vectors, per stage of `dims`; fewer when nothing changes any more.
        seed: of the random numbers.
        metric: "l2", "ip" or "cosine". The latter two assign to the largest product with centroids of
            length 1 (spherical k-means); "cosine" also scales the training vectors to length 1.
        spherical: scale centroids to length 1 after each pass. Default: only as the metric asks.
        init: "sample" starts from vectors drawn at random, "k-means++" from vectors drawn far apart
            (Arthur and Vassilvitskii, 2007), which takes about as long as one to three passes.
        batch_size: train by batches of so many vectors (Sculley, Web-scale k-means clustering, 2010)
            rather than by whole passes: faster to a fair result on many vectors.
        dims: numbers of leading features to cluster by first, ascending; then follow all. Faster on
            vectors whose leading features hold most of the variance, as after `PCA`.
        max_points_per_centroid: train on a random sample of at most so many vectors per centroid;
            None trains on all.
        min_points_per_centroid: warn when there are fewer than so many vectors per centroid.
        progress: show a progress bar.
        workspace_bytes: limit on temporary memory of an assignment, in bytes. Default 256 MiB.

    Attributes:
        centroids: ``(K, D)`` float32; empty before `fit`.
        history: mean squared distance of the training vectors to their centroids, at each pass of the
            last stage before its update.

    Raises:
        ElipsError: an argument has a wrong type or value.

    >>> import torch
    >>> vectors = torch.tensor([[0.0, 0.0], [0.0, 1.0], [9.0, 9.0], [9.0, 8.0]])
    >>> kmeans = KMeans(2, min_points_per_centroid=1).fit(vectors)
    >>> kmeans.centroids[kmeans.predict(vectors)].tolist()
    [[0.0, 0.5], [0.0, 0.5], [9.0, 8.5], [9.0, 8.5]]
    """

    learned_buffers: ClassVar[tuple[str, ...]] = ("centroids",)

    centroids: Tensor

    def __init__(
        self,
        k: int,
        *,
        niter: int = 20,
        seed: int = 0,
        metric: str = "l2",
        spherical: bool = False,
        init: str = "sample",
        batch_size: int | None = None,
        dims: Sequence[int] | None = None,
        max_points_per_centroid: int | None = 256,
        min_points_per_centroid: int = 39,
        progress: bool = False,
        device: torch.device | str | None = None,
        workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    ) -> None:
        super().__init__(device)
        self.k = check_k(k)
        self.niter = check_count("niter", niter, 0)
        self.seed = check_count("seed", seed, 0)
        self._metric = resolve_metric(metric)
        if self._metric.name not in _METRICS:
            raise ArgumentError(f"metric is {metric!r}, expected one of {', '.join(map(repr, _METRICS))}")
        self.spherical = check_flag("spherical", spherical) or self._metric.name != "l2"
        if init not in _STARTS:
            raise ArgumentError(f"init is {init!r}, expected one of {', '.join(map(repr, _STARTS))}")
        self.init = init
        self.batch_size = None if batch_size is None else check_count("batch_size", batch_size, 1)
        self.dims = tuple(check_count("dims", dim, 1) for dim in dims or ())
        if list(self.dims) != sorted(set(self.dims)):
            raise ArgumentError(f"dims is {self.dims}, expected ascending numbers of features")
        if max_points_per_centroid is not None:
            check_count("max_points_per_centroid", max_points_per_centroid, 1)
        self.max_points_per_centroid = max_points_per_centroid
        self.min_points_per_centroid = check_count("min_points_per_centroid", min_points_per_centroid, 0)
        self.progress = check_flag("progress", progress)
        self.workspace_bytes = check_workspace(workspace_bytes)
        self.history: list[float] = []

    @property
    def metric(self) -> str:
        """Canonical name of the metric."""
        return self._metric.name

    @property
    def dim(self) -> int | None:
        """D, size of a vector; None before `fit`."""
        return self.centroids.shape[1] if self.is_trained else None

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return f"k={self.k}, dim={self.dim}, metric={self.metric!r}, niter={self.niter}, seed={self.seed}"

    def _expected_shapes(self) -> dict[str, tuple[int | None, ...]]:
        return {"centroids": (self.k, None)}

    def forward(self, vectors: Tensor) -> Tensor:
        """Same as `predict`."""
        return self.predict(vectors)

    def predict(self, vectors: Tensor) -> Tensor:
        """Return the number of the nearest centroid of each vector, of equals the lowest.

        Args:
            vectors: ``(N, D)`` float32, float16, bfloat16 or float64 (rounded to float32), on the
                centroids' device; finite.

        Returns:
            ``(N,)`` int64.

        Raises:
            NotFittedError: before `fit`.
            ElipsError: the vectors do not fit.
        """
        vectors = self._checked(vectors)
        return assign(vectors, self.centroids, self.metric, self.workspace_bytes)

    def quantization_error(self, vectors: Tensor) -> float:
        """Return the mean squared distance of vectors ``(N, D)`` to their nearest centroids.

        Times N this is what scikit-learn calls inertia. For "cosine" the vectors are scaled to length 1.
        """
        labels = self.predict(vectors)
        with learning(vectors.device):
            rows = self._prepared(vectors)
            return float(squared_distances(rows, self.centroids.float(), labels).double().mean())

    def fit(self, vectors: Tensor, centroids: Tensor | None = None) -> Self:
        """Learn the centroids.

        Args:
            vectors: ``(N, D)`` float32, float16, bfloat16 or float64, at least K of them; finite. The
                centroids will lie on their device.
            centroids: ``(K, D)`` to start from; default as `init` says.

        Returns:
            The module itself.

        Raises:
            ShapeError, DtypeError, DeviceError: the vectors or the centroids do not fit.
            ArgumentError: fewer vectors than clusters.
            NonFiniteError: NaN or infinity.
        """
        check_vectors("vectors", vectors)
        vectors = in_float32(vectors)
        n, dim = vectors.shape
        if n < self.k:
            raise ArgumentError(f"vectors has {n} rows, expected at least k = {self.k}")
        if self.dims and self.dims[-1] > dim:
            raise ArgumentError(f"dims is {self.dims}, expected at most the {dim} features of vectors")
        check_values("vectors", vectors, self._metric)
        if centroids is not None:
            check_vectors("centroids", centroids, dim=dim, owner="vectors", device=vectors.device)
            if len(centroids) != self.k:
                raise ArgumentError(f"centroids has {len(centroids)} rows, expected k = {self.k}")
            check_values("centroids", centroids, self._metric)
        wanted = self.min_points_per_centroid * self.k
        if n < wanted:
            warn_user(
                f"vectors has {n} rows to learn {self.k} centroids from, expected at least {wanted}; "
                "min_points_per_centroid sets this limit"
            )
        with learning(vectors.device):
            learned, history = self._learn(vectors, centroids)
        self.centroids, self.history = learned, history
        return self

    def _learn(self, vectors: Tensor, start: Tensor | None) -> tuple[Tensor, list[float]]:
        generator = torch.Generator("cpu").manual_seed(self.seed)
        if self.max_points_per_centroid is not None and len(vectors) > self.max_points_per_centroid * self.k:
            rows = sample_rows(len(vectors), self.max_points_per_centroid * self.k, generator)
            vectors = vectors[rows.to(vectors.device)]
        vectors = self._prepared(vectors)
        stages = [*(dim for dim in self.dims if dim < vectors.shape[1]), vectors.shape[1]]
        part = vectors[:, : stages[0]].contiguous()
        if start is None:
            centroids = _STARTS[self.init](part, self.k, generator)
        else:
            centroids = start.detach().float()[:, : stages[0]].clone()
        if self.spherical:
            centroids = normalised(centroids, centroids)
        ticks = iter(with_progress(range(len(stages) * self.niter), self.progress, "k-means", "pass"))
        history: list[float] = []
        for number, dim in enumerate(stages):
            if number:
                labels = self._assign(part, centroids)
                part = vectors[:, :dim].contiguous()
                # The means of the clusters, in more features.
                padded = torch.nn.functional.pad(centroids, (0, dim - centroids.shape[1]))
                centroids, _ = full_step(part, padded, labels, self.spherical)
            if self.batch_size is None:
                centroids, history = self._full_passes(part, centroids, ticks)
            else:
                centroids, history = self._batched_passes(part, centroids, generator, ticks, self.batch_size)
        for _ in ticks:
            pass
        return centroids, history

    def _full_passes(
        self, vectors: Tensor, centroids: Tensor, ticks: Iterable[int]
    ) -> tuple[Tensor, list[float]]:
        history: list[float] = []
        before: Tensor | None = None
        codes = vector_codes(vectors, centroids, self.workspace_bytes)
        for _, _ in zip(range(self.niter), ticks, strict=False):
            labels = assign(vectors, centroids, self.metric, self.workspace_bytes, codes)
            if before is not None and torch.equal(labels, before):
                break
            centroids, error = full_step(vectors, centroids, labels, self.spherical)
            history.append(error)
            before = labels
        return centroids, history

    def _batched_passes(
        self,
        vectors: Tensor,
        centroids: Tensor,
        generator: torch.Generator,
        ticks: Iterable[int],
        batch_size: int,
    ) -> tuple[Tensor, list[float]]:
        history: list[float] = []
        seen = torch.zeros(self.k, dtype=torch.float64, device=vectors.device)
        for _, _ in zip(range(self.niter), ticks, strict=False):
            order = sample_rows(len(vectors), len(vectors), generator).to(vectors.device)
            before, total = seen.clone(), 0.0
            for start, stop in even_cuts(len(vectors), batch_size):
                batch = vectors[order[start:stop]]
                labels = self._assign(batch, centroids)
                centroids, error = batch_step(batch, centroids, labels, seen, self.spherical)
                total += error
            unused = seen == before
            if bool(unused.any()):
                centroids = replace_unused(batch, centroids, labels, unused)
                seen.masked_fill_(unused, 0.0)
            history.append(total / len(vectors))
        return centroids, history

    def _assign(self, vectors: Tensor, centroids: Tensor) -> Tensor:
        return assign(vectors, centroids, self.metric, self.workspace_bytes)

    def _prepared(self, vectors: Tensor) -> Tensor:
        """Return the vectors as they are clustered, in float32."""
        vectors = vectors.float().contiguous()
        return normalised(vectors, vectors) if self.metric == "cosine" else vectors

    def _checked(self, vectors: Tensor) -> Tensor:
        if not self.is_trained:
            raise NotFittedError("KMeans has no centroids yet; call fit(vectors) first")
        check_vectors("vectors", vectors, dim=self.dim, owner="KMeans", device=self.centroids.device)
        vectors = in_float32(vectors)
        if vectors.device.type == "cpu" and not torch.compiler.is_compiling():
            check_values("vectors", vectors, self._metric)
        return vectors
