"""What searches need to know of vectors that are stored as codes."""

from typing import Protocol

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
