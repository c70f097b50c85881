"""Scores of a few rows in training: probability of true answers and of their second halves; tokens that are the first choice."""

import functools

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from loramox.model.head import AnswerStates, Head, answer_lengths, mean_over_rows, per_token, positions, sum_over_rows
from loramox.train.losses import headroom, log_prob


def row_scores(head: Head, states: AnswerStates, temperature: float | None) -> Tensor:
    """Scores of each row, [rows, scores]: over its answer tokens the means of log p and of being the first choice; whether greedy
    decoding gives the answer; the mean log p of its second half; and, at a `temperature` that memorizes, the mean share of
    gradient left."""
    of_tokens = [log_prob, _is_first_choice]
    if temperature is not None:
        of_tokens.append(functools.partial(headroom, temperature=temperature))
    values = [per_token(f, head, [states.hidden], states.targets) for f in of_tokens]
    scores = [mean_over_rows(each, states) for each in values]
    right, late = _is_right(values[1], states).to(scores[0]), _late(values[0], states)
    return torch.stack([*scores[:2], right, late, *scores[2:]], dim=1)


def means(prediction: EvalPrediction) -> dict[str, float]:
    """Means over the rows: probability (exp of a row's mean log p), tokens_right, rows_right, late_probability and headroom."""
    log_p, right, whole, late, *room = np.asarray(prediction.predictions).T
    found = {"probability": np.exp(log_p), "tokens_right": right, "rows_right": whole}
    found["late_probability"] = np.exp(late)
    return {name: float(scores.mean()) for name, scores in (found | ({"headroom": room[0]} if room else {})).items()}


def _late(log_p: Tensor, states: AnswerStates) -> Tensor:
    """Mean log p of the second half of each answer, [rows]; without the token that ends it, unless that is all."""
    place, lengths = positions(states), answer_lengths(states)[states.row_of]
    late = ((place >= (lengths - 1) // 2) & ((place < lengths - 1) | (lengths == 1))).to(log_p)
    return sum_over_rows(late * log_p, states) / sum_over_rows(late, states)


def _is_first_choice(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits.argmax(-1) == targets).to(logits.dtype)


def _is_right(first_choice: Tensor, states: AnswerStates) -> Tensor:
    """Whether all tokens of each answer are the first choice, [rows]; of several, all but the last, with which it ends."""
    lengths = answer_lengths(states)
    wrong = 1 - first_choice
    last = wrong[(lengths.cumsum(0) - 1).clamp_min(0)] * (lengths > 1)
    return sum_over_rows(wrong, states) - last == 0
