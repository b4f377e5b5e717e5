"""Looks at memory on a CPU by loops of faiss, which cost a tenth of torch's operators.

After a search has filled the caches with vectors, the way through an operator takes longer than the look.
"""

from typing import Any

from torch import Tensor

from elips_torch.engines.faiss.builds import FaissBuild


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
