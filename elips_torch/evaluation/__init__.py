"""Measuring retrieval: metrics of what was retrieved, and of the indexes that retrieve."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elips_torch.evaluation.knn_accuracy import KNNAccuracy
    from elips_torch.evaluation.own_recall import index_recall
    from elips_torch.evaluation.plots import plot_list_sizes, plot_neighbours, plot_recall_curve
    from elips_torch.evaluation.ranking import MAP, MRR, NDCG, RPrecision
    from elips_torch.evaluation.recall import HitRateAtK, LabelRecallAtK, PrecisionAtK, RecallAtK
    from elips_torch.evaluation.retrieval_metrics import RetrievalMetrics
    from elips_torch.evaluation.tuning import TuningCurve, TuningPoint, tune

# Imported when first asked for: torchmetrics takes more than a second, and commands need pictures only.
_LAZY = {
    "HitRateAtK": "elips_torch.evaluation.recall",
    "KNNAccuracy": "elips_torch.evaluation.knn_accuracy",
    "LabelRecallAtK": "elips_torch.evaluation.recall",
    "MAP": "elips_torch.evaluation.ranking",
    "MRR": "elips_torch.evaluation.ranking",
    "NDCG": "elips_torch.evaluation.ranking",
    "PrecisionAtK": "elips_torch.evaluation.recall",
    "RPrecision": "elips_torch.evaluation.ranking",
    "RecallAtK": "elips_torch.evaluation.recall",
    "RetrievalMetrics": "elips_torch.evaluation.retrieval_metrics",
    "TuningCurve": "elips_torch.evaluation.tuning",
    "TuningPoint": "elips_torch.evaluation.tuning",
    "index_recall": "elips_torch.evaluation.own_recall",
    "plot_list_sizes": "elips_torch.evaluation.plots",
    "plot_neighbours": "elips_torch.evaluation.plots",
    "plot_recall_curve": "elips_torch.evaluation.plots",
    "tune": "elips_torch.evaluation.tuning",
}

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


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
