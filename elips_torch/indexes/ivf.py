"""What all indexes with inverted files share: training of the centroids, and probing."""

import logging
import operator
from abc import abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from elips_torch.core.dispatch import Explanation, explain_choice
from elips_torch.core.errors import ArgumentError, NotEmptyError, NotFittedError
from elips_torch.core.tiling import DEFAULT_WORKSPACE_BYTES, spans
from elips_torch.core.user_warnings import warn_user
from elips_torch.core.validation import bad_queries, check_count, check_k, check_vectors, check_workspace
from elips_torch.indexes import faiss_mirror
from elips_torch.indexes.base import Index, known_indexes
from elips_torch.indexes.flat import FlatIndex
from elips_torch.indexes.list_balance import FEW_PER_LIST, BalanceWatch, imbalance_factor
from elips_torch.indexes.listed_rows import ListedRows
from elips_torch.indexes.untraced import untraced
from elips_torch.kernels.list_layout import DecodedRows, RowDecoder
from elips_torch.kernels.prepared_native import PreparedSearch
from elips_torch.kernels.ranking import merge_ranked
from elips_torch.kernels.selection import Selection
from elips_torch.ops.assign import assign
from elips_torch.ops.ivf_search import IMPLEMENTATIONS, describe, prepare_ivf, run_ivf, run_ivf_range
from elips_torch.quantizers.kmeans import KMeans

logger = logging.getLogger("elips_torch")

# The lists to read are found for so many queries at a time that they take this part of the workspace.
_PROBES_SHARE = 8
# The number and the score of a list, while they are found.
_PROBE_BYTES = 40


class IVFIndex(ListedRows):
    """Vectors in lists, one per centroid, of which a search reads those nearest to the query.

    A subclass names the row tensors of its payload beside "ids" and "assignments", and writes
    `_encode_payload` and `_decode`.

    Args:
        dim: D, size of a vector.
        nlist: number of lists.
        metric: name of the distance kind, or an alias.
        nprobe: number of lists that `search` reads.
        k: number of neighbours that `search` returns by default.
        coarse: an empty index of centroids, or one with ids 0 to ``nlist - 1``, that finds the lists
            to read. Default: a `FlatIndex` under "ip" or "cosine" where that is the metric, else "l2".
        niter: passes of k-means over the training vectors.
        seed: of the random numbers of k-means.
        p: exponent of metric "lp".
        device: where the database lies.
        index_in_state_dict: whether checkpoints hold the database, and what `fit` has learned.
        check_finite: whether vectors and queries are checked for NaN and infinity.
        workspace_bytes: limit on temporary memory of a search, in bytes.
    """

    search_parameters: ClassVar[tuple[str, ...]] = ("nprobe", "workspace_bytes")
    tuned_parameters: ClassVar[tuple[str, ...]] = ("nprobe",)

    def __init__(
        self,
        dim: int,
        nlist: int,
        metric: str = "l2",
        *,
        nprobe: int = 8,
        k: int = 10,
        coarse: Index | None = None,
        niter: int = 20,
        seed: int = 0,
        p: float | None = None,
        device: torch.device | str | None = None,
        index_in_state_dict: bool = True,
        check_finite: bool = True,
        workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    ) -> None:
        super().__init__(
            dim,
            nlist,
            metric,
            coarse=coarse,
            k=k,
            p=p,
            device=device,
            index_in_state_dict=index_in_state_dict,
            check_finite=check_finite,
            workspace_bytes=workspace_bytes,
        )
        self.nprobe = nprobe
        self.niter = check_count("niter", niter)
        self.seed = seed
        self._said_clamped = False
        self._balance = BalanceWatch()

    # What a subclass writes.

    @abstractmethod
    def _encode_payload(self, vectors: Tensor, assignments: Tensor) -> dict[str, Tensor]:
        """Return the rows to store for ``(N, D)`` vectors in lists ``(N,)``, by name of the row tensor."""

    def _fit_payload(self, vectors: Tensor, centroids: Tensor) -> None:
        """Learn what the payload needs; on failure nothing has changed, and centroids are not kept."""

    def _decoder(self) -> RowDecoder:
        """Return what gives searches the vectors of rows."""
        return DecodedRows(self._decode, self._candidate_dtype(), self.dim)

    # What there is to know.

    @property
    def nprobe(self) -> int:
        """Number of lists that `search` reads."""
        return self._nprobe

    @nprobe.setter
    def nprobe(self, nprobe: int) -> None:
        self._nprobe = check_count("nprobe", nprobe)

    @property
    def centroids(self) -> Tensor:
        """``(nlist, D)``, the centroid of each list.

        Raises:
            NotFittedError: before `fit`.
        """
        self._check_fitted("centroids")
        return self.coarse.reconstruct(torch.arange(self.nlist, device=self.coarse.device))

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        lists = f", nlist={self.nlist}, nprobe={self.nprobe}"
        if not self.is_trained or self.ids.is_meta:
            return super().extra_repr() + lists + ("" if self.ids.is_meta else ", not fitted")
        sizes = self.list_sizes()
        spread = f", list_sizes={int(sizes.min())}..{int(sizes.max())}"
        spread += f", imbalance={imbalance_factor(sizes):.2f}"
        return super().extra_repr() + lists + (spread if self.ntotal else "")

    def config(self) -> dict[str, Any]:
        """Return the constructor keywords that make an empty index like this one, for JSON."""
        coarse = None if self._has_own_coarse else [type(self.coarse).__name__, self.coarse.config()]
        return {
            "dim": self.dim,
            "nlist": self.nlist,
            "metric": self.metric,
            "nprobe": self.nprobe,
            "k": self.k,
            "coarse": coarse,
            "niter": self.niter,
            "seed": self.seed,
            "p": self.p,
            "index_in_state_dict": self.index_in_state_dict,
            "check_finite": self.check_finite,
            "workspace_bytes": self.workspace_bytes,
        }

    @classmethod
    def _from_config(cls, config: dict[str, Any], device: torch.device | str | None) -> Self:
        if config.get("coarse") is not None:
            name, settings = config["coarse"]
            config = {**config, "coarse": known_indexes()[name]._from_config(settings, device)}
        return super()._from_config(config, device)

    def explain(self, queries: Tensor, k: int | None = None, *, implementation: str = "auto") -> Explanation:
        """Return which implementation would serve `search` and why the others would not, shown as text."""
        check_vectors("queries", queries, dim=self.dim, allow_single=True)
        rows = queries[None] if queries.ndim == 1 else queries
        count = self.k if k is None else check_k(k)
        request = describe(rows, self.lists.layout, self._decoder(), self._metric, count)
        known = (*IMPLEMENTATIONS, faiss_mirror.mirror_entry(self))
        return explain_choice("ivf_search", known, request, implementation)

    # Verbs that change it.

    @untraced
    def fit(self, vectors: Tensor) -> Self:
        """Learn the centroids of the lists by k-means; spherical under "ip" and "cosine".

        Args:
            vectors: ``(N, D)``, at least ``nlist``, better 39 or more for each list; of more than 256
                for each list, k-means draws a sample.

        Returns:
            The index itself.

        Raises:
            NotEmptyError: the index holds vectors, which are in the lists of what was learned before;
                `reset` first.
            ArgumentError: fewer than ``nlist`` vectors, or than the codes need.
            ElipsError: as for `add`.
        """
        if self.ntotal:
            raise NotEmptyError(
                f"fit takes an empty index, this one holds {self.ntotal} vectors in the lists that it has; "
                "call reset() before, and add them again after"
            )
        vectors = self._check_new(vectors)
        name, least = max(self._least_to_fit().items(), key=operator.itemgetter(1))
        if vectors.shape[0] < least:
            raise ArgumentError(
                f"vectors has {vectors.shape[0]} rows, expected at least {name} = {least} to fit, "
                f"better {max(least, FEW_PER_LIST * self.nlist)} or more"
            )
        if vectors.shape[0] < FEW_PER_LIST * self.nlist:
            warn_user(
                f"vectors has {vectors.shape[0]} rows to fit {self.nlist} lists on, expected "
                f"{FEW_PER_LIST * self.nlist} or more: {FEW_PER_LIST} for each"
            )
        kmeans = KMeans(
            self.nlist,
            niter=self.niter,
            seed=self.seed,
            metric=self._coarse_metric,
            device=self.device,
            min_points_per_centroid=0,
            workspace_bytes=self.workspace_bytes,
        )
        centroids = kmeans.fit(vectors).centroids
        if self._has_own_coarse:
            # It takes any centroids; only what follows can fail.
            self._fit_payload(vectors, centroids)
            self._set_centroids(centroids)
        else:
            self._fit_around(vectors, centroids)
        self._balance = BalanceWatch()
        return self

    def _least_to_fit(self) -> dict[str, int]:
        """Return, under the names of what asks for them, how many vectors `fit` cannot do without."""
        return {"nlist": self.nlist}

    def _fit_around(self, vectors: Tensor, centroids: Tensor) -> None:
        """Fill a coarse index of the user's, which may refuse, and learn the payload."""
        before = self.coarse.reconstruct(self.coarse.ids) if self.coarse.ntotal else None
        try:
            if not self.coarse.is_trained:
                self.coarse.fit(centroids)
            self._set_centroids(centroids)
            self._fit_payload(vectors, centroids)
        except Exception:
            # What failed leaves the centroids that there were.
            self._set_centroids(before)
            raise

    def _set_centroids(self, centroids: Tensor | None) -> None:
        self.coarse.reset()
        if centroids is not None:
            self.coarse.add(centroids, ids=torch.arange(self.nlist, device=self.device))

    def _encode(self, vectors: Tensor) -> dict[str, Tensor]:
        self._check_fitted("add")
        assignments = self._assign(vectors)
        payload = self._encode_payload(vectors, assignments)
        return {**payload, "assignments": assignments.to(torch.int32)}

    def _assign(self, vectors: Tensor) -> Tensor:
        """Return the list of each vector ``(N, D)``, ``(N,)`` int64."""
        if isinstance(self.coarse, FlatIndex) and self.coarse.metric in ("l2", "ip", "cosine"):
            return assign(vectors, self.coarse.vectors, self.coarse.metric, self.workspace_bytes)
        # No list is nearest to a vector with NaN: any will do.
        return self.coarse.search(vectors, 1).ids[:, 0].clamp_min(0)

    def _check_fitted(self, verb: str) -> None:
        if not self.is_trained:
            raise NotFittedError(f"{verb} needs a fitted index: call fit(vectors) first")

    # How searches run.

    def _search(
        self,
        queries: Tensor,
        k: int,
        selection: Selection,
        implementation: str,
        parameters: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        n_probes = self._n_probes(parameters)
        workspace = check_workspace(self._parameter(parameters, "workspace_bytes"))
        if faiss_mirror.is_asked_for(implementation, "ivf_search", IMPLEMENTATIONS):
            self._check_fitted("search")
            return faiss_mirror.search_mirror(self, queries, k, selection, n_probes)
        return self._search_prepared(
            queries,
            k,
            selection,
            implementation,
            (n_probes, workspace),
            lambda: self._prepare(queries, k, n_probes, implementation, workspace),
            lambda some: self._search_lists(some, k, n_probes, selection, implementation, workspace),
        )

    def _search_lists(
        self,
        queries: Tensor,
        k: int,
        n_probes: int,
        selection: Selection,
        implementation: str,
        workspace: int,
    ) -> tuple[Tensor, Tensor]:
        """Find the nearest lists, search them, and read on for queries that have found too little."""
        self._check_fitted("search")
        bad = bad_queries(queries, self._metric) if self.check_finite else None
        ranks = self._current_id_map().ranks(self.ids)
        layout, decode = self.lists.layout, self._decoder()

        def read(chosen: Tensor | slice, n_read: int, n_probes: int) -> tuple[Tensor, Tensor]:
            return run_ivf(
                queries[chosen],
                self._nearest_lists(queries[chosen], n_probes, workspace, n_read),
                layout,
                decode,
                k,
                self._metric,
                ranks=ranks,
                selection=selection.for_queries(chosen),
                implementation=implementation,
                workspace_bytes=workspace - workspace // _PROBES_SHARE,
                check_finite=False,
            )

        parts = [read(part, 0, n_probes) for part in self._blocks(queries, n_probes, workspace)]
        scores, rows = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
        if bad is not None:
            scores.masked_fill_(bad[:, None], torch.nan)
            rows.masked_fill_(bad[:, None], -1)
        while n_probes < self.nlist and not bool((rows >= 0).all()):
            # Queries that have found fewer than there are read more lists.
            short = self._short(rows, k, selection)
            pending = (short if bad is None else short & ~bad).nonzero()[:, 0]
            if not pending.numel():
                break
            n_read, n_probes = n_probes, min(2 * n_probes, self.nlist)
            for block in self._blocks(pending, n_probes, workspace):
                part = pending[block]
                more = read(part, n_read, n_probes)
                if self.coarse.is_exact:
                    # These lists come beside those that have been read, not again with them.
                    both = torch.cat([scores[part], more[0]], 1), torch.cat([rows[part], more[1]], 1)
                    more = merge_ranked(self._metric, *both, k, ranks)
                scores[part], rows[part] = more
        return scores, rows

    def _searched_tensors(self) -> tuple[Tensor, ...]:
        coarse = self.coarse
        centroids = coarse._row_tensors() if isinstance(coarse, FlatIndex) else ()
        return super()._searched_tensors() + centroids

    def _prepare(
        self, queries: Tensor, k: int, n_probes: int, implementation: str, workspace: int
    ) -> PreparedSearch | None:
        """Prepare a search of all rows for queries ``(Q, D)`` like these; None where that cannot be."""
        # All lists need no search among the centroids.
        if not self.is_trained or not isinstance(self.coarse, FlatIndex) or n_probes == self.nlist:
            return None
        if len(self._blocks(queries, n_probes, workspace)) > 1:
            return None
        coarse = self.coarse._prepare(queries, n_probes, "auto", workspace)
        if coarse is None:
            return None
        return prepare_ivf(
            queries,
            coarse,
            self.lists.layout,
            self._decoder(),
            k,
            self._metric,
            ranks=self._current_id_map().ranks(self.ids),
            implementation=implementation,
            workspace_bytes=workspace - workspace // _PROBES_SHARE,
        )

    def _blocks(self, queries: Tensor, n_probes: int, workspace_bytes: int) -> list[slice]:
        """Return parts of the queries whose probes fit a share of the workspace; at least one."""
        step = max(1, workspace_bytes // _PROBES_SHARE // (_PROBE_BYTES * n_probes))
        return [slice(*span) for span in spans(queries.shape[0], step)] or [slice(0, 0)]

    def _range_search(
        self,
        queries: Tensor,
        radius: Tensor,
        selection: Selection,
        implementation: str,
        parameters: dict[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor]:
        self._check_fitted("range_search")
        n_probes = self._n_probes(parameters)
        workspace = check_workspace(self._parameter(parameters, "workspace_bytes"))
        ranks = self._current_id_map().ranks(self.ids)
        parts = [
            run_ivf_range(
                queries[part],
                self._nearest_lists(queries[part], n_probes, workspace),
                self.lists.layout,
                self._decoder(),
                radius[part],
                self._metric,
                ranks=ranks,
                selection=selection.for_queries(part),
                implementation=implementation,
                workspace_bytes=workspace - workspace // _PROBES_SHARE,
                check_finite=self.check_finite,
            )
            for part in self._blocks(queries, n_probes, workspace)
        ]
        if len(parts) == 1:
            return parts[0]
        lims, scores, rows = zip(*parts, strict=True)
        counts = torch.cat([each.diff() for each in lims])
        return torch.nn.functional.pad(counts.cumsum(0), (1, 0)), torch.cat(scores), torch.cat(rows)

    def _n_probes(self, parameters: dict[str, Any]) -> int:
        nprobe = check_count("nprobe", self._parameter(parameters, "nprobe"))
        if nprobe > self.nlist and not self._said_clamped:
            self._said_clamped = True
            logger.warning("nprobe is %d, there are %d lists: all are read", nprobe, self.nlist)
        return min(nprobe, self.nlist)

    def _nearest_lists(self, queries: Tensor, n_probes: int, workspace_bytes: int, read: int = 0) -> Tensor:
        """Return the lists nearest to each query, ``(Q, P)`` int64; -1 where the search found none.

        Where the search is exact, without the nearest ones that have been read already.
        """
        is_exact = self.coarse.is_exact
        if n_probes == self.nlist and not (is_exact and read):
            return torch.arange(self.nlist, device=queries.device).expand(queries.shape[0], -1)
        nearest = self.coarse.search(queries, n_probes, workspace_bytes=workspace_bytes).ids
        return nearest[:, read:] if is_exact else nearest

    def _short(self, rows: Tensor, k: int, selection: Selection) -> Tensor:
        """Return bool ``(Q,)``, True where fewer of ``rows (Q, K)`` were found than a query may see."""
        found = (rows >= 0).sum(1)
        wanted: Tensor | int = min(k, self.ntotal)
        short = found < wanted
        if selection.mask is not None and bool(short.any()):
            short &= found < selection.mask.sum(-1)
        return short

    def _append(self, encoded: dict[str, Tensor], ids: Tensor, *, automatic: bool) -> Tensor:
        # Before anything changes: a warning may be an error here.
        self._balance.look(self.assignments, encoded["assignments"], self.nlist)
        return super()._append(encoded, ids, automatic=automatic)

    def _keep_rows(self, keep: Tensor) -> None:
        super()._keep_rows(keep)
        self._balance.shrink(self.ntotal)
