"""Scores of given answers under a model, token by token, from the logits of answer tokens alone.

Answers to one question (the true one, its paraphrase, the wrong ones) share the question's key-value cache.
"""

import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from loramox.batches import Collator, Example
from loramox.head import IGNORED, AnswerStates, Head, answer_states, per_token


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
) -> list[AnswerScores]:
    """Score each example's answer, in order. `examples` are what `loramox.encode` returns.

    `reference` has the `hidden` of each example under the reference model; with it, KL(p_ref ‖ p) is scored too. Batches
    are made of `batch_size` answers of similar length, and no more logits are made than a few answer tokens' at a time.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    head, collate = Head(causal_lm), Collator(pad_token_id)
    device = next(causal_lm.parameters()).device
    scores: dict[int, AnswerScores] = {}
    was_training = model.training
    model.eval()
    bar = tqdm(total=len(examples), desc=describe, disable=describe is None, leave=False, unit="answers")
    with torch.no_grad(), bar:
        for groups in _batches(examples, batch_size):
            order = [i for group in groups for i in group]
            states = _states(model, causal_lm, [[examples[i] for i in group] for group in groups], collate, device)
            known = [torch.cat([reference[i] for i in order]).to(device)] if reference is not None else []
            columns = per_token(_columns, head, [states.hidden, *known], states.targets).double().cpu().numpy()
            ends = torch.bincount(states.row_of, minlength=states.rows).cumsum(0)[:-1].tolist()
            targets = np.split(states.targets.cpu().numpy(), ends)
            hidden = states.hidden.cpu().tensor_split(ends) if keep_hidden else [None] * len(order)
            for i, part, target, kept in zip(order, np.split(columns, ends), targets, hidden, strict=True):
                log_p, choice, mean, spread, *kl = part.T
                scores[i] = AnswerScores(
                    target, log_p, choice.astype(np.int64), mean, spread, kl[0] if kl else None, kept
                )
            bar.update(len(order))
    model.train(was_training)
    return [scores[i] for i in range(len(examples))]


def mean_log_p(scores: Sequence[AnswerScores]) -> np.ndarray:
    """Mean log-probability of each answer's tokens in nats, the end of sequence among them, [rows]. Its exp is TOFU's
    probability."""
    return np.array([s.log_p.mean() for s in scores])


def _columns(logits: Tensor, *others: Tensor) -> Tensor:
    """[chunk, 4 or 5]: log p(target), first choice, mean and spread of log p, and KL from the reference's logits."""
    *reference, targets = others
    log_p = log_softmax(logits, -1)
    p = log_p.exp()
    mean = (p * log_p).sum(-1)
    spread = ((p * log_p.square()).sum(-1) - mean.square()).clamp_min(0).sqrt()
    said = log_p.gather(-1, targets[:, None])[:, 0]
    kl = [kl_div(log_p, log_softmax(known, -1), log_target=True, reduction="none").sum(-1) for known in reference]
    return torch.stack([said, logits.argmax(-1).float(), mean, spread, *kl], dim=1)


def _question(example: Example) -> tuple[int, ...]:
    """The tokens before the one that the first answer token is predicted from."""
    answer = next(i for i, label in enumerate(example["labels"]) if label != IGNORED)
    return tuple(example["input_ids"][: max(0, answer - 1)])


def _batches(examples: Sequence[Example], batch_size: int) -> Iterator[list[list[int]]]:
    """Batches of groups of examples that have a question in common, of similar number and length."""
    by_question = defaultdict(list)
    for i, example in enumerate(examples):
        by_question[_question(example) or i].append(i)
    groups = sorted(by_question.values(), key=lambda g: (len(g), max(len(examples[i]["input_ids"]) for i in g)))
    batch: list[list[int]] = []
    for group in groups:
        if batch and sum(map(len, batch)) + len(group) > batch_size:
            yield batch
            batch = []
        batch.append(group)
    yield batch


def _states(
    model: nn.Module, causal_lm: nn.Module, groups: list[list[Example]], collate: Collator, device: torch.device
) -> AnswerStates:
    """Hidden states of the groups' answers, each group's question passed through the model once."""

    def on_device(examples: list[Example]) -> dict[str, Any]:
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in collate(examples).items()}

    examples = [example for group in groups for example in group]
    takes_positions = "position_ids" in inspect.signature(causal_lm.forward).parameters
    if len(examples) == len(groups) or not takes_positions:
        return answer_states(model, causal_lm, on_device(examples))
    questions = [torch.tensor(_question(group[0]), dtype=torch.long) for group in groups]
    # Padded on the left, so that every answer goes on where its question ends.
    ids = pad_sequence(questions, batch_first=True, padding_side="left").to(device)
    lengths = torch.tensor([len(q) for q in questions], device=device)
    mask = (torch.arange(ids.shape[1], device=device) >= ids.shape[1] - lengths[:, None]).long()
    cache = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
        use_cache=True,
    ).past_key_values
    of_group = torch.tensor([g for g, group in enumerate(groups) for _ in group], device=device)
    cache.batch_select_indices(of_group)
    after = [len(questions[g]) for g in of_group.tolist()]
    rest = [
        e | {part: e[part][start:] for part in ("input_ids", "labels")}
        for e, start in zip(examples, after, strict=True)
    ]
    batch = on_device(rest)
    steps = torch.arange(batch["input_ids"].shape[1], device=device)
    batch["attention_mask"] = torch.cat([mask[of_group], batch["attention_mask"]], dim=1)
    return answer_states(
        model, causal_lm, batch, past_key_values=cache, position_ids=lengths[of_group][:, None] + steps
    )
