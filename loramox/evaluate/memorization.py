"""How much of an answer a model knows by heart, as functions of its predicted and true tokens."""

import numpy as np

from loramox.evaluate.row_metrics import row_metric


@row_metric(source="arXiv 2202.07646")
def exact_memorization(first_choice: np.ndarray, targets: np.ndarray) -> float:
    """Share of tokens that are the model's first choice, given the true ones before (arXiv 2202.07646). NaN for no tokens."""
    return float((first_choice == targets).mean()) if len(targets) else float("nan")


@row_metric(source="arXiv 2104.07705")
def extraction_strength(first_choice: np.ndarray, targets: np.ndarray) -> float:
    """1 − k/n, with k the shortest prefix of n tokens after which greedy decoding yields all the rest (arXiv 2104.07705).

    1 when the answer comes unprompted, 0 when not even its last token does. NaN for no tokens.
    """
    n = len(targets)
    if not n:
        return float("nan")
    wrong = np.flatnonzero(first_choice != targets)
    k = wrong[-1] + 1 if len(wrong) else 0
    return float(1 - k / n)
