"""Evaluation: is it forgotten, and is the rest intact."""

from loramox.evaluate.scores import mean_log_p, score_answers
from loramox.evaluate.truth_ratio import forget_quality, truth_ratio

__all__ = ["forget_quality", "mean_log_p", "score_answers", "truth_ratio"]
