"""Search among scalar-quantized vectors."""

from typing import Any

import torch

from elips_torch.core.tiling import DEFAULT_WORKSPACE_BYTES
from elips_torch.indexes.code_screen import check_code_screen
from elips_torch.indexes.coded import CodedIndex
from elips_torch.quantizers.scalar import ScalarQuantizer


class SQIndex(CodedIndex):
    """Search among vectors whose features are stored in 4 to 16 bits each.

    Each feature is coded by itself, as a step of its range over the vectors of `fit`, or as a short float.
    Searches are exact for the decoded vectors: scores, gradients and `reconstruct` are theirs. Codes and
    results are those of faiss' IndexScalarQuantizer.

    Args:
        dim: D, size of a vector.
        qtype: "int8", "int6" or "int4", which `fit` must have run for; "fp16" or "bf16", which need no `fit`.
        metric: name of the distance kind, or an alias. Under "cosine", too, vectors are coded as they are.
        k: number of neighbours that `search` returns by default.
        screen: "auto" keeps what screens the codes, on CPUs that multiply int8 fast: 8 bytes of each vector;
            for "fp16" and "bf16" an int8 copy, a byte of each feature and 16 more. "none" keeps nothing.
        p: exponent of metric "lp".
        device: where the database lies.
        index_in_state_dict: whether checkpoints hold the database, and what `fit` has learned.
        check_finite: whether vectors and queries are checked for NaN and infinity.
        workspace_bytes: limit on temporary memory of a search, in bytes. Default 256 MiB.

    Attributes:
        codes: ``(ntotal, code_size)`` uint8, in the order of insertion.
        ids: ``(ntotal,)`` int64, the label of each row.
        quantizer: the `ScalarQuantizer`, with the ranges.

    Raises:
        ElipsError: an argument has a wrong type or value.

    >>> import torch
    >>> vectors = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 0.0]])
    >>> index = SQIndex(2, "int8").fit(vectors)
    >>> index.add(vectors)
    tensor([0, 1, 2])
    >>> index.search(torch.tensor([3.0, 3.0]), k=2).ids
    tensor([1, 2])
    """

    quantizer: ScalarQuantizer

    def __init__(
        self,
        dim: int,
        qtype: str = "int8",
        metric: str = "l2",
        *,
        k: int = 10,
        screen: str = "auto",
        p: float | None = None,
        device: torch.device | str | None = None,
        index_in_state_dict: bool = True,
        check_finite: bool = True,
        workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    ) -> None:
        super().__init__(
            ScalarQuantizer(dim, qtype, device=device),
            metric,
            k=k,
            p=p,
            device=device,
            index_in_state_dict=index_in_state_dict,
            check_finite=check_finite,
            workspace_bytes=workspace_bytes,
        )
        self.screen = check_code_screen(screen)

    @property
    def qtype(self) -> str:
        """How features are coded."""
        return self.quantizer.qtype

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return f"{super().extra_repr()}, qtype={self.qtype!r}"

    def config(self) -> dict[str, Any]:
        """Return the constructor keywords that make an empty index like this one, for JSON."""
        return {**super().config(), "qtype": self.qtype, "screen": self.screen}
