"""The transforms that exist; here are those that learn nothing."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from elips_torch.core.validation import check_count
from elips_torch.quantizers.affine import AffineMap, Centring
from elips_torch.quantizers.itq import ITQ
from elips_torch.quantizers.learned import learning
from elips_torch.quantizers.opq import OPQ
from elips_torch.quantizers.pca import PCA
from elips_torch.quantizers.rotations import orthonormal
from elips_torch.quantizers.transform import LinearTransform, Transform


class RandomRotation(LinearTransform):
    """Rotates vectors at random, so that every feature holds about the same share.

    With ``dim_out < dim_in`` it projects to a random subspace; with ``dim_out > dim_in`` it embeds, and
    distances stay as they are.

    Args:
        dim_in: D, size of a vector.
        dim_out: size of a transformed vector; default is D.
        seed: of the random numbers.
        device: where the matrix lies.

    Attributes:
        matrix: ``(dim_out, dim_in)`` float32, with orthonormal rows or columns.

    Raises:
        ElipsError: an argument has a wrong type or value.

    >>> import torch
    >>> rotation = RandomRotation(3)
    >>> rotation(torch.tensor([3.0, 0.0, 4.0])).norm().round(decimals=4)
    tensor(5.)
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int | None = None,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(dim_in, dim_in if dim_out is None else dim_out, device)
        self.seed = check_count("seed", seed, 0)
        with learning(torch.device("cpu")):
            matrix = orthonormal(self.dim_out, self.dim_in, self.seed)
            self.matrix = matrix.to(self.matrix.device)

    def config(self) -> dict[str, Any]:
        """Return the constructor keywords that make a transform like this one, for JSON."""
        return {"dim_in": self.dim_in, "dim_out": self.dim_out, "seed": self.seed}

    def _learn(self, vectors: Tensor) -> dict[str, Tensor]:
        return {"matrix": self.matrix.to(vectors.device)}


class L2Normalize(Transform):
    """Scales vectors to length 1; zero stays zero. What length they had is lost: `reverse` does nothing.

    Args:
        dim: D, size of a vector.

    Raises:
        ElipsError: the argument has a wrong type or value.

    >>> import torch
    >>> L2Normalize(2)(torch.tensor([3.0, 4.0]))
    tensor([0.6000, 0.8000])
    """

    learned_buffers: ClassVar[tuple[str, ...]] = ()

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim)

    @property
    def is_trained(self) -> bool:
        """Whether vectors can be transformed: always."""
        return True

    def config(self) -> dict[str, Any]:
        """Return the constructor keywords that make a transform like this one, for JSON."""
        return {"dim": self.dim_in}

    def _learn(self, vectors: Tensor) -> dict[str, Tensor]:
        return {}

    def _map(self, vectors: Tensor) -> Tensor:
        wide = vectors.double()
        squares = (wide * wide).sum(1, keepdim=True)
        # The root of 1 in the place of 0 keeps the gradient finite.
        return (wide / torch.where(squares == 0, 1.0, squares).sqrt()).float()

    def _unmap(self, vectors: Tensor) -> Tensor:
        return vectors.float()


# Every transform; index files name them.
TRANSFORMS: tuple[type[Transform], ...] = (PCA, OPQ, RandomRotation, ITQ, L2Normalize, Centring, AffineMap)
