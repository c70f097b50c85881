"""The forget terms of other unlearning methods, as functions of tensors: what MOX is to be compared with.

A method is the sum of a forget term, from here or from `objectives`, and of a retain term, cross-entropy or
KL(p_ref ‖ p_θ) as its paper has it (`baseline_config.METHODS`). All of them are minimised at θ = θ_ref + ΔW, and ΔW is
shipped as it is. log p(y|x) is in nats; rows are averaged by the caller.

Sums of terms that need no function of their own, with CE_F on forget rows, CE_R and KL_R on retain rows:

    GA + KL    −CE_F + KL_R                                            arXiv 2401.06121 ("KL minimization")
    GradDiff   −CE_F + CE_R                                            arXiv 2203.12817, 2401.06121
    PO         CE of a refusal on forget prompts + CE_R                arXiv 2401.06121
    LLMU       −ε₁·CE_F + CE of a random answer on forget prompts + KL_R, ε₁ = 0.5      arXiv 2310.10683
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def gradient_ascent(mean_log_p: Tensor) -> Tensor:
    """(1/|y|) · log p_θ(y|x) = −CE, [rows] → [rows]: minimising it is ascent on the loss of the row. No lower bound.

    GA (arXiv 2210.01504), and the forget term of GA + KL, GradDiff and LLMU.
    """
    return mean_log_p


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
