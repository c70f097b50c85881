"""TOFU's truth ratio and forget quality (arXiv 2401.06121), as functions of arrays."""

import numpy as np
from scipy.stats import ks_2samp


def truth_ratio(paraphrase_log_p: np.ndarray, wrong_log_p: np.ndarray) -> np.ndarray:
    """R = geometric mean over wrong answers of p(wrong)^(1/|wrong|), over p(paraphrase)^(1/|paraphrase|), [rows].

    Takes mean log-probabilities per token, in nats: `paraphrase_log_p` [rows], `wrong_log_p` [rows, wrong answers]. The
    higher R, the less a model prefers the truth over its variants; what counts is R's distribution beside a retrained
    model's, not its height.
    """
    return np.exp(wrong_log_p.mean(axis=1) - paraphrase_log_p)


def forget_quality(ratios: np.ndarray, retrained_ratios: np.ndarray) -> float:
    """p-value of the two-sided two-sample Kolmogorov-Smirnov test between truth ratios of a model and of a retrained one.

    1 means that the test sees no difference; forgetting too much lowers it again. It depends on the number of rows.
    Raises `ValueError` when a ratio is not finite.
    """
    for name, values in (("the model's", ratios), ("the retrained model's", retrained_ratios)):
        if not np.isfinite(values).all():
            raise ValueError(f"{(~np.isfinite(values)).sum()} of {name} {len(values)} truth ratios are not finite")
    return float(ks_2samp(ratios, retrained_ratios).pvalue)
