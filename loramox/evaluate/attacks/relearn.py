"""The relearning attack: a few steps of training, on some of the forget rows or on harmless ones."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor

from loramox.data.encode import Example
from loramox.data.pairs import Collator
from loramox.model.head import Head, answer_states, mean_over_rows, per_token
from loramox.model.lora import ADAPTER

ATTACKER = "relearning"


@contextmanager
def attacker(model: PeftModel, rank: int, seed: int) -> Iterator[PeftModel]:
    """Within it `model` has a second, fresh LoRA adapter beside the forget adapter, which is the only thing that trains.

    The weights below may be in 4 bits, and nothing is merged. Afterwards the model is as it was.
    """
    torch.manual_seed(seed)
    kind = model.peft_config[ADAPTER]
    model.add_adapter(ATTACKER, LoraConfig(r=rank, lora_alpha=rank, target_modules=kind.target_modules, task_type="CAUSAL_LM",
                                           fan_in_fan_out=kind.fan_in_fan_out))  # fmt: skip
    try:
        model.base_model.set_adapter([ADAPTER, ATTACKER])
        for name, weight in model.named_parameters():
            weight.requires_grad_(f".{ATTACKER}." in name)
        yield model
    finally:
        model.delete_adapter(ATTACKER)
        model.set_adapter(ADAPTER)
        model.requires_grad_(False)


def train(
    model: PeftModel,
    examples: Sequence[Example],
    until: Sequence[int],
    learning_rate: float,
    batch_size: int,
    pad_token_id: int,
    seed: int,
) -> Iterator[int]:
    """Train what trains in `model` on `examples` by cross-entropy of their answers, AdamW; stop at each of the steps `until`.

    A generator: it yields each step's number with the model as it is after it. Rows are dealt from seeded shuffles.
    """
    causal_lm = model.get_base_model()
    head, collate = Head(causal_lm), Collator(pad_token_id)
    device = next(causal_lm.parameters()).device
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate, weight_decay=0)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for step in range(1, max(until) + 1):
        if len(order) < min(batch_size, len(examples)):
            order += torch.randperm(len(examples), generator=generator).tolist()
        rows, order = order[:batch_size], order[batch_size:]
        batch = collate([examples[i] for i in rows])
        model.train()
        states = answer_states(
            model, causal_lm, {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        )
        loss = mean_over_rows(per_token(_cross_entropy, head, [states.hidden], states.targets), states).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        if step in until:
            yield step


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")
