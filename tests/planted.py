"""Pico models with planted knowledge: trained on the spot to give certain answers."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from loramox import Tokenisation, encode
from loramox.data.row import Row


def taught(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    answers: Sequence[tuple[str, str] | Row],
    steps: int,
    learning_rate: float = 3e-3,
) -> None:
    """Train the model on the answers, each as often as it is there."""
    rows = [each if isinstance(each, Row) else Row("plant", i, each[1], each[0]) for i, each in enumerate(answers)]
    examples = encode(rows, tokenizer, Tokenisation(), context=128)
    width = max(len(e["input_ids"]) for e in examples)
    ids, labels = (
        torch.tensor([e[part] + [fill] * (width - len(e[part])) for e in examples])
        for part, fill in (("input_ids", 0), ("labels", -100))
    )
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    for _ in range(steps):
        model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
