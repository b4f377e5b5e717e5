"""Lightning callbacks."""

from elips_torch.lightning.hard_negative_refresh import HardNegativeRefresh
from elips_torch.lightning.index_refresh import IndexRefresh
from elips_torch.lightning.neighbour_table import NeighbourTable
from elips_torch.lightning.retrieval_evaluation import RetrievalEvaluation

__all__ = ["HardNegativeRefresh", "IndexRefresh", "NeighbourTable", "RetrievalEvaluation"]
