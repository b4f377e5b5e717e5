"""Search of the nearest lists, over vectors stored as they are."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from elips_torch.core.errors import DtypeError
from elips_torch.core.tiling import DEFAULT_WORKSPACE_BYTES
from elips_torch.core.validation import FLOAT_DTYPES
from elips_torch.indexes.base import Index
from elips_torch.indexes.inverted_lists import SlotChange
from elips_torch.indexes.ivf import IVFIndex
from elips_torch.indexes.listed_plane import ListedPlane
from elips_torch.indexes.screened_vectors import ScreenedVectors
from elips_torch.indexes.storage import durable
from elips_torch.kernels.list_layout import RowDecoder, StoredRows
from elips_torch.kernels.screen_choice import check_screen


class IVFFlatIndex(ScreenedVectors, IVFIndex):
    """Search of the lists whose centroids are nearest to the query, over vectors stored as they are.

    `fit` clusters vectors; `add` puts each vector into the list of its nearest centroid. A search scores
    the vectors of the ``nprobe`` nearest lists by the metric's definition (Sivic and Zisserman, Video
    Google, 2003). A query that finds fewer than k vectors that it may see reads on, so that k come back
    when k exist; `range_search` reads ``nprobe`` lists. With ``nprobe`` at ``nlist`` or above, results are
    those of `FlatIndex`.

    Centroids are learned, and vectors and queries brought to them, under "ip" and "cosine" by spherical
    k-means and that metric, under every other metric by "l2".

    Args:
        dim: D, size of a vector.
        nlist: number of lists; about 4 to 16 times the square root of the number of vectors is usual.
        metric: name of the distance kind, or an alias; see `elips_torch.METRICS`.
        nprobe: number of lists that `search` reads; more than ``nlist`` reads all, and is said once. May be
            set later (``index.nprobe = 32``) and for one call (``index.search(queries, nprobe=64)``).
        k: number of neighbours that `search` returns by default.
        dtype: how vectors are stored: float32, float16, bfloat16 or float64.
        screen: the low-precision copy of the vectors that is kept in the order of the lists; see `FlatIndex`.
            "auto" keeps codes under "l1" and "gower", too, on a CPU: int8 ones or, for few features and for
            vectors whose features are of very different sizes, bfloat16 ones; none where a sample says that
            codes tell nothing apart.
        coarse: an empty index that is to hold the centroids, or one that holds them under the ids 0 to
            ``nlist - 1``. Default: a `FlatIndex`.
        niter: passes of k-means over the training vectors.
        seed: of the random numbers of k-means.
        p: exponent of metric "lp".
        device: where the database lies.
        index_in_state_dict: whether checkpoints hold the database, and the centroids.
        check_finite: whether vectors and queries are checked for NaN and infinity.
        workspace_bytes: limit on temporary memory of a search, in bytes. Default 256 MiB.

    Attributes:
        vectors: ``(ntotal, D)``, the database, in the order of insertion.
        assignments: ``(ntotal,)`` int32, the list of each row.
        ids: ``(ntotal,)`` int64, the label of each row.
        coarse: the index of the centroids.

    Raises:
        ElipsError: an argument has a wrong type or value.

    >>> import torch
    >>> vectors = torch.rand(1000, 8, generator=torch.Generator().manual_seed(0))
    >>> index = IVFFlatIndex(dim=8, nlist=16, nprobe=4).fit(vectors)
    >>> ids = index.add(vectors)
    >>> scores, ids = index(vectors[:2], k=1)
    >>> scores.tolist(), ids.tolist()
    ([[0.0], [0.0]], [[0], [1]])
    """

    row_tensors: ClassVar[tuple[str, ...]] = ("vectors", "assignments", "ids")

    vectors: Tensor
    plane: ListedPlane

    def __init__(
        self,
        dim: int,
        nlist: int,
        metric: str = "l2",
        *,
        nprobe: int = 8,
        k: int = 10,
        dtype: torch.dtype = torch.float32,
        screen: str = "auto",
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
            nprobe=nprobe,
            k=k,
            coarse=coarse,
            niter=niter,
            seed=seed,
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
        with durable():
            self.register_buffer("vectors", torch.empty(0, dim, dtype=dtype, device=device))
        self._dtype = dtype
        self.screen = check_screen(screen, self._metric, dtype, dim)
        self.plane = ListedPlane(self._metric, dim, screen, device)

    @property
    def dtype(self) -> torch.dtype:
        """How vectors are stored."""
        return self._dtype

    @property
    def is_exact(self) -> bool:
        """Whether results are exact by the definition of the metric: where all lists are read."""
        return self.nprobe >= self.nlist

    def config(self) -> dict[str, Any]:
        """Return the constructor keywords that make an empty index like this one, for JSON."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {**super().config(), "dtype": dtype, "screen": self._kept_screen()}

    def _encode_payload(self, vectors: Tensor, assignments: Tensor) -> dict[str, Tensor]:
        return {"vectors": vectors}

    def _decode(self, rows: Tensor) -> Tensor:
        return self.vectors.detach().index_select(0, rows)

    def _decoder(self) -> RowDecoder:
        # The lists first: the plane follows them.
        _ = self.lists
        plane = self.plane.current(self.vectors)
        return StoredRows(self.vectors.detach(), plane, self.plane.in_slots)

    def _slots_changed(self, change: SlotChange) -> None:
        self.plane.carry(change, self._lists.places)

    def _follow_vectors(self, known: bool, change: Callable[..., None], *what: Tensor) -> None:
        # A plane does not know where rows lie in lists that nobody has followed.
        super()._follow_vectors(known and self._lists.knows(self.assignments), change, *what)

    def memory_bytes(self) -> int:
        """Return the bytes of the stored tensors, the lists and the plane; see `Index.memory_bytes`."""
        # What searches need counts before the first one, too.
        self._decoder()
        return super().memory_bytes()

    def _candidate_dtype(self) -> torch.dtype:
        return self._dtype

    def _rows_changed(self) -> None:
        super()._rows_changed()
        # Compiled code asks for the dtype and must not touch the vectors, whose size changes.
        self._dtype = self.vectors.dtype
