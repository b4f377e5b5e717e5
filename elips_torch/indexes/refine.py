"""An index that rescores what another has found, by the vectors as they were added."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from elips_torch.core.errors import ArgumentError, DtypeError, IndexFileError
from elips_torch.core.ordering import order_keys
from elips_torch.core.validation import FLOAT_DTYPES, check_usable, check_workspace
from elips_torch.indexes.base import _DTYPE_NAMES, Index, known_indexes
from elips_torch.indexes.rows import Rows
from elips_torch.indexes.storage import durable, owned
from elips_torch.indexes.untraced import untraced
from elips_torch.indexes.wrappers import WrapperIndex
from elips_torch.kernels.best_candidates import best_candidates
from elips_torch.kernels.definition import score_candidates, score_pairs
from elips_torch.kernels.ranking import merge_ranked
from elips_torch.kernels.selection import Selection


class RefineIndex(WrapperIndex):
    """An index around a coarser one that keeps the vectors, too, and scores what that finds by them.

    A search takes the ``k * k_factor`` best of the inner index and orders them by the definition of
    the metric on the originals; scores, gradients and `reconstruct` are theirs. A range search rescores
    what the inner index finds within the radius.

    Args:
        index: the inner index, such as an `IVFPQIndex` or a `PreTransformIndex`; empty, and no `MemoryBank`.
        k_factor: how many times k candidates the inner index is asked for, at least 1.
        dtype: how originals are stored: float32, float16, bfloat16 or float64.
        refine_device: where the originals lie, whatever device the rest moves to; default is with the
            rest. Candidates then travel at each search. Files do not say it.

    Attributes:
        index: the inner index; what it knows, such as ``index.list_sizes()``, is asked there.
        vectors: ``(ntotal, D)``, the originals.

    Raises:
        ElipsError: an argument has a wrong type or value.

    >>> import torch
    >>> from elips_torch import PCA, FlatIndex, PreTransformIndex
    >>> vectors = torch.tensor([[0.0, 0.0], [1.0, 2.0], [2.0, 4.0], [2.0, 3.0]])
    >>> index = RefineIndex(PreTransformIndex(PCA(2, 1), FlatIndex(1))).fit(vectors)
    >>> index.add(vectors)
    tensor([0, 1, 2, 3])
    >>> index.search(torch.tensor([2.0, 3.0]), k=1)
    SearchResult(scores=tensor([0.]), ids=tensor([3]))
    """

    row_tensors: ClassVar[tuple[str, ...]] = ("vectors",)
    own_parameters: ClassVar[tuple[str, ...]] = ("k_factor",)

    vectors: Tensor

    def __init__(
        self,
        index: Index,
        k_factor: float = 4,
        dtype: torch.dtype = torch.float32,
        *,
        refine_device: torch.device | str | None = None,
    ) -> None:
        super().__init__(index, getattr(index, "dim", 0))
        if index.ntotal:
            raise ArgumentError(f"index holds {index.ntotal} vectors, expected an empty one")
        if dtype not in FLOAT_DTYPES:
            raise DtypeError(
                f"dtype is {dtype!r}, expected torch.float32, torch.float16, torch.bfloat16 or torch.float64"
            )
        for part in index.modules():
            if isinstance(part, Rows) and part.drops_rows:
                raise ArgumentError(
                    f"index is or has inside a {type(part).__name__}, which drops vectors by itself; their "
                    "originals would stay"
                )
        self.k_factor = _check_factor(k_factor)
        check_usable("refine_device", refine_device)
        self.refine_device = None if refine_device is None else torch.device(refine_device)
        with durable():
            device = index.device if self.refine_device is None else self.refine_device
            self.register_buffer("vectors", torch.empty(0, self.dim, dtype=dtype, device=device))
        self._dtype = dtype
        self._pending: tuple[Tensor, Tensor, float, bool] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """How originals are stored."""
        return self._dtype

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.index!r}, k_factor={self.k_factor:g}, dtype={dtype}"

    def config(self) -> dict[str, Any]:
        """Return the class and settings of the index, and those of refinement, for JSON."""
        return {
            "index": self._inner_config(),
            "k_factor": self.k_factor,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @classmethod
    def _from_config(cls, config: dict[str, Any], device: torch.device | str | None) -> Self:
        (name, inner), dtype = config["index"], _DTYPE_NAMES[config["dtype"]]
        if name not in known_indexes():
            raise IndexFileError(f"there is no class {name}; import it first")
        index = known_indexes()[name]._from_config(inner, device)
        return cls(index, config["k_factor"], dtype)

    # Rows: originals are appended first, because the inner index cannot take back what it has overwritten.

    @untraced
    def fit(self, vectors: Tensor) -> Self:
        """Train the inner index.

        Args:
            vectors: ``(N, D)``, as for `add`.

        Returns:
            The index itself.
        """
        self.index.fit(vectors)
        return self

    @untraced
    def add(self, vectors: Tensor, ids: Tensor | Sequence[int] | None = None) -> Tensor:
        """Store vectors under new ids; see `Index.add`."""
        originals = self._originals(vectors)
        with self._appended(originals):
            return self.index.add(vectors, ids)

    @untraced
    def upsert(self, vectors: Tensor, ids: Tensor | Sequence[int]) -> Tensor:
        """Replace the vectors of known ids and add those of unknown ids; see `Index.upsert`."""
        originals = self._originals(vectors)
        labels = self._own_ids(vectors.shape[0], ids)
        rows = self._rows_of(labels).to(originals.device)
        known = rows >= 0
        where, stale = rows[known], originals[known]
        with self._appended(originals[~known]):
            self.index.upsert(vectors, labels)
            self._overwrite_rows(where, {"vectors": stale})
        return labels

    def _originals(self, vectors: Tensor) -> Tensor:
        return self._check_new(vectors).to(self.vectors.device)

    @contextmanager
    def _appended(self, originals: Tensor) -> Iterator[None]:
        """Append originals for the rows that the inner index gets meanwhile; drop both if it fails."""
        n = self.ntotal
        self._append_rows({"vectors": originals})
        with ExitStack() as undo:
            undo.callback(self._drop_rows_after, n)
            yield
            undo.pop_all()

    def _drop_rows_after(self, n: int) -> None:
        if self.ntotal > n:
            self.index._keep_rows(torch.arange(self.ntotal, device=self.device) < n)
        with durable():
            self._assign_rows({"vectors": self.vectors[:n]})

    # Searches.

    def _search(
        self,
        queries: Tensor,
        k: int,
        selection: Selection,
        implementation: str,
        parameters: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        factor = _check_factor(self._parameter(parameters, "k_factor"))
        wanted = max(k, min(math.ceil(k * factor), self.ntotal))
        scores, rows = self.index._search(
            queries, wanted, selection, implementation, self._inner_parameters(parameters)
        )
        if not self.ntotal:
            return scores, rows
        place, workspace_bytes = self.vectors.device, self._workspace(parameters)
        ranks = self._current_id_map().ranks(self.ids)
        if place == rows.device:
            exact, best = best_candidates(
                self._metric, queries, self.vectors, rows, k, ranks, workspace_bytes
            )
        else:
            # There are the vectors, here the ranks of the ids: neither is copied.
            there = rows.clamp_min(0).to(place)
            exact = score_candidates(self._metric, queries.to(place), self.vectors, there, workspace_bytes)
            exact, best = merge_ranked(self._metric, exact.to(rows.device), rows, k, ranks)
        # Places that are not filled keep what the inner index says of them.
        return torch.where(best < 0, scores[:, :k], exact), best

    def _range_search(
        self,
        queries: Tensor,
        radius: Tensor,
        selection: Selection,
        implementation: str,
        parameters: dict[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor]:
        lims, _, rows = self.index._range_search(
            queries, radius, selection, implementation, self._inner_parameters(parameters)
        )
        owners = torch.repeat_interleave(lims.diff())
        place = self.vectors.device
        exact = score_pairs(
            self._metric,
            queries.to(place),
            self.vectors,
            owners.to(place),
            rows.to(place),
            self._workspace(parameters),
        ).to(queries.device)
        limit = radius[owners]
        within = exact > limit if self._metric.higher_is_better else exact < limit
        exact, owners, rows = exact[within], owners[within], rows[within]
        keys = order_keys(exact, self._ranks(rows), self._metric.higher_is_better)
        order = keys.argsort(stable=True)
        order = order[owners[order].argsort(stable=True)]
        counts = torch.bincount(owners, minlength=len(queries))
        lims = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return lims, exact[order], rows[order]

    def _ranks(self, rows: Tensor) -> Tensor:
        """Return the places of rows in the order of ids."""
        ranks = self._current_id_map().ranks(self.ids)
        return rows if ranks is None else ranks[rows]

    def _workspace(self, parameters: dict[str, Any]) -> int:
        return check_workspace(self._parameter(parameters, "workspace_bytes"))

    def _decode(self, rows: Tensor) -> Tensor:
        return self.vectors.index_select(0, rows.to(self.vectors.device)).to(rows.device)

    def _candidate_dtype(self) -> torch.dtype:
        return self._dtype

    # State.

    def _rows_changed(self) -> None:
        # Compiled code asks for the dtype and must not touch the vectors, whose size changes.
        self._dtype = self.vectors.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        originals = self.vectors
        with durable():
            probe = fn(originals[:0].clone())
        if self.refine_device is None or probe.device == originals.device:
            return super()._apply(fn, recurse)
        # The originals take part in casts, not in moves.
        self._buffers["vectors"] = probe
        try:
            super()._apply(fn, recurse)
        finally:
            with durable():
                self._assign_rows({"vectors": originals.to(probe.dtype)})
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.index_in_state_dict:
            del destination[prefix + "vectors"]
            return
        destination[prefix + "vectors"] = owned(destination[prefix + "vectors"])
        destination[prefix + "k_factor"] = torch.tensor(self.k_factor, dtype=torch.float64, device="cpu")

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self._pending = None
        own = (prefix + "vectors", prefix + "k_factor")
        rest = {key: tensor for key, tensor in state_dict.items() if key not in own}
        expected: list[str] = []
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, expected, unexpected_keys, error_msgs
        )
        absent = [key for key in own if key not in state_dict]
        ids = state_dict.get(prefix + self._ids_key)
        if absent:
            if len(absent) < len(own) or self.index_in_state_dict:
                missing_keys += absent
            if ids is not None:
                error_msgs.append(f"{absent[0]}: the checkpoint holds rows without it")
                self._withhold(state_dict, f"{prefix}index.")
            return
        vectors, factor = (state_dict[key].detach() for key in own)
        faults = []
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            faults.append(f"vectors: got shape {tuple(vectors.shape)}, expected (N, {self.dim})")
        elif ids is not None and len(ids) != len(vectors):
            lengths = {"vectors": len(vectors), self._ids_key: len(ids)}
            faults.append(f"vectors: the row tensors differ in length: {lengths}")
        if vectors.dtype not in FLOAT_DTYPES:
            faults.append(f"vectors: got dtype {vectors.dtype}, expected floating point")
        if factor.numel() != 1 or not float(factor) >= 1.0:
            faults.append(f"k_factor: got {factor}, expected one number >= 1")
        if faults:
            error_msgs += [prefix + fault for fault in faults]
            self._withhold(state_dict, f"{prefix}index.")
            return
        # The inner index loads after this and may refuse: then the originals stay as they are.
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        self._pending = (vectors, self.ids, float(factor), assign)

    def _loaded(self) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        vectors, ids_before, factor, assign = pending
        if self.ids is ids_before:
            return
        with durable():
            own = self.vectors
            if assign:
                loaded = owned(vectors if self.refine_device is None else vectors.to(self.refine_device))
            else:
                loaded = torch.empty(vectors.shape, dtype=own.dtype, device=own.device).copy_(vectors)
            self._reserves.clear()
            self._assign_rows({"vectors": loaded})
        self.k_factor = _as_given(factor)


def _as_given(factor: float) -> float:
    return int(factor) if factor.is_integer() else factor


def _check_factor(k_factor: float) -> float:
    if isinstance(k_factor, bool) or not isinstance(k_factor, (int, float)):
        raise DtypeError(f"k_factor is {k_factor!r}, expected a number")
    if not 1.0 <= k_factor < math.inf:
        raise ArgumentError(f"k_factor is {k_factor}, expected at least 1")
    return k_factor
