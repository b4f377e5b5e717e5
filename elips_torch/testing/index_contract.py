"""The whole index contract."""

from elips_torch.testing.contract_rows import RowContract
from elips_torch.testing.contract_search import SearchContract
from elips_torch.testing.contract_state import StateContract


class IndexContract(RowContract, SearchContract, StateContract):
    """Every promise that an index makes, whatever its kind; subclass it and set ``index_class``.

    Results are compared with the reference implementation where the index is exact, and with
    itself before a change where it is not.
    """
