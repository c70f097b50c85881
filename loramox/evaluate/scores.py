"""Scores of given answers under a model, token by token, from the logits of answer tokens alone."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from loramox.data.encode import IGNORED, Example
from loramox.data.pairs import Collator
from loramox.evaluate.shares import everyones, in_batches, mine, progress
from loramox.model.head import Head, answer_states, in_eval_mode, per_token

# On a CPU, logits that fit its cache, in elements: twice as fast as in main memory.
CACHED_ELEMENTS = 1_000_000


class AnswerScores(NamedTuple):
    """What a model makes of one answer's n tokens, the end-of-sequence token among them."""

    targets: np.ndarray  # [n], the tokens
    log_p: np.ndarray  # [n], log p(token | all before it), nats
    first_choice: np.ndarray  # [n], the token that the model itself would have said there
    mean: np.ndarray  # [n], Σ p·log p over the vocabulary, nats
    spread: np.ndarray  # [n], standard deviation of log p under p, nats
    kl: np.ndarray | None = None  # [n], KL(p_ref ‖ p), nats, where the reference's states were given
    hidden: Tensor | None = None  # [n, hidden size], when asked for


def score_answers(
    model: nn.Module,
    examples: Sequence[Example],
    pad_token_id: int = 0,
    batch_size: int = 32,
    describe: str | None = None,
    reference: Sequence[Tensor] | None = None,
    keep_hidden: bool = False,
    log_p_only: int = 0,
) -> list[AnswerScores]:
    """Score each example's answer, in order. `examples` are what `loramox.encode` returns.

    Of the last `log_p_only` of them no more than log_p is taken: first_choice is -1 there, mean and spread are NaN.

    `reference` has the `hidden` of each example under the reference model; with it, KL(p_ref ‖ p) is scored too. Batches
    are made of `batch_size` rows of similar length, and no more logits are made than a few answer tokens' at a time. The longest
    come first: where memory runs out, few passes are made again. Several processes share the batches; `hidden` is then each
    one's own alone.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    head, collate = Head(causal_lm), Collator(pad_token_id)
    device = next(causal_lm.parameters()).device
    longest = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]), reverse=True)
    scores: dict[int, AnswerScores] = {}
    own: dict[int, Tensor] = {}
    bar = progress(describe, "answers", total=len(examples))
    with in_eval_mode(model), torch.no_grad(), bar:
        for order in mine(in_batches(longest, batch_size), model):
            batch = send_to_device(collate([examples[i] for i in order]), device)
            states = answer_states(model, causal_lm, batch)
            known = [torch.cat([reference[i] for i in order]).to(device)] if reference is not None else []
            tensors = (states.hidden, *known, states.targets)
            brief = torch.tensor([i >= len(examples) - log_p_only for i in order], device=device)[states.row_of]
            columns = np.full((len(brief), 4 + len(known)), [np.nan, -1.0] + [np.nan] * (2 + len(known)))
            for some, function in ((~brief, _columns), (brief, _log_p)):
                if some.any():
                    found = _on_logits(function, head, *(t[some] for t in tensors)).cpu().double().numpy()
                    columns[some.cpu().numpy(), : found.shape[1]] = found
            ends = torch.bincount(states.row_of, minlength=states.rows).cumsum(0)[:-1].tolist()
            targets = np.split(states.targets.cpu().numpy(), ends)
            if keep_hidden:
                own |= zip(order, states.hidden.cpu().tensor_split(ends), strict=True)
            for i, part, target in zip(order, np.split(columns, ends), targets, strict=True):
                log_p, choice, mean, spread, *kl = part.T
                scores[i] = AnswerScores(target, log_p, choice.astype(np.int64), mean, spread, kl[0] if kl else None)
            bar.update(len(order))
    scores = everyones(scores)
    return [scores[i]._replace(hidden=own.get(i)) for i in range(len(examples))]


def mean_log_p(scores: Sequence[AnswerScores]) -> np.ndarray:
    """Mean log-probability of each answer's tokens in nats, the end of sequence among them, [rows]. Its exp is TOFU's
    probability."""
    return np.array([s.log_p.mean() for s in scores])


def _on_logits(function: Callable[..., Tensor], head: Head, *tensors: Tensor) -> Tensor:
    """`function` of every answer token. `tensors` are hidden states, those of the reference if there are any, and targets."""
    *hidden, targets = tensors
    size = max(64, CACHED_ELEMENTS // head.vocabulary) if targets.device.type == "cpu" else len(targets)
    pieces = zip(*(t.split(size) for t in (*hidden, targets)), strict=True)
    return torch.cat([per_token(function, head, list(states), target) for *states, target in pieces])


def _log_p(logits: Tensor, *others: Tensor) -> Tensor:
    """[chunk, 1]: log p(target)."""
    return log_softmax(logits, -1).gather(-1, others[-1][:, None])


def _columns(logits: Tensor, *others: Tensor) -> Tensor:
    """[chunk, 4 or 5]: log p(target), first choice, mean and spread of log p, and KL from the reference's logits."""
    *reference, targets = others
    log_p = log_softmax(logits, -1)
    p = log_p.exp()
    mean = (p * log_p).sum(-1)
    spread = (p * (log_p - mean[:, None]).square()).sum(-1).sqrt()
    said = log_p.gather(-1, targets[:, None])[:, 0]
    kl = [kl_div(log_p, log_softmax(known, -1), log_target=True, reduction="none").sum(-1) for known in reference]
    return torch.stack([said, logits.argmax(-1).float(), mean, spread, *kl], dim=1)


def answer_start(example: Example) -> int:
    return next(i for i, label in enumerate(example["labels"]) if label != IGNORED)


def piece(example: Example, end: int) -> Example:
    """The example without the tokens from `end` on."""
    return example | {part: example[part][:end] for part in ("input_ids", "labels")}
