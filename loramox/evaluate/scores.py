"""Scores of given answers under a model, row by row, from the logits of answer tokens alone."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from loramox.batches import Collator, Example
from loramox.head import Head, answer_states, mean_over_rows, per_token


def answer_scores(
    model: nn.Module,
    examples: Sequence[Example],
    pad_token_id: int = 0,
    batch_size: int = 32,
    describe: str | None = None,
) -> dict[str, np.ndarray]:
    """For each example, in order: `log_p`, mean log-probability of its answer tokens in nats, [rows]; and `right`, the
    share of them that are the model's first choice, [rows] (exact memorization). `exp(log_p)` is TOFU's probability.

    The end-of-sequence token counts as an answer token in both. Batches are made of rows of similar length.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    head, collate = Head(causal_lm), Collator(pad_token_id)
    device = next(causal_lm.parameters()).device
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    scores = np.zeros((2, len(examples)))
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for start in tqdm(range(0, len(order), batch_size), desc=describe, disable=describe is None, leave=False):
            rows = order[start : start + batch_size]
            batch = {
                k: v.to(device) if isinstance(v, Tensor) else v for k, v in collate([examples[i] for i in rows]).items()
            }
            states = answer_states(model, causal_lm, batch)
            of_tokens = torch.stack(
                [per_token(f, head, [states.hidden], states.targets) for f in (_log_p, _right)],
            )
            scores[:, rows] = (
                torch.stack([mean_over_rows(values, states) for values in of_tokens]).double().cpu().numpy()
            )
    model.train(was_training)
    return {"log_p": scores[0], "right": scores[1]}


def _log_p(logits: Tensor, targets: Tensor) -> Tensor:
    return -torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def _right(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits.argmax(-1) == targets).to(logits.dtype)
