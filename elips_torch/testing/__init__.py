"""The contract that every index keeps, as a test case.

A new index is tested by naming it:

    class TestMyIndex(IndexContract):
        index_class = MyIndex
        options = {"nlist": 4}

Needs pytest (``pip install "elips-torch[test]"``).
"""

try:
    import pytest  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError('elips_torch.testing needs pytest: pip install "elips-torch[test]"') from error

from elips_torch.testing.index_contract import IndexContract

__all__ = ["IndexContract"]
