"""Lightning callbacks."""

from elips_torch.lightning.retrieval_evaluation import RetrievalEvaluation

__all__ = ["RetrievalEvaluation"]
