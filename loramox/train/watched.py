"""What is watched while training: of some rows, how probable the true answers are, and how many of their tokens come first."""

import functools

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from loramox.model.head import AnswerStates, Head, mean_over_rows, per_token
from loramox.train.losses import headroom, log_prob


def row_scores(head: Head, states: AnswerStates, temperature: float | None) -> Tensor:
    """Means over each row's answer tokens, [rows, scores]: log p, the share of tokens that are the first choice, and, at a
    `temperature` that memorizes, the share of gradient left."""
    of_tokens = [log_prob, _is_first_choice]
    if temperature is not None:
        of_tokens.append(functools.partial(headroom, temperature=temperature))
    scores = [mean_over_rows(per_token(f, head, [states.hidden], states.targets), states) for f in of_tokens]
    return torch.stack(scores, dim=1)


def means(prediction: EvalPrediction) -> dict[str, float]:
    """probability (the mean of exp of a row's mean log p), tokens_right and headroom, over the rows."""
    log_p, right, *room = np.asarray(prediction.predictions).T
    return {"probability": float(np.exp(log_p).mean()), "tokens_right": float(right.mean())} | (
        {"headroom": float(room[0].mean())} if room else {}
    )


def _is_first_choice(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits.argmax(-1) == targets).to(logits.dtype)
