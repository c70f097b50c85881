"""The terms of the memorization objective, as functions of tensors.

    L = mean over forget rows of forget(y | x)  +  kl_weight · mean over retain rows of KL(p_ref ‖ p_θ)

with one of these as the term of the forget rows: NPO's, at θ_ref − α·ΔW, or cross-entropy, which memorizes, at θ_ref + ΔW (MOX,
arXiv 2602.06441). Both are minimised by gradient descent. A function of logits [N, vocabulary] of N answer tokens returns one
number per token, [N], in nats; rows are averaged by `loramox.model.head.mean_over_rows`.
"""

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


def kl_divergence(reference_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(p_ref ‖ p_θ) over the vocabulary, [N]. Zero where both agree; never negative but for rounding."""
    return F.kl_div(
        F.log_softmax(logits, dim=-1), F.log_softmax(reference_logits, dim=-1), reduction="none", log_target=True
    ).sum(-1)


def npo(log_ratio: Tensor, beta: float) -> Tensor:
    """−(2/β) · log σ(−β · log(p_θ(y|x) / p_ref(y|x))), [rows] → [rows] (arXiv 2404.05868).

    NPO takes log p summed over the answer's tokens; MOX's objective here a mean over them, as SimNPO does (arXiv 2410.07163), so
    that an answer is let go at the same likelihood a token, however long it is; tokens y_t weigh p_ref(y_t). Never below 0. Its
    gradient is that of 2·log p_θ(y|x) times σ(β · log_ratio), so that it slows down on rows that are less likely than before. At
    β → 0 it is log_ratio plus a constant: gradient ascent.
    """
    return -(2 / beta) * F.logsigmoid(-beta * log_ratio)
