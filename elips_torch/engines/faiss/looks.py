"""Looks at memory on a CPU by loops of faiss, which cost a tenth of torch's operators.

After a search has filled the caches with vectors, the way through an operator takes longer than the look.
"""

from typing import Any

import torch
from torch import Tensor

from elips_torch.core.metric import resolve_metric
from elips_torch.core.validation import check_values
from elips_torch.engines.faiss.builds import FaissBuild
from elips_torch.engines.faiss.row_kinds import downcast

# Under these names an index keeps the one that holds its vectors.
_HOLDERS = ("index", "storage", "quantizer", "refine_index", "base_index")


def are_finite(build: FaissBuild, values: Tensor) -> bool:
    """Return whether values, one after another on the CPU, are all finite when read as float32."""
    address: Any = build.module.cast_integer_to_float_ptr(values.data_ptr())
    # What is not finite makes the sum of |x - x| NaN.
    return bool(build.module.fvec_L1(address, address, values.nbytes // 4) == 0.0)


def are_labels(build: FaissBuild, labels: Tensor) -> bool:
    """Return whether none of the int64 labels, one after another on the CPU, is -1.

    False also where some are so large that they look like it.
    """
    # Read as floats, -1 is NaN twice.
    return are_finite(build, labels)


def check_finite_rows(build: FaissBuild, index: Any, name: str = "faiss_index") -> None:
    """Check the vectors of an index on the CPU that lie in one place as they are, also behind a graph.

    A search never finds one that is not finite, and in a graph it may never end (faiss 1.12). Those in lists
    and codes are not looked at; centroids of lists are.

    Args:
        build: the faiss whose index it is.
        index: of floats or of bits.
        name: what the message calls it.

    Raises:
        NonFiniteError: some are NaN or infinite; with the numbers of the first rows.
    """
    index = downcast(build, index)
    if isinstance(index, build.module.IndexFlat):
        # What an index says of itself need not be so.
        n_rows = min(index.ntotal, index.codes.size() // (4 * index.d))
        if n_rows > 0:
            rows = torch.from_numpy(build.module.rev_swig_ptr(index.get_xb(), n_rows * index.d))
            if not are_finite(build, rows):
                check_values(name, rows.view(n_rows, index.d), resolve_metric("l2"))
        return
    for member in _HOLDERS:
        inner = getattr(index, member, None)
        if inner is not None:
            whose = f"the quantizer of {name}" if member == "quantizer" else name
            check_finite_rows(build, inner, whose)
