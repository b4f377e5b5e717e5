"""The contract that every index keeps."""

import importlib
import inspect
import os
from abc import abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from elips_torch.core.dispatch import Explanation
from elips_torch.core.errors import (
    ImplementationError,
    IndexFileError,
    ParameterError,
)
from elips_torch.core.execution import needs_gradient, runs_directly
from elips_torch.core.results import RangeResult, SearchResult
from elips_torch.core.tiling import DEFAULT_WORKSPACE_BYTES
from elips_torch.core.validation import (
    FLOAT_DTYPES,
    as_radius,
    check_device,
    check_k,
    check_vectors,
    check_workspace,
)
from elips_torch.indexes.faiss_export import FaissExport
from elips_torch.indexes.files import read_index_file, write_index_file
from elips_torch.indexes.rows import Rows
from elips_torch.kernels.selection import Selection
from elips_torch.ops.candidate_scores import candidate_scores_op
from elips_torch.ops.index_search import format_parameters, index_range_search_op, index_search_op

_DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}


class Index(FaissExport, Rows):
    """A database of vectors that can be searched; base of all indexes.

    A subclass names its row tensors and writes `_encode`, `_decode`, `_search` and
    `_range_search`; this class validates, keeps the ids and does the rest.

    Args:
        dim: D, size of a vector.
        metric: name of the distance kind, or an alias.
        k: number of neighbours that `search` returns by default.
        p: exponent of metric "lp".
        device: where the database lies.
        index_in_state_dict: whether checkpoints hold the database.
        check_finite: whether vectors and queries are checked for NaN and infinity.
        workspace_bytes: limit on temporary memory of a search, in bytes.
    """

    # Search parameters: plain attributes that `search` takes as keywords for one call.
    search_parameters: ClassVar[tuple[str, ...]] = ("workspace_bytes",)

    def __init__(
        self,
        dim: int,
        metric: str = "l2",
        *,
        k: int = 10,
        p: float | None = None,
        device: torch.device | str | None = None,
        index_in_state_dict: bool = True,
        check_finite: bool = True,
        workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    ) -> None:
        super().__init__(
            dim,
            metric,
            p=p,
            device=device,
            index_in_state_dict=index_in_state_dict,
            check_finite=check_finite,
        )
        self.k = check_k(k)
        self.workspace_bytes = check_workspace(workspace_bytes)

    # What a subclass writes.

    @abstractmethod
    def _search(
        self,
        queries: Tensor,
        k: int,
        selection: Selection,
        implementation: str,
        parameters: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Return scores ``(Q, K)`` and rows ``(Q, K)``, -1 where there are fewer than k."""

    @abstractmethod
    def _range_search(
        self,
        queries: Tensor,
        radius: Tensor,
        selection: Selection,
        implementation: str,
        parameters: dict[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return lims ``(Q + 1,)``, scores ``(M,)`` and rows ``(M,)`` for radius ``(Q,)``."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Return the constructor keywords that make an empty index like this one, for JSON."""

    def explain(self, queries: Tensor, k: int | None = None, *, implementation: str = "auto") -> Explanation:
        """Return which implementation would serve `search` and why the others would not, shown as text."""
        raise ImplementationError(f"{type(self).__name__} has a single way to search")

    @property
    def is_exact(self) -> bool:
        """Whether results are exact by the definition of the metric."""
        return False

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        p = f", p={self.p:g}" if self.p is not None else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"dim={self.dim}, metric={self.metric!r}{p}, ntotal={self.ntotal}, k={self.k}, dtype={dtype}"

    def __repr__(self) -> str:
        # What an index is made of is its own business.
        return f"{type(self).__name__}({self.extra_repr()})"

    # Verbs that ask.

    def forward(self, queries: Tensor, k: int | None = None, **options: Any) -> SearchResult:
        """Same as `search`."""
        return self.search(queries, k, **options)

    def search(
        self,
        queries: Tensor,  # (Q, D) or (D,)
        k: int | None = None,
        *,
        mask: Tensor | None = None,  # (ntotal,) or (Q, ntotal)
        exclude: Tensor | None = None,  # (Q, M)
        exclude_self: bool = False,
        implementation: str = "auto",
        **parameters: Any,
    ) -> SearchResult:
        """Find the k nearest vectors of each query.

        With grad mode on, scores carry gradients to the queries (and to a learnable database), by
        the vectors as they were searched: the index may change before the backward pass. Until then
        the candidates, ``(Q, K, D)`` in the index's dtype, are kept beside the workspace. Inside
        `torch.compile` there is no graph break, and growth of the index does not recompile (that of a
        learnable one does).

        Args:
            queries: ``(Q, D)`` or ``(D,)`` float32, float16, bfloat16 or float64, on the index's
                device; finite.
            k: number of neighbours, at least 1; default is the index's ``k``. No upper limit.
            mask: bool ``(ntotal,)`` or ``(Q, ntotal)``; True keeps the vector. Column j stands for
                ``index.ids[j]``.
            exclude: int64 ``(Q, M)`` ids to leave out, per query; -1 and unknown ids are ignored.
            exclude_self: the queries are the stored vectors in the order of ``index.ids``, and none
                is to find itself.
            implementation: "auto", or a name that `explain` lists, which then serves or raises.
            **parameters: search parameters for this call, see ``search_parameters``.

        Returns:
            SearchResult: scores ``(Q, K)`` float32 and ids ``(Q, K)`` int64, best first; id -1 and
            the worst score where fewer than k vectors are left. 1-D for a 1-D query.

        Raises:
            ElipsError: an argument of wrong type, shape, dtype, device or value.
        """
        self._check_queries(queries)
        count = check_k(self.k if k is None else k)
        if parameters:
            self._check_parameters(parameters)
        single = queries.ndim == 1
        if single:
            queries = queries[None]
        database = self._learnable_vectors()
        if runs_directly(queries, database):
            scores, ids, _ = self._found(
                queries, count, mask, exclude, exclude_self, implementation, parameters
            )
        else:
            if not torch.compiler.is_compiling():
                # Compiled code may not touch a row tensor; there the operator checks when it runs.
                check_device("queries", queries, self.device, "the index")
            differentiable = needs_gradient(queries, database)
            scores, candidates, ids, rows = index_search_op(
                queries.detach(),
                mask,
                exclude,
                self._handle,
                count,
                exclude_self,
                implementation,
                format_parameters(parameters),
                differentiable and database is None,
                self._candidate_dtype(),
            )
            if differentiable:
                if database is not None:
                    candidates = _gather(database, rows)
                scores = self._candidate_scores(queries, candidates, ids, parameters)
        return SearchResult(scores[0], ids[0]) if single else SearchResult(scores, ids)

    def range_search(
        self,
        queries: Tensor,  # (Q, D) or (D,)
        radius: float | Tensor,  # or (Q,)
        *,
        mask: Tensor | None = None,  # (ntotal,) or (Q, ntotal)
        exclude: Tensor | None = None,  # (Q, M)
        exclude_self: bool = False,
        implementation: str = "auto",
        **parameters: Any,
    ) -> RangeResult:
        """Find all vectors within a radius of each query.

        Within means ``score < radius`` for distances and ``score > radius`` for "ip" and "cosine",
        compared in float32 with the radius rounded to float32.

        Args:
            queries: as for `search`.
            radius: one number, or ``(Q,)``, in the unit of the scores ("l2" is squared).
            mask: as for `search`.
            exclude: as for `search`.
            exclude_self: as for `search`.
            implementation: as for `search`.
            **parameters: as for `search`.

        Returns:
            RangeResult: lims ``(Q + 1,)``, scores ``(M,)`` and ids ``(M,)``; best first per query.

        Raises:
            ElipsError: an argument of wrong type, shape, dtype, device or value.
        """
        self._check_queries(queries)
        if not torch.compiler.is_compiling():
            check_device("queries", queries, self.device, "the index")
        self._check_parameters(parameters)
        queries = torch.atleast_2d(queries)
        limits = as_radius(radius, queries.shape[0], queries.device)
        database = self._learnable_vectors()
        if runs_directly(queries, database):
            scores, _, ids, _, lims = self._range_search_now(
                queries, limits, mask, exclude, exclude_self, implementation, parameters, False
            )
        else:
            differentiable = needs_gradient(queries, database)
            scores, candidates, ids, rows, lims = index_range_search_op(
                queries.detach(),
                limits,
                mask,
                exclude,
                self._handle,
                exclude_self,
                implementation,
                format_parameters(parameters),
                differentiable and database is None,
                self._candidate_dtype(),
            )
            if differentiable:
                if database is not None:
                    candidates = database.index_select(0, rows)
                hit = torch.repeat_interleave(lims.diff(), output_size=rows.shape[0])
                scores = self._candidate_scores(
                    queries.index_select(0, hit), candidates[:, None], ids[:, None], parameters
                )[:, 0]
        return RangeResult(lims, scores, ids)

    # Files.

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index to a safetensors file, which appears whole or not at all.

        The file holds the database whatever ``index_in_state_dict`` says.
        """
        in_state_dict, self.index_in_state_dict = self.index_in_state_dict, True
        try:
            tensors = self.state_dict()
        finally:
            self.index_in_state_dict = in_state_dict
        write_index_file(path, type(self).__name__, self.config(), tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Self:
        """Read an index of this class from a file.

        Args:
            path: a file that `save` wrote.
            device: where to put the database.

        Raises:
            IndexFileError: a truncated or foreign file, or one with another class of index.
            DeviceError: this machine has no such device.
        """
        return cls._restore(path, *read_index_file(path, device), device)

    @classmethod
    def _restore(
        cls,
        path: str | os.PathLike[str],
        name: str,
        config: dict[str, Any],
        tensors: dict[str, Tensor],
        device: torch.device | str,
    ) -> Self:
        where = repr(os.fspath(path))
        if name != cls.__name__:
            raise IndexFileError(f"{where} holds {name}, expected {cls.__name__}; load_index reads any class")
        try:
            index = cls._from_config(config, device)
            index.load_state_dict(tensors, assign=True)
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise IndexFileError(f"{where} does not fit {name}: {error}") from error
        dtype = _DTYPE_NAMES.get(config.get("dtype", ""))
        if dtype is not None and index.dtype != dtype:
            raise IndexFileError(f"{where} holds {index.dtype} vectors, its settings say {dtype}")
        return index

    @classmethod
    def _from_config(cls, config: dict[str, Any], device: torch.device | str | None) -> Self:
        """Return an empty index whose `config` this is."""
        dtype = _DTYPE_NAMES.get(config.get("dtype", ""))
        return cls(**(config if dtype is None else {**config, "dtype": dtype}), device=device)

    # How searches run.

    def _search_now(
        self,
        queries: Tensor,
        k: int,
        mask: Tensor | None,
        exclude: Tensor | None,
        exclude_self: bool,
        implementation: str,
        parameters: dict[str, Any],
        keep_candidates: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return scores, candidates ``(Q, K, D)`` or empty, ids and rows; no gradients, no tracing."""
        scores, ids, rows = self._found(queries, k, mask, exclude, exclude_self, implementation, parameters)
        if keep_candidates:
            candidates = self._decode(rows.clamp_min(0).flatten()) if self.ntotal else None
            if candidates is None:
                candidates = torch.zeros(
                    rows.numel(), self.dim, dtype=self._candidate_dtype(), device=self.device
                )
            return scores, candidates.view(*rows.shape, self.dim), ids, rows
        return scores, torch.empty(0, dtype=self._candidate_dtype(), device=self.device), ids, rows

    def _found(
        self,
        queries: Tensor,
        k: int,
        mask: Tensor | None,
        exclude: Tensor | None,
        exclude_self: bool,
        implementation: str,
        parameters: dict[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores, ids and rows ``(Q, K)``."""
        held = self.ids
        check_device("queries", queries, held.device, "the index")
        selection = self._selection(queries.shape[0], mask, exclude, exclude_self)
        if queries.requires_grad:
            queries = queries.detach()
        scores, rows = self._search(queries, k, selection, implementation, parameters)
        return scores, self._current_id_map().ids_of(rows, held), rows

    def _range_search_now(
        self,
        queries: Tensor,
        radius: Tensor,
        mask: Tensor | None,
        exclude: Tensor | None,
        exclude_self: bool,
        implementation: str,
        parameters: dict[str, Any],
        keep_candidates: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return scores, candidates ``(M, D)`` or empty, ids, rows and lims; no gradients, no tracing."""
        check_device("queries", queries, self.device, "the index")
        selection = self._selection(queries.shape[0], mask, exclude, exclude_self)
        lims, scores, rows = self._range_search(
            queries.detach(), radius, selection, implementation, parameters
        )
        candidates = torch.empty(0, dtype=self._candidate_dtype(), device=self.device)
        if keep_candidates:
            candidates = self._decode(rows)
        return scores, candidates, self.ids.index_select(0, rows), rows, lims

    def _candidate_scores(
        self, queries: Tensor, candidates: Tensor, ids: Tensor, parameters: dict[str, Any]
    ) -> Tensor:
        """Return the scores of candidates ``(Q, K, D)`` with gradients."""
        workspace = self._parameter(parameters, "workspace_bytes")
        scores: Tensor = candidate_scores_op(queries, candidates, ids, self.metric, self._metric.p, workspace)
        return scores

    def _candidate_dtype(self) -> torch.dtype:
        """Dtype of decoded vectors; may not read a row tensor, since compiled code asks."""
        return torch.float32

    def _learnable_vectors(self) -> Tensor | None:
        """Return the database if it is a parameter; may not read a buffer, since compiled code asks."""
        return None

    def _check_queries(self, queries: Tensor) -> None:
        """Raise unless queries are ``(Q, D)`` or ``(D,)`` of a dtype that the index takes."""
        check_vectors("queries", queries, dim=self.dim, allow_single=True)

    def _check_parameters(self, parameters: dict[str, Any]) -> None:
        for name, value in parameters.items():
            if name not in self.search_parameters:
                known = ", ".join(self.search_parameters)
                raise ParameterError(
                    f"{type(self).__name__} has no search parameter {name!r}, it has {known}"
                )
            if type(value) not in (int, float):
                raise ParameterError(f"{name} is {value!r}, expected an int or a float")

    def _parameter(self, parameters: dict[str, Any], name: str) -> Any:
        """Return a search parameter of this call, or its default."""
        return parameters.get(name, getattr(self, name))


def known_indexes() -> dict[str, type[Index]]:
    """Return every class of index that the library has and the program has defined, by name."""
    # The catalogue imports all of the library's own, and those import this file.
    importlib.import_module("elips_torch.indexes.catalog")
    return {name: index for name, index in _subclasses(Index).items() if not inspect.isabstract(index)}


def _subclasses(parent: type[Any]) -> dict[str, type[Index]]:
    found: dict[str, type[Index]] = {}
    for index in parent.__subclasses__():
        found.update({index.__name__: index, **_subclasses(index)})
    return found


def _gather(database: Tensor, rows: Tensor) -> Tensor:
    """Return the vectors ``(Q, K, D)`` of rows ``(Q, K)``; zeros where the row is -1."""
    if not database.shape[0]:
        return database.new_zeros((*rows.shape, database.shape[1]))
    picked = database.index_select(0, rows.clamp_min(0).flatten())
    return picked.view(*rows.shape, database.shape[1])
