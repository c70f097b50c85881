"""Membership inference: do forget rows still look like rows that the model was trained on? As functions of arrays.

Every score is lower for a row that looks like a training row, and an AUC is the probability that a forget row scores
below a holdout row (ties count half): 1 when every forget row looks trained on, 0.5 when the two cannot be told apart,
and below it when forgetting went too far, which gives the forget rows away as well.
"""

import zlib as compression

import numpy as np

K = 0.4  # the share of least likely tokens, as in MUSE (arXiv 2407.06460)


def loss(log_p: np.ndarray) -> float:
    """−mean log p of the tokens, nats (Yeom et al., 2018)."""
    return float(-log_p.mean())


def zlib(loss_per_token: float, text: str) -> float:
    """The loss over the number of bytes that zlib compresses the text to (arXiv 2012.07805)."""
    return loss_per_token / len(compression.compress(text.encode("utf-8")))


def min_k(log_p: np.ndarray, k: float = K) -> float:
    """−mean log p of the k least likely share of the tokens, at least one, nats (Min-K% Prob, arXiv 2310.16789)."""
    return float(-np.sort(log_p)[: max(1, int(len(log_p) * k))].mean())


def min_k_plus_plus(log_p: np.ndarray, mean: np.ndarray, spread: np.ndarray, k: float = K) -> float:
    """Min-K% of (log p − mean) / spread, both of log p over the vocabulary at that token (Min-K%++, arXiv 2404.02936)."""
    return min_k((log_p - mean) / np.maximum(spread, 1e-3), k)


def auc(forget: np.ndarray, holdout: np.ndarray) -> float:
    """P(a forget row's score < a holdout row's) + ½·P(equal), in [0, 1]. Raises `ValueError` for scores that are not finite."""
    for name, scores in (("forget", forget), ("holdout", holdout)):
        if not np.isfinite(scores).all():
            raise ValueError(f"{(~np.isfinite(scores)).sum()} of {len(scores)} scores of {name} rows are not finite")
    ordered = np.sort(forget)  # Mann and Whitney's U; scipy's is slow in a bootstrap
    above = sum(np.searchsorted(ordered, holdout, side).sum() / 2 for side in ("left", "right"))
    return float(above / (len(forget) * len(holdout)))


def priv_leak(auc_of_model: float, auc_of_retrained: float) -> float:
    """100 · ((1 − AUC_model) − (1 − AUC_retrained)) / (1 − AUC_retrained), in percent (MUSE, arXiv 2407.06460).

    0 is ideal; below it rows are not forgotten, above it too much so. NaN when the retrained model's AUC is 1: holdout
    rows that even a model that never saw the forget rows tells from them cannot serve.
    """
    room = 1 - auc_of_retrained
    return 100 * (auc_of_retrained - auc_of_model) / room if room > 0 else float("nan")
