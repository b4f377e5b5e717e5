"""Retrieval in the training loop."""

from elips_torch.training.filling import fill
from elips_torch.training.knn_classifier import KNNClassifier
from elips_torch.training.knn_func import IndexKNN, knn_func
from elips_torch.training.memory_bank import MemoryBank
from elips_torch.training.negatives import HardNegativeMiner
from elips_torch.training.retrieval_layer import RetrievalLayer

__all__ = [
    "HardNegativeMiner",
    "IndexKNN",
    "KNNClassifier",
    "MemoryBank",
    "RetrievalLayer",
    "fill",
    "knn_func",
]
