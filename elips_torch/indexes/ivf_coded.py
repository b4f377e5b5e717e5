"""What indexes with inverted files of codes share."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from elips_torch.core.tiling import spans
from elips_torch.core.validation import check_flag
from elips_torch.indexes.flat import FlatIndex
from elips_torch.indexes.inverted_lists import InvertedLists, SlotChange
from elips_torch.indexes.ivf import IVFIndex
from elips_torch.indexes.listed_codes import ListedCodes
from elips_torch.kernels.coded_rows import PackedRows
from elips_torch.kernels.list_layout import DecodedRows, RowDecoder
from elips_torch.kernels.selection import Selection
from elips_torch.ops.assign import assign
from elips_torch.quantizers.quantizer import Quantizer
from elips_torch.quantizers.seeding import sample_rows

# Features coded at a time: their differences are a copy.
_FEATURES_AT_ONCE = 2**22


class IVFCodedIndex(ListedCodes, IVFIndex):
    """Inverted lists whose rows are codes; base of `IVFSQIndex` and `IVFPQIndex`.

    Scores, gradients and `reconstruct` are those of the decoded vectors.

    Args:
        quantizer: codes the vectors; `fit` teaches it.
        nlist: number of lists.
        metric: name of the distance kind, or an alias.
        by_residual: code the difference of a vector to the centroid of its list rather than the vector.
        **options: as for `IVFIndex`.
    """

    row_tensors: ClassVar[tuple[str, ...]] = ("codes", "assignments", "ids")

    def __init__(
        self, quantizer: Quantizer, nlist: int, metric: str, *, by_residual: bool, **options: Any
    ) -> None:
        super().__init__(quantizer.dim, nlist, metric, **options)
        self.quantizer = quantizer
        quantizer.in_state_dict = self.index_in_state_dict
        self._by_residual = check_flag("by_residual", by_residual)
        self._register_codes(quantizer.code_size, options.get("device"))

    @abstractmethod
    def _examples(self) -> int | None:
        """Return from how many vectors the quantizer learns; None for all."""

    @property
    def is_trained(self) -> bool:
        """Whether `fit` has been called, so that vectors can be added."""
        return super().is_trained and self.quantizer.is_trained

    @property
    def by_residual(self) -> bool:
        """Whether codes are of the difference to the centroid of the list."""
        return self._by_residual

    @property
    def code_size(self) -> int:
        """Bytes per stored vector, its id and its list not counted."""
        return self.quantizer.code_size

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return f"{super().extra_repr()}, code_size={self.code_size}, by_residual={self.by_residual}"

    def config(self) -> dict[str, Any]:
        """Return the constructor keywords that make an empty index like this one, for JSON."""
        return {**super().config(), "by_residual": self.by_residual}

    def _fit_payload(self, vectors: Tensor, centroids: Tensor) -> None:
        wanted = self._examples()
        if wanted is not None and len(vectors) > wanted:
            generator = torch.Generator("cpu").manual_seed(self.seed)
            vectors = vectors[sample_rows(len(vectors), wanted, generator).to(vectors.device)]
        if self.by_residual:
            kind = self.metric if self.metric in ("ip", "cosine") else "l2"
            lists = assign(vectors, centroids, kind, self.workspace_bytes)
            vectors = vectors - centroids.index_select(0, lists)
        self.quantizer.fit(vectors)

    def _encode_payload(self, vectors: Tensor, assignments: Tensor) -> dict[str, Tensor]:
        codes = torch.empty(len(vectors), self.code_size, dtype=torch.uint8, device=vectors.device)
        for start, stop in spans(len(vectors), max(1, _FEATURES_AT_ONCE // self.dim)):
            part = vectors[start:stop]
            if self.by_residual:
                part = part - self._centroids_of(assignments[start:stop])
            codes[start:stop] = self.quantizer.encode(part, check_finite=self.check_finite)
        return {"codes": codes}

    def _decode(self, rows: Tensor) -> Tensor:
        vectors = self.quantizer.decode(self._codes_of(rows))
        if self.by_residual:
            vectors += self._centroids_of(self.assignments.index_select(0, rows))
            low, high = self._metric.domain
            if low > -torch.inf:
                # A centroid and a coded difference can leave it together.
                vectors.clamp_(low, high)
        return vectors

    def _search(
        self,
        queries: Tensor,
        k: int,
        selection: Selection,
        implementation: str,
        parameters: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        self._bring_together()
        return super()._search(queries, k, selection, implementation, parameters)

    def _decoder(self) -> RowDecoder:
        return DecodedRows(self._decode, self._candidate_dtype(), self.dim, self._screened())

    def _packed(self, lists: InvertedLists | None = None) -> PackedRows | None:
        table, centroids = self.quantizer.packed_table(), None
        if self.by_residual:
            coarse, low = self.coarse, self._metric.domain[0]
            if not isinstance(coarse, FlatIndex) or coarse.dtype != torch.float32 or low > -torch.inf:
                return None
            centroids = coarse.vectors.detach()
        if table is None:
            return None
        placed = self._placed_codes() if lists is None else self._placed_in(lists)
        return PackedRows(placed.codes, table, centroids, self.assignments, placed.of_rows, placed.of_slots)

    def _screened(self) -> PackedRows | None:
        """Return the rows as they are stored with what screens them."""
        lists = self.lists
        packed = self._packed(lists)

        def placed() -> tuple[Tensor, Tensor]:
            places = (lists.slots >= 0).nonzero()[:, 0]
            return lists.slots[places], places

        if packed is None:
            return None
        return self._with_screen(packed, lists.capacity, placed)

    def _n_places(self) -> int:
        return self.lists.capacity

    def _slots_changed(self, change: SlotChange) -> None:
        super()._slots_changed(change)
        self._carry_screen(change, self._lists.slots[change.filled])

    def _centroids_of(self, lists: Tensor) -> Tensor:
        # The coarse index holds list i in row i.
        return self.coarse._decode(lists)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def moved(tensor: Tensor) -> Tensor:
            # Codes mean something together with centroids and ranges as they are: none may be rounded.
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(moved, recurse)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "index_in_state_dict" and "quantizer" in self.__dict__.get("_modules", ()):
            # Codes of one fit mean nothing to another.
            self.quantizer.in_state_dict = value
