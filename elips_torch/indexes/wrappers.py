"""Indexes around another index: what they share, and the one that transforms vectors first."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from elips_torch.core.dispatch import Explanation
from elips_torch.core.errors import ArgumentError, DtypeError, IndexFileError
from elips_torch.core.results import RangeResult, SearchResult
from elips_torch.core.validation import check_device, check_vectors
from elips_torch.indexes.base import Index, known_indexes
from elips_torch.indexes.row_tensors import RowTensors
from elips_torch.indexes.rows import Rows
from elips_torch.indexes.storage import durable
from elips_torch.indexes.tensors_before import TensorsBefore
from elips_torch.indexes.untraced import untraced
from elips_torch.kernels.selection import Selection
from elips_torch.ops.index_search import register
from elips_torch.quantizers.transform import Transform
from elips_torch.quantizers.transforms import TRANSFORMS


class WrapperIndex(Index):
    """An index around another, which keeps the ids and most of what there is to keep.

    Rows are those of the inner index, in its order. Its search parameters are those of the wrapper, too:
    ``wrapper.nprobe = 32`` sets them on the inner index.

    Args:
        index: the inner index.
        dim: D, size of a vector that the wrapper takes.
    """

    row_tensors: ClassVar[tuple[str, ...]] = ()
    # Search parameters of the wrapper itself.
    own_parameters: ClassVar[tuple[str, ...]] = ()

    index: Index

    def __init__(self, index: Index, dim: int) -> None:
        if not isinstance(index, Index):
            raise DtypeError(f"index is a {type(index).__name__}, expected an Index")
        # Past the classes that make ids: there is one set of them, in the inner index.
        RowTensors.__init__(self)
        self.index = index
        self.dim = dim
        self._handle = register(self)
        self._withheld: tuple[str, ...] = ()
        self.register_load_state_dict_post_hook(_finish_load)  # type: ignore[no-untyped-call]

    @property
    def search_parameters(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of what `search` takes as keywords for one call."""
        inner = (name for name in self.index.search_parameters if name not in self.own_parameters)
        return (*self.own_parameters, *inner)

    # What the inner index knows.

    @property
    def ids(self) -> Tensor:  # type: ignore[override]
        """``(ntotal,)`` int64, the label of each vector, in the order of insertion."""
        return self.index.ids

    @property
    def is_trained(self) -> bool:
        """Whether vectors can be added."""
        return self.index.is_trained

    @property
    def k(self) -> int:
        """Number of neighbours that `search` returns by default."""
        return self.index.k

    @k.setter
    def k(self, k: int) -> None:
        self.index.k = k

    @property
    def check_finite(self) -> bool:
        """Whether vectors and queries are checked for NaN and infinity."""
        return self.index.check_finite

    @check_finite.setter
    def check_finite(self, check_finite: bool) -> None:
        self.index.check_finite = check_finite

    @property
    def index_in_state_dict(self) -> bool:
        """Whether checkpoints hold the database."""
        return self.index.index_in_state_dict

    @index_in_state_dict.setter
    def index_in_state_dict(self, index_in_state_dict: bool) -> None:
        self.index.index_in_state_dict = index_in_state_dict

    @property
    def _metric(self) -> Any:  # type: ignore[override]
        return self.index._metric

    def __getattr__(self, name: str) -> Any:
        return getattr(self.index, name) if self._is_inner_parameter(name) else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_inner_parameter(name):
            setattr(self.index, name, value)
        else:
            super().__setattr__(name, value)

    def _is_inner_parameter(self, name: str) -> bool:
        inner = self.__dict__.get("_modules", {}).get("index")
        return inner is not None and name in inner.search_parameters and name not in self.own_parameters

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return repr(self.index)

    def explain(self, queries: Tensor, k: int | None = None, *, implementation: str = "auto") -> Explanation:
        """Return which implementation serves the search in the inner index; see `Index.explain`."""
        return self.index.explain(queries, k, implementation=implementation)

    def memory_bytes(self) -> int:
        """Return the bytes that the stored tensors occupy, those of the inner index included."""
        # The inner index may count what is no buffer, such as lists.
        return super().memory_bytes() - Rows.memory_bytes(self.index) + self.index.memory_bytes()

    # The rows.

    def _attach(self) -> None:
        RowTensors._attach(self)
        self._handle = register(self)

    def __getstate__(self) -> dict[str, Any]:
        state = RowTensors.__getstate__(self)
        state.pop("_handle", None)
        return state

    def _rows_of(self, ids: Tensor) -> Tensor:
        return self.index._rows_of(ids)

    def _current_id_map(self) -> Any:
        return self.index._current_id_map()

    def _keep_rows(self, keep: Tensor) -> None:
        with durable():
            # First what needs memory.
            own = {name: getattr(self, name).detach() for name in self.row_tensors}
            kept = {name: tensor[keep.to(tensor.device)] for name, tensor in own.items()}
            self.index._keep_rows(keep)
            if kept:
                self._assign_rows(kept)
                self._reserves.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return RowTensors._apply(self, fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        RowTensors._save_to_state_dict(self, destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        RowTensors._load_from_state_dict(self, state_dict, prefix, *rest)

    def _withhold(self, state_dict: dict[str, Any], *prefixes: str) -> None:
        """Let the modules of these prefixes load nothing, and nobody miss it."""
        for key in [key for key in state_dict if key.startswith(prefixes)]:
            del state_dict[key]
        self._withheld = prefixes

    def _loaded(self) -> None:
        """Called after the modules inside have loaded a state dictionary, or refused it."""

    def _encode(self, vectors: Tensor) -> dict[str, Tensor]:
        # Vectors are added through the inner index, which encodes them.
        return {}

    @property
    def _ids_key(self) -> str:
        """Where a state dictionary has the ids, less the prefix of this module."""
        return "index." + (self.index._ids_key if isinstance(self.index, WrapperIndex) else "ids")

    def _inner_parameters(self, parameters: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in parameters.items() if name not in self.own_parameters}

    def _inner_config(self) -> list[Any]:
        return [type(self.index).__name__, self.index.config()]


def _finish_load(index: WrapperIndex, incompatible_keys: Any) -> None:
    withheld, index._withheld = index._withheld, ()
    if withheld:
        missing = incompatible_keys.missing_keys
        missing[:] = [key for key in missing if not key.startswith(withheld)]
    index._loaded()


class PreTransformIndex(WrapperIndex):
    """An index of transformed vectors.

    Vectors and queries go through the transform; scores are those of the transformed. With gradients they
    reach the queries through it. `reconstruct` gives `transform.reverse` of what the inner index
    stores: what the transform leaves out does not come back. Before training the transform anew, `reset`.

    Args:
        transform: a `PCA`, `OPQ`, `RandomRotation`, `ITQ` or `L2Normalize`, or a class of your own. `fit`
            trains it if it is not trained yet, and then the index.
        index: the inner index, of dim ``transform.dim_out``.

    Attributes:
        transform: the transform.
        index: the inner index; what it knows, such as ``index.list_sizes()``, is asked there.

    Raises:
        ElipsError: an argument has a wrong type, or the sizes do not fit.

    >>> import torch
    >>> from elips_torch import PCA, FlatIndex
    >>> vectors = torch.tensor([[0.0, 0.0], [1.0, 2.0], [2.0, 4.0]])
    >>> index = PreTransformIndex(PCA(2, 1), FlatIndex(1)).fit(vectors)
    >>> index.add(vectors)
    tensor([0, 1, 2])
    >>> index.search(torch.tensor([2.0, 3.0]), k=2).ids
    tensor([2, 1])
    """

    def __init__(self, transform: Transform, index: Index) -> None:
        if not isinstance(transform, Transform):
            raise DtypeError(f"transform is a {type(transform).__name__}, expected a Transform such as PCA")
        super().__init__(index, transform.dim_in)
        if transform.dim_out != index.dim:
            raise ArgumentError(
                f"transform has dim_out {transform.dim_out}, index has dim {index.dim}, expected the same"
            )
        if index.ntotal and not transform.is_trained:
            raise ArgumentError(f"index holds {index.ntotal} vectors, expected a transform that is trained")
        self.transform = transform
        self._before_load: tuple[TensorsBefore, Tensor, list[str], int] | None = None
        self.register_state_dict_post_hook(_leave_out_transform)  # type: ignore[no-untyped-call]

    @property
    def is_trained(self) -> bool:
        """Whether vectors can be added."""
        return self.transform.is_trained and self.index.is_trained

    def config(self) -> dict[str, Any]:
        """Return the classes and settings of the transform and the index, for JSON."""
        transform = [type(self.transform).__name__, self.transform.config()]
        return {"transform": transform, "index": self._inner_config()}

    @classmethod
    def _from_config(cls, config: dict[str, Any], device: torch.device | str | None) -> Self:
        (kind, settings), (name, inner) = config["transform"], config["index"]
        transforms = _known_transforms()
        if kind not in transforms or name not in known_indexes():
            raise IndexFileError(f"there is no class {kind} or no class {name}; import it first")
        return cls(transforms[kind](**settings), known_indexes()[name]._from_config(inner, device))

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return f"{self.transform!r}, {self.index!r}"

    @untraced
    def fit(self, vectors: Tensor) -> Self:
        """Train the transform, unless it is trained already, and then the index.

        Args:
            vectors: ``(N, D)``, as for `add`.

        Returns:
            The index itself.
        """
        vectors = self._check_new(vectors)
        before = TensorsBefore(self.transform)
        with ExitStack() as undo:
            # A transform that stays trained would not be trained anew with better vectors.
            undo.callback(before.put_back)
            if not self.transform.is_trained:
                self.transform.fit(vectors)
            self.index.fit(self._transformed(vectors))
            undo.pop_all()
        return self

    @untraced
    def add(self, vectors: Tensor, ids: Tensor | Sequence[int] | None = None) -> Tensor:
        """Transform and store vectors under new ids; see `Index.add`."""
        return self.index.add(self._transformed(self._check_new(vectors)), ids)

    @untraced
    def upsert(self, vectors: Tensor, ids: Tensor | Sequence[int]) -> Tensor:
        """Replace the vectors of known ids and add those of unknown ids; see `Index.upsert`."""
        return self.index.upsert(self._transformed(self._check_new(vectors)), ids)

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
        """Find the k nearest vectors of each query, among the transformed; see `Index.search`."""
        return self.index.search(
            self._transformed_queries(queries),
            k,
            mask=mask,
            exclude=exclude,
            exclude_self=exclude_self,
            implementation=implementation,
            **parameters,
        )

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
        """Find all vectors within a radius of each query, among the transformed; see `Index.range_search`."""
        return self.index.range_search(
            self._transformed_queries(queries),
            radius,
            mask=mask,
            exclude=exclude,
            exclude_self=exclude_self,
            implementation=implementation,
            **parameters,
        )

    def explain(self, queries: Tensor, k: int | None = None, *, implementation: str = "auto") -> Explanation:
        """Return which implementation serves the search in the inner index; see `Index.explain`."""
        return super().explain(self._transformed_queries(queries).detach(), k, implementation=implementation)

    def _transformed_queries(self, queries: Tensor) -> Tensor:
        check_vectors("queries", queries, dim=self.dim, allow_single=True)
        if not torch.compiler.is_compiling():
            check_device("queries", queries, self.device, "the index")
        transformed: Tensor = self.transform(queries)
        return transformed

    def _transformed(self, vectors: Tensor) -> Tensor:
        with durable():
            transformed: Tensor = self.transform(vectors)
        return transformed

    def _search(
        self,
        queries: Tensor,
        k: int,
        selection: Selection,
        implementation: str,
        parameters: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        transformed = self._transformed(queries)
        return self.index._search(transformed, k, selection, implementation, parameters)

    def _range_search(
        self,
        queries: Tensor,
        radius: Tensor,
        selection: Selection,
        implementation: str,
        parameters: dict[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor]:
        transformed = self._transformed(queries)
        return self.index._range_search(transformed, radius, selection, implementation, parameters)

    def _decode(self, rows: Tensor) -> Tensor:
        with durable():
            return self.transform.reverse(self.index._decode(rows))

    # Checkpoints. Rows that went through one transform mean nothing behind another.

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
        self._before_load = None
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        inside = f"{prefix}transform."
        absent = self.transform.state_dict(prefix=inside).keys() - state_dict.keys()
        faults = self.transform._loaded_faults(state_dict, inside)
        if absent and prefix + self._ids_key in state_dict:
            faults.append(f"{inside[:-1]}: the checkpoint holds rows without {', '.join(sorted(absent))}")
        if faults:
            error_msgs += faults
            self._withhold(state_dict, inside, f"{prefix}index.")
        elif absent and not self.index_in_state_dict:
            self._withhold(state_dict, inside)
        else:
            # Which rows there will be is known when the inner index has loaded.
            self._before_load = TensorsBefore(self.transform), self.ids, error_msgs, len(error_msgs)

    def _loaded(self) -> None:
        before, self._before_load = self._before_load, None
        if before is None:
            return
        transform, ids, errors, n_errors = before
        if self.ids is ids and (self.ntotal or len(errors) > n_errors):
            transform.put_back()


def _leave_out_transform(
    index: PreTransformIndex, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    """Take the transform out of a checkpoint that leaves the rows out."""
    if not index.index_in_state_dict:
        for key in [key for key in state_dict if key.startswith(f"{prefix}transform.")]:
            del state_dict[key]


def _known_transforms() -> dict[str, type[Transform]]:
    """Return every class of transform that the program has defined, by name."""
    known: dict[str, type[Transform]] = {}
    parents: list[Any] = [Transform]
    while parents:
        children = parents.pop().__subclasses__()
        known.update({child.__name__: child for child in children})
        parents += children
    return {**known, **{transform.__name__: transform for transform in TRANSFORMS}}
