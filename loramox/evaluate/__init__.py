"""Is it forgotten, is the rest intact."""

from loramox.evaluate.scores import answer_scores
from loramox.evaluate.truth_ratio import forget_quality, truth_ratio

__all__ = ["answer_scores", "forget_quality", "truth_ratio"]
