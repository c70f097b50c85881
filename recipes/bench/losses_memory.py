"""The memory that a loss alone adds, in chunks as here, and with all its logits at once."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loramox.model.head import Head, per_token
from loramox.run import memory_now, peak_memory
from loramox.train.losses import cross_entropy, kl_divergence

LOSSES = ("cross-entropy", "KL", "cross-entropy of all logits at once", "KL of all logits at once")


def loss_memory(which: str, device: str, tokens: int = 2_048, vocabulary: int = 128_000) -> dict[str, int]:
    """What the loss of `tokens` answer tokens adds to hidden states and head, forward and backward, in bytes."""
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=1_024, num_hidden_layers=0, tie_word_embeddings=True)
    head = Head(LlamaForCausalLM(config).to(device).requires_grad_(False))
    hidden, known = (torch.randn(tokens, config.hidden_size, device=device) for _ in range(2))
    hidden.requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=device)
    losses = {
        "cross-entropy": lambda: per_token(cross_entropy, head, [hidden], targets),
        "KL": lambda: per_token(kl_divergence, head, [known, hidden]),
        "cross-entropy of all logits at once": lambda: cross_entropy(head(hidden), targets),
        "KL of all logits at once": lambda: kl_divergence(head(known), head(hidden)),
    }
    head(hidden[:8].detach())  # the matrix library's own buffers are not the loss's
    before = memory_now(device)
    losses[which]().mean().backward()
    return {"before": before, "peak": peak_memory(device)}
