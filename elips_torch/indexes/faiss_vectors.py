"""The vectors of an index of faiss, as users give them and as faiss takes them."""

import torch
from torch import Tensor

from elips_torch.core.dispatch import Explanation, Implementation, Request, explain_choice
from elips_torch.core.errors import ConversionError, DtypeError, NotFittedError, ShapeError
from elips_torch.core.validation import FLOAT_DTYPES, check_device, check_k
from elips_torch.engines.faiss import opaque
from elips_torch.engines.faiss.handover import without_hidden
from elips_torch.indexes.faiss_state import FaissState
from elips_torch.quantizers.bits import pack_checked, unpack_bits


class FaissVectors(FaissState):
    """What `FaissIndex` does with vectors: checks them, hands them to faiss, and gets them back."""

    def explain(self, queries: Tensor, k: int | None = None, *, implementation: str = "auto") -> Explanation:
        """Return that faiss serves `search`, in words; no index of faiss has another way to search here.

        Args:
            queries: ``(Q, D)`` or ``(D,)``, as for `search`.
            k: as for `search`.
            implementation: "auto" or "faiss".

        Raises:
            ElipsError: as for `search`.
        """
        self._check_queries(queries)
        count, n_queries = self.k if k is None else check_k(k), 1 if queries.ndim == 1 else len(queries)
        request = Request(
            queries.device, queries.dtype, self.dtype, n_queries, self.ntotal, self.dim, self._metric, count
        )
        faiss = Implementation("faiss", self._search, lambda request: [])
        return explain_choice(f"{type(self._faiss).__name__}.search", (faiss,), request, implementation)

    def _check_new(self, vectors: Tensor) -> Tensor:
        if not self._takes_as_bits(vectors):
            self._check_kind("vectors", vectors)
            return super()._check_new(vectors)
        self._check_bits("vectors", vectors, "(N, D / 8)", 2)
        check_device("vectors", vectors, self.device, "the index")
        return vectors

    def _check_queries(self, queries: Tensor) -> None:
        if self._takes_as_bits(queries):
            self._check_bits("queries", queries, "(Q, D / 8) or (D / 8,)", 1, 2)
        else:
            self._check_kind("queries", queries)
            super()._check_queries(queries)

    def _takes_as_bits(self, vectors: Tensor) -> bool:
        """Whether these are bits, packed as faiss takes them, and the index is one of bits."""
        return isinstance(vectors, Tensor) and vectors.dtype == torch.uint8 and self._of_bits

    def _check_kind(self, name: str, vectors: Tensor) -> None:
        if self._of_bits and isinstance(vectors, Tensor) and vectors.dtype not in FLOAT_DTYPES:
            raise DtypeError(f"{name} has dtype {vectors.dtype}, expected floats of 0 and 1, or uint8 bits")

    def _check_bits(self, name: str, codes: Tensor, expected: str, *ndims: int) -> None:
        if codes.ndim not in ndims:
            raise ShapeError(f"{name} has shape {tuple(codes.shape)}, expected {expected}")
        if codes.shape[-1] * 8 != self.dim:
            raise ShapeError(
                f"{name} has {codes.shape[-1]} bytes, the index has {self.dim} bits, which are "
                f"{self.dim // 8} bytes; pack_bits makes them"
            )

    def _encode(self, vectors: Tensor) -> dict[str, Tensor]:
        if not self.is_trained:
            raise NotFittedError(f"{type(self._faiss).__name__} takes no vectors before fit(vectors)")
        # They become rows of faiss once all else is checked.
        return {"places": self._as_faiss(vectors)}

    def _append_rows(self, rows: dict[str, Tensor]) -> None:
        super()._append_rows({**rows, "places": self._added(rows["places"])})

    def _overwrite_rows(self, where: Tensor, rows: dict[str, Tensor]) -> None:
        super()._overwrite_rows(where, {"places": self._added(rows["places"])})
        self._rows_changed()
        self._drop_hidden()

    def _keep_rows(self, keep: Tensor) -> None:
        super()._keep_rows(keep)
        self._drop_hidden()

    def _drop_hidden(self) -> None:
        """Leave hidden rows out where searches would read them, which changes the order of ties."""
        if len(self.places) == self._faiss.ntotal:
            return
        try:
            made = without_hidden(self._build, self._faiss, self.places)
            if made is None:
                return
            numbers = self.places.argsort().argsort()
        except (MemoryError, RuntimeError, ConversionError):
            # They stay hidden.
            return
        self._hold(made)
        self.places.copy_(numbers)

    def _added(self, vectors: Tensor) -> Tensor:
        """Return the places of vectors ``(N, D)``, which faiss gets; of places ``(N,)``, themselves."""
        if vectors.ndim == 1:
            return vectors
        return opaque.append(self._build, self._faiss, vectors).to(self.device)

    def _decode(self, rows: Tensor) -> Tensor:
        vectors = opaque.reconstruct(self._build, self._faiss, self.places[rows]).to(self.device)
        return unpack_bits(vectors) if vectors.dtype == torch.uint8 else vectors

    def _as_faiss(self, vectors: Tensor, name: str = "vectors") -> Tensor:
        """Return vectors of the user as faiss gets them; errors call them by their name."""
        if self._of_bits:
            return vectors if vectors.dtype == torch.uint8 else pack_checked(name, vectors)
        if self._metric.name != "cosine":
            return vectors
        # In float64 no norm overflows; a zero vector stays one.
        wide = vectors.double()
        norms: Tensor = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
        return (wide / norms.masked_fill(norms == 0, 1.0)).float()
