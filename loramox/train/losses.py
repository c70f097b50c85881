"""Losses of unlearning, as functions of tensors.

A function of logits [N, vocabulary] of N answer tokens returns one number a token, [N]; one of log-probabilities of whole answers
returns one a row, [rows]. All are in nats. `loramox.train.methods` and `loramox.train.mox` put them together.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def log_prob(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """log p(target) under softmax(logits / temperature), [N]."""
    tempered = logits if temperature == 1 else logits / temperature  # a division by 1 would copy them
    return -F.cross_entropy(tempered, targets, reduction="none")


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
    """−(2/β) · log σ(−β · log(p_θ(y|x) / p_ref(y|x))), [rows] → [rows] (NPO, arXiv 2404.05868). Never below 0.

    NPO takes log p summed over the answer's tokens; `npo_mean` and `mox` a mean over them. The gradient is that of
    2·log p_θ(y|x) times σ(β · log_ratio), so it slows down on rows that are less likely than before. At β → 0 it is log_ratio
    plus a constant: gradient ascent.
    """
    return -(2 / beta) * F.logsigmoid(-beta * log_ratio)


def preference(log_ratio: Tensor, beta: float) -> Tensor:
    """+(2/β) · log σ(−β · log(p_θ(y|x) / p_ref(y|x))), [rows] → [rows]: MOX's preference variant, which memorizes.

    NPO's loss with the opposite sign (arXiv 2602.06441), log p summed over the answer's tokens. Minimised at θ_ref + ΔW it makes
    the row more likely, the faster the more likely it is already: there is no lower bound.
    """
    return -npo(log_ratio, beta)


def simnpo(mean_log_p: Tensor, beta: float, margin: float = 0.0) -> Tensor:
    """−(2/β) · log σ(−(β/|y|) · log p_θ(y|x) − γ), [rows] → [rows], γ being the margin (arXiv 2410.07163).

    NPO without a reference, and with the mean over the answer's tokens in the place of the sum. The authors' code subtracts its
    γ before it multiplies by β, so that its γ is ours divided by β.
    """
    return -(2 / beta) * F.logsigmoid(-beta * mean_log_p - margin)


def dpo(wanted_log_ratio: Tensor, log_ratio: Tensor, beta: float) -> Tensor:
    """−(2/β) · log σ(β · (log p_θ(ỹ|x)/p_ref(ỹ|x) − log p_θ(y|x)/p_ref(y|x))), both summed over tokens: [rows] → [rows].

    Prefers the wanted answer ỹ to the true one y: a refusal in DPO (arXiv 2305.18290; for unlearning 2404.05868), a plausible
    other answer in AltPO (arXiv 2409.13474). The factor 2/β is AltPO's; DPO has 1, which differs in the weight of the retain
    term alone.
    """
    return -(2 / beta) * F.logsigmoid(beta * (wanted_log_ratio - log_ratio))


def squared_distance(hidden: Tensor, target: Tensor) -> Tensor:
    """Mean over the hidden size of (h − target)², [N, hidden size] → [N], of one layer's states (RMU, arXiv 2403.03218).

    RMU's forget term has the steering vector as target, its retain term the reference's states. The paper writes the sum over
    the hidden size, its code takes the mean; both terms alike, so that the factor between them is the same.
    """
    return (hidden.float() - target.float()).square().mean(-1)


def steering_vector(size: int, coefficient: float, seed: int) -> Tensor:
    """c·u, [size]: u is drawn once, each component uniform in [0, 1), and scaled to length 1 (arXiv 2403.03218)."""
    drawn = torch.rand(size, generator=torch.Generator().manual_seed(seed), device="cpu")
    return coefficient * drawn / drawn.norm()


def generic_targets(reference_logits: Tensor, reinforced_logits: Tensor, strength: float) -> Tensor:
    """argmax of z_ref − α · ReLU(z_reinforced − z_ref), [N, vocabulary] → [N]: what WHP trains in place of the true tokens.

    "Who's Harry Potter?" (arXiv 2310.02238): of the tokens that a model trained further on the forget rows does not raise,
    the likeliest. Its table of names to replace before that is not part of this.
    """
    return (reference_logits - strength * F.relu(reinforced_logits - reference_logits)).argmax(-1)
