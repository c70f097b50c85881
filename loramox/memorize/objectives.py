"""The terms of the memorization objective, as functions of tensors.

    L = mean over forget rows of forget(y | x)  +  kl_weight · mean over retain rows of KL(p_ref ‖ p_θ)

with one of these as the term of the forget rows: cross-entropy or preference, which memorize, at θ_ref + ΔW (MOX, arXiv
2602.06441), or alternatives (or NPO, in `baselines`), at θ_ref − α·ΔW. All of it is minimised by gradient descent. Each function takes logits [N, vocabulary] of N
answer tokens and returns one number per token, [N], in nats; rows are averaged by `loramox.head.mean_over_rows`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def log_prob(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """log p(target) under softmax(logits / temperature), [N]."""
    return -F.cross_entropy(logits / temperature, targets, reduction="none")


def cross_entropy(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """temperature · CE(softmax(logits / temperature), target), [N]. The paper's term at temperature 1.

    A reference that knows a row by heart has p(target) ≈ 1, and CE has a gradient of 1 − p(target) ≈ 0 in the logits:
    there is nothing left to memorize. A temperature flattens the distribution, so that every answer token has a gradient
    again; the factor in front keeps the gradient's size per unit of logit (as in distillation, arXiv 1503.02531).
    """
    return -temperature * log_prob(logits, targets, temperature)


def headroom(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """1 − p(target) at the temperature, [N] in [0, 1]: the gradient that cross-entropy still has, 0 when saturated."""
    return 1 - log_prob(logits, targets, temperature).exp()


def alternatives(logits: Tensor, reference_logits: Tensor, targets: Tensor) -> Tensor:
    """KL(q ‖ p_θ), [N], with q(v) = p_ref(v) / (1 − p_ref(y)) for v ≠ y and q(y) = 0: the reference without the target y.

    What it would say if it did not know this token of the answer. Where ascent on the answer has no end, this has one: 0.
    """
    lowest = torch.finfo(reference_logits.dtype).min  # not −∞: 0 · ∞ is no number
    others = F.log_softmax(reference_logits.scatter(1, targets[:, None], lowest), dim=-1)
    return F.kl_div(F.log_softmax(logits, dim=-1), others, reduction="none", log_target=True).sum(-1)


def kl_divergence(reference_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(p_ref ‖ p_θ) over the vocabulary, [N]. Zero where both agree; never negative but for rounding."""
    return F.kl_div(
        F.log_softmax(logits, dim=-1), F.log_softmax(reference_logits, dim=-1), reduction="none", log_target=True
    ).sum(-1)


def preference(log_ratio: Tensor, beta: float) -> Tensor:
    """(2/β) · log σ(−β · log(p_θ(y|x) / p_ref(y|x))), per row, from log p summed over the answer's tokens: [rows] → [rows].

    The mirror image of NPO (arXiv 2404.05868): minimising it raises p_θ(y|x) over p_ref(y|x), without a bound but ever
    more like plain log p. At β → 0 it is −log_ratio plus a constant.
    """
    return (2 / beta) * F.logsigmoid(-beta * log_ratio)
