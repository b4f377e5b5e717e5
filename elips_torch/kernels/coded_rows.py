"""What searches need to know of vectors that are stored as codes."""

from typing import Protocol, runtime_checkable

from torch import Tensor


class Decoder(Protocol):
    """Gives the vectors that codes stand for.

    Attributes:
        dim: D, size of a vector.
    """

    dim: int

    def decode(self, codes: Tensor) -> Tensor:
        """Return float32 vectors ``(N, D)`` of uint8 codes ``(N, code_size)``.

        The vector of a code does not depend on the codes beside it.
        """


@runtime_checkable
class PartDecoder(Decoder, Protocol):
    """Gives vectors whose parts are centroids, a number of which the code holds for each.

    Attributes:
        m: number of parts.
        codebooks: ``(m, ksub, D / m)`` float32, the centroids of each part.
    """

    m: int
    codebooks: Tensor

    def entries(self, codes: Tensor) -> Tensor:
        """Return int32 numbers ``(N, m)`` among all ``m * ksub`` centroids, of a code's parts."""

    def lookup_tables(self, queries: Tensor, metric: str) -> Tensor:
        """Return float32 ``(Q, m, ksub)``, what each centroid adds to a score; metric "l2" or "ip"."""
