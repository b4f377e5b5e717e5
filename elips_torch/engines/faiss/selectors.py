"""What restricts a search of faiss to some rows, and how many lists it reads."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor

from elips_torch.engines.faiss.builds import FaissBuild


@contextmanager
def bitmap_selector(build: FaissBuild, mask: Tensor) -> Iterator[Any]:
    """Yield what selects the labels i where ``mask[i]`` is True; good inside the block only.

    Args:
        build: the faiss to use.
        mask: bool ``(N,)``.
    """
    # Faiss reads the bits where they lie: they must outlive the search.
    bits = np.packbits(mask.cpu().numpy(), bitorder="little")
    yield build.module.IDSelectorBitmap(len(bits), build.module.swig_ptr(bits))


def lists_parameters(build: FaissBuild, n_probes: int, selector: Any = None) -> Any:
    """Return the parameters of a search that reads so many lists."""
    given = {} if selector is None else {"sel": selector}
    return build.module.SearchParametersIVF(nprobe=n_probes, **given)


def plain_parameters(build: FaissBuild, selector: Any) -> Any:
    """Return the parameters of a search of an index without lists."""
    return build.module.SearchParameters(sel=selector)
