"""Measuring retrieval."""

from elips_torch.evaluation.recall import HitRateAtK, LabelRecallAtK, RecallAtK

__all__ = ["HitRateAtK", "LabelRecallAtK", "RecallAtK"]
