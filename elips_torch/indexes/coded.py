"""What indexes that store codes in the place of vectors share."""

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from elips_torch.core.dispatch import Explanation
from elips_torch.core.errors import NotEmptyError, NotFittedError
from elips_torch.core.validation import check_k, check_vectors, check_workspace
from elips_torch.indexes import faiss_mirror
from elips_torch.indexes.inverted_lists import SlotChange
from elips_torch.indexes.screened_codes import ScreenedCodes
from elips_torch.indexes.storage import durable
from elips_torch.indexes.untraced import untraced
from elips_torch.kernels.coded_rows import PackedRows
from elips_torch.kernels.prepared_native import PreparedSearch
from elips_torch.kernels.selection import Selection
from elips_torch.ops.coded_search import (
    IMPLEMENTATIONS,
    explain_coded_search,
    prepare_coded,
    run_coded_range_search,
    run_coded_search,
)
from elips_torch.quantizers.quantizer import Quantizer

# No places, or rows.
_NONE = torch.empty(0, dtype=torch.int64, device="cpu")


class CodedIndex(ScreenedCodes):
    """An index whose rows are codes, all of which every search sees; base of `SQIndex` and `PQIndex`.

    Scores, gradients and `reconstruct` are those of the decoded vectors, for which searches are exact.

    Args:
        quantizer: codes the vectors; `fit` teaches it.
        metric: name of the distance kind, or an alias.
        **options: as for `Index`.
    """

    row_tensors: ClassVar[tuple[str, ...]] = ("codes", "ids")

    codes: Tensor

    def __init__(self, quantizer: Quantizer, metric: str, **options: Any) -> None:
        super().__init__(quantizer.dim, metric, **options)
        self.quantizer = quantizer
        quantizer.in_state_dict = self.index_in_state_dict
        with durable():
            empty = torch.empty(0, quantizer.code_size, dtype=torch.uint8, device=options.get("device"))
            self.register_buffer("codes", empty)

    @property
    def is_trained(self) -> bool:
        """Whether `fit` has run, or nothing needs to be learned."""
        return self.quantizer.is_trained

    @property
    def code_size(self) -> int:
        """Bytes per stored vector, its id not counted."""
        return self.quantizer.code_size

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        trained = "" if self.is_trained else ", not fitted"
        return f"{super().extra_repr()}, code_size={self.code_size}{trained}"

    def config(self) -> dict[str, Any]:
        """Return the constructor keywords that make an empty index like this one, for JSON."""
        return {
            "dim": self.dim,
            "metric": self.metric,
            "k": self.k,
            "p": self.p,
            "index_in_state_dict": self.index_in_state_dict,
            "check_finite": self.check_finite,
            "workspace_bytes": self.workspace_bytes,
        }

    @untraced
    def fit(self, vectors: Tensor) -> Self:
        """Learn from ``(N, D)`` vectors how to code; those to be added, or a sample of them.

        Args:
            vectors: ``(N, D)`` float32, float16, bfloat16 or float64, on the index's device.

        Returns:
            The index itself.

        Raises:
            NotEmptyError: the index holds codes, which would come to mean something else.
            ElipsError: vectors of wrong type, shape, dtype, device or value, or too few.
        """
        if self.ntotal:
            raise NotEmptyError(
                f"fit was called on an index that holds {self.ntotal} vectors, whose codes would change "
                "their meaning; call reset() first"
            )
        self.quantizer.fit(self._check_new(vectors))
        return self

    def explain(self, queries: Tensor, k: int | None = None, *, implementation: str = "auto") -> Explanation:
        """Return which implementation would serve `search` and why the others would not, shown as text."""
        check_vectors("queries", queries, dim=self.dim, allow_single=True)
        rows = queries[None] if queries.ndim == 1 else queries
        count = self.k if k is None else check_k(k)
        mirror = faiss_mirror.mirror_entry(self)
        return explain_coded_search(
            rows, self.codes, self.quantizer, self._metric, count, implementation, (mirror,)
        )

    def _check_fitted(self, verb: str) -> None:
        if not self.is_trained:
            raise NotFittedError(f"{type(self).__name__}.{verb} was called before fit(vectors)")

    def _encode(self, vectors: Tensor) -> dict[str, Tensor]:
        self._check_fitted("add")
        return {"codes": self.quantizer.encode(vectors, check_finite=self.check_finite)}

    def _decode(self, rows: Tensor) -> Tensor:
        return self.quantizer.decode(self.codes.index_select(0, rows))

    def _search(
        self,
        queries: Tensor,
        k: int,
        selection: Selection,
        implementation: str,
        parameters: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        self._check_fitted("search")
        if faiss_mirror.is_asked_for(implementation, "coded_search", IMPLEMENTATIONS):
            return faiss_mirror.search_mirror(self, queries, k, selection)
        workspace_bytes = check_workspace(self._parameter(parameters, "workspace_bytes"))

        def search(some: Tensor) -> tuple[Tensor, Tensor]:
            return run_coded_search(
                some,
                self.codes,
                self.quantizer,
                k,
                self._metric,
                ranks=self._current_id_map().ranks(self.ids),
                selection=selection,
                implementation=implementation,
                workspace_bytes=workspace_bytes,
                check_finite=self.check_finite,
                packed=self._screened(),
            )

        return self._search_prepared(
            queries,
            k,
            selection,
            implementation,
            workspace_bytes,
            lambda: self._prepare(queries, k, implementation, workspace_bytes),
            search,
        )

    def _prepare(
        self, queries: Tensor, k: int, implementation: str, workspace_bytes: int
    ) -> PreparedSearch | None:
        """Prepare a search of all rows for queries ``(Q, D)`` like these; None where that cannot be."""
        return prepare_coded(
            queries,
            self.codes,
            self.quantizer,
            k,
            self._metric,
            self._screened(),
            ranks=self._current_id_map().ranks(self.ids),
            implementation=implementation,
            workspace_bytes=workspace_bytes,
        )

    def _packed(self) -> PackedRows | None:
        table = self.quantizer.packed_table()
        return None if table is None else PackedRows(self.codes, table)

    def _screened(self) -> PackedRows | None:
        """Return the rows as they are stored with what screens them."""
        packed = self._packed()
        n = 0 if packed is None else len(packed.codes)
        if packed is None or not n:
            return packed

        def placed() -> tuple[Tensor, Tensor]:
            rows = torch.arange(n, device="cpu")
            return rows, rows

        return self._with_screen(packed, n, placed)

    # The place of a row in what screens it is its number.

    def _n_places(self) -> int:
        return self.ntotal

    def _append_rows(self, rows: dict[str, Tensor]) -> None:
        n_before = self.ntotal
        with self._changing_rows():
            super()._append_rows(rows)
            self._follow(lambda n: SlotChange(n, _NONE, _NONE, torch.arange(n_before, n, device="cpu")))

    def _overwrite_rows(self, where: Tensor, rows: dict[str, Tensor]) -> None:
        with self._changing_rows():
            super()._overwrite_rows(where, rows)
            self._follow(lambda n: SlotChange(n, _NONE, _NONE, where))

    def _keep_rows(self, keep: Tensor) -> None:
        with self._changing_rows():
            super()._keep_rows(keep)
            places = keep.nonzero()[:, 0]
            self._follow(lambda n: SlotChange(n, places, torch.arange(n, device="cpu"), _NONE))

    def _follow(self, change: Callable[[int], SlotChange]) -> None:
        """Let what screens the rows follow a change of these, given how many they are now."""
        if not self._screening.is_made:
            return
        try:
            step = change(self.ntotal)
            self._carry_screen(step, step.filled)
        except (MemoryError, RuntimeError):
            # The rows have changed; what screens them is derived from them and can wait for memory.
            self._screening.forget()

    def _range_search(
        self,
        queries: Tensor,
        radius: Tensor,
        selection: Selection,
        implementation: str,
        parameters: dict[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor]:
        self._check_fitted("range_search")
        return run_coded_range_search(
            queries,
            self.codes,
            self.quantizer,
            radius,
            self._metric,
            ranks=self._current_id_map().ranks(self.ids),
            selection=selection,
            implementation=implementation,
            workspace_bytes=check_workspace(self._parameter(parameters, "workspace_bytes")),
            check_finite=self.check_finite,
        )

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "index_in_state_dict" and "quantizer" in self.__dict__.get("_modules", ()):
            # Codes of one fit mean nothing to another.
            self.quantizer.in_state_dict = value
