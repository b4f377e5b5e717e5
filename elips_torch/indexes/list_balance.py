"""How evenly rows lie in inverted lists."""

import torch
from torch import Tensor

from elips_torch.core.user_warnings import warn_user

# Vectors per list under which clustering is poor, and the balance of lists says little.
FEW_PER_LIST = 39
# Imbalance factor from which on a search reads several times what it should.
_BADLY_UNBALANCED = 5.0


def imbalance_factor(sizes: Tensor) -> float:
    """Return how many times longer searches take than with lists of one length; 1.0 is best.

    Args:
        sizes: ``(nlist,)``, the number of vectors in each list.
    """
    wide = sizes.double()
    total = float(wide.sum())
    return float(wide.square().sum()) * sizes.numel() / total**2 if total else 1.0


class BalanceWatch:
    """Warns, once, of lists that have become badly unbalanced."""

    def __init__(self) -> None:
        self._warned = False
        self._rows_at_look = 0

    def look(self, assignments: Tensor, more: Tensor, nlist: int) -> None:
        """Look at the lists as they will be, each time that the number of vectors has doubled.

        Args:
            assignments: ``(N,)``, the list of each vector.
            more: ``(M,)``, those of vectors that are about to be added.
            nlist: number of lists.
        """
        n = assignments.shape[0] + more.shape[0]
        if n < max(2 * self._rows_at_look, FEW_PER_LIST * nlist):
            return
        self._rows_at_look = n
        sizes = torch.bincount(assignments, minlength=nlist) + torch.bincount(more, minlength=nlist)
        factor = imbalance_factor(sizes)
        if factor > _BADLY_UNBALANCED and not self._warned:
            self._warned = True
            warn_user(
                f"the lists are badly unbalanced (imbalance factor {factor:.1f}): searches read that many "
                "times what they would of even lists; fit on vectors like those that are added"
            )

    def shrink(self, n: int) -> None:
        """Follow the removal of all but n vectors."""
        self._rows_at_look = min(self._rows_at_look, n)
