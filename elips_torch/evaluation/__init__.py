"""Measuring retrieval: metrics of what was retrieved, and of the indexes that retrieve."""

from elips_torch.evaluation.index_recall import index_recall
from elips_torch.evaluation.knn_accuracy import KNNAccuracy
from elips_torch.evaluation.plots import plot_list_sizes, plot_neighbours, plot_recall_curve
from elips_torch.evaluation.ranking import MAP, MRR, NDCG, RPrecision
from elips_torch.evaluation.recall import HitRateAtK, LabelRecallAtK, PrecisionAtK, RecallAtK
from elips_torch.evaluation.retrieval_metrics import RetrievalMetrics
from elips_torch.evaluation.tuning import TuningCurve, TuningPoint, tune

__all__ = [
    "MAP",
    "MRR",
    "NDCG",
    "HitRateAtK",
    "KNNAccuracy",
    "LabelRecallAtK",
    "PrecisionAtK",
    "RPrecision",
    "RecallAtK",
    "RetrievalMetrics",
    "TuningCurve",
    "TuningPoint",
    "index_recall",
    "plot_list_sizes",
    "plot_neighbours",
    "plot_recall_curve",
    "tune",
]
