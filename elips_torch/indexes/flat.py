"""Exact search over vectors stored as they are."""

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from elips_torch.core.dispatch import Explanation, Request
from elips_torch.core.errors import DtypeError
from elips_torch.core.tiling import DEFAULT_WORKSPACE_BYTES
from elips_torch.core.validation import FLOAT_DTYPES, check_flag, check_k, check_vectors, check_workspace
from elips_torch.indexes.flat_mirror import vectors_for_faiss
from elips_torch.indexes.prepared_searches import PreparesSearches
from elips_torch.indexes.screened_vectors import ScreenedVectors
from elips_torch.indexes.screening_plane import ScreeningPlane
from elips_torch.indexes.storage import durable
from elips_torch.kernels.plane import Plane
from elips_torch.kernels.prepared_native import PreparedSearch
from elips_torch.kernels.screen_choice import check_screen
from elips_torch.kernels.selection import Selection
from elips_torch.ops.explain import explain_request
from elips_torch.ops.knn import prepare_knn, run_knn
from elips_torch.ops.knn_faiss import Kept
from elips_torch.ops.range_search import run_range_search


class FlatIndex(ScreenedVectors, PreparesSearches):
    """Exact search over vectors stored as they are.

    Args:
        dim: D, size of a vector.
        metric: name of the distance kind, or an alias; see `elips_torch.METRICS`.
        k: number of neighbours that `search` returns by default.
        dtype: how vectors are stored: float32, float16, bfloat16 or float64.
        screen: the low-precision copy of the vectors that is kept beside them, so that searches read
            less; results are the same with any. "int8" takes about 27% more memory than float32 vectors
            alone from 384 features on, "bf16" 51%, "none" nothing. "auto" is for the metrics "l2", "ip" and
            "cosine" and a database that is not learnable: "int8" where the device multiplies int8 fast (a
            CPU does with AVX512-VNNI); on other CPUs 16 bytes a vector, with which float32 vectors are
            screened as they are. It follows every change of the vectors but writes through ``vectors.data``;
            that of a learnable database is made anew at every search. `explain` says what serves.
        learnable: whether the database is a parameter. Whatever changes its size then makes a new
            parameter, which the optimiser must be given, and compiled code is compiled again.
        p: exponent of metric "lp".
        device: where the database lies.
        index_in_state_dict: whether checkpoints hold the database.
        check_finite: whether vectors and queries are checked for NaN and infinity.
        workspace_bytes: limit on temporary memory of a search, in bytes. Default 256 MiB.

    Attributes:
        vectors: ``(ntotal, D)``, the database. A view with room for growth behind it: clone it to save
            it by itself.
        ids: ``(ntotal,)`` int64, the label of each row, in the order of insertion.

    Raises:
        ElipsError: an argument has a wrong type or value.

    >>> import torch
    >>> index = FlatIndex(dim=2, metric="l2")
    >>> index.add(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    tensor([0, 1])
    >>> scores, ids = index(torch.tensor([[3.0, 3.0]]), k=1)
    >>> scores.tolist(), ids.tolist()
    ([[1.0]], [[1]])
    """

    row_tensors: ClassVar[tuple[str, ...]] = ("vectors", "ids")

    vectors: Tensor

    def __init__(
        self,
        dim: int,
        metric: str = "l2",
        *,
        k: int = 10,
        dtype: torch.dtype = torch.float32,
        screen: str = "auto",
        learnable: bool = False,
        p: float | None = None,
        device: torch.device | str | None = None,
        index_in_state_dict: bool = True,
        check_finite: bool = True,
        workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    ) -> None:
        super().__init__(
            dim,
            metric,
            k=k,
            p=p,
            device=device,
            index_in_state_dict=index_in_state_dict,
            check_finite=check_finite,
            workspace_bytes=workspace_bytes,
        )
        if dtype not in FLOAT_DTYPES:
            raise DtypeError(
                f"dtype is {dtype!r}, expected torch.float32, torch.float16, torch.bfloat16 or torch.float64"
            )
        self.learnable = check_flag("learnable", learnable)
        with durable():
            empty = torch.empty(0, dim, dtype=dtype, device=device)
        if learnable:
            self.vectors = nn.Parameter(empty)
        else:
            self.register_buffer("vectors", empty)
        self._dtype = dtype
        self.screen = check_screen(screen, self._metric, dtype, dim)
        kept = "none" if learnable and screen == "auto" else screen
        self.plane = ScreeningPlane(self._metric, dim, kept, device)
        self.plane.rebuild(self.vectors)

    @property
    def dtype(self) -> torch.dtype:
        """How vectors are stored."""
        return self._dtype

    @property
    def is_exact(self) -> bool:
        """Whether results are exact by the definition of the metric: always."""
        return True

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        screen = f", screen={self.plane.kind!r}" if self.plane.kind != "none" else ""
        return super().extra_repr() + screen

    def config(self) -> dict[str, Any]:
        """Return the constructor keywords that make an empty index like this one, for JSON."""
        return {
            "dim": self.dim,
            "metric": self.metric,
            "k": self.k,
            "dtype": str(self.dtype).removeprefix("torch."),
            "screen": self._kept_screen(),
            "learnable": self.learnable,
            "p": self.p,
            "index_in_state_dict": self.index_in_state_dict,
            "check_finite": self.check_finite,
            "workspace_bytes": self.workspace_bytes,
        }

    def explain(self, queries: Tensor, k: int | None = None, *, implementation: str = "auto") -> Explanation:
        """Return which implementation would serve `search` and why the others would not, shown as text."""
        check_vectors("queries", queries, dim=self.dim, allow_single=True)
        rows = queries[None] if queries.ndim == 1 else queries
        count = self.k if k is None else check_k(k)
        plane = self.plane.current(self.vectors)
        request = Request.of(rows, self.vectors, self._metric, count, "none" if plane is None else plane.kind)
        return explain_request("knn", request, implementation)

    def _encode(self, vectors: Tensor) -> dict[str, Tensor]:
        return {"vectors": vectors}

    def _decode(self, rows: Tensor) -> Tensor:
        return self.vectors.detach().index_select(0, rows)

    def _search(
        self,
        queries: Tensor,
        k: int,
        selection: Selection,
        implementation: str,
        parameters: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        workspace_bytes = check_workspace(self._parameter(parameters, "workspace_bytes"))

        def search(
            some: Tensor, plane: Plane | None = None, kept: Kept | None = None
        ) -> tuple[Tensor, Tensor]:
            return run_knn(
                some,
                self.vectors,
                k,
                self._metric,
                ranks=self._current_id_map().ranks(self.ids),
                selection=selection,
                implementation=implementation,
                workspace_bytes=workspace_bytes,
                check_finite=self.check_finite,
                plane=plane,
                kept=kept,
            )

        if implementation == "faiss":
            # Nothing to prepare, and looking at the plane takes as long as searching for few queries.
            facts = (self, self.vectors, self._metric, workspace_bytes)
            return search(queries, kept=functools.partial(vectors_for_faiss, *facts))
        return self._search_prepared(
            queries,
            k,
            selection,
            implementation,
            workspace_bytes,
            lambda: self._prepare(queries, k, implementation, workspace_bytes),
            lambda some: search(some, plane=self.plane.current(self.vectors)),
        )

    def _prepare(
        self, queries: Tensor, k: int, implementation: str, workspace_bytes: int
    ) -> PreparedSearch | None:
        """Prepare a search of all rows for queries ``(Q, D)`` like these; None where that cannot be."""
        return prepare_knn(
            queries,
            self.vectors.detach(),
            k,
            self._metric,
            self.plane.current(self.vectors),
            ranks=self._current_id_map().ranks(self.ids),
            implementation=implementation,
            workspace_bytes=workspace_bytes,
        )

    def _range_search(
        self,
        queries: Tensor,
        radius: Tensor,
        selection: Selection,
        implementation: str,
        parameters: dict[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor]:
        return run_range_search(
            queries,
            self.vectors,
            radius,
            self._metric,
            ranks=self._current_id_map().ranks(self.ids),
            selection=selection,
            implementation=implementation,
            workspace_bytes=check_workspace(self._parameter(parameters, "workspace_bytes")),
            check_finite=self.check_finite,
            screen=self.plane.kind,
            find_plane=lambda: self.plane.current(self.vectors),
        )

    def _learnable_vectors(self) -> Tensor | None:
        return self.vectors if self.learnable else None

    def _candidate_dtype(self) -> torch.dtype:
        return self._dtype

    def _rows_changed(self) -> None:
        # Compiled code asks for the dtype and must not touch the vectors, whose size changes.
        self._dtype = self.vectors.dtype
