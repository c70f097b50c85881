"""Greedy answers of a model, token by token, and how close they come to the true answers."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from loramox.data.chat import end_tokens
from loramox.data.encode import Example
from loramox.evaluate.scores import AnswerScores, answer_start
from loramox.evaluate.shares import everyones, in_batches, mine, progress
from loramox.model.generation import new_tokens, own_ends, sampling
from loramox.model.head import in_eval_mode


@dataclass(frozen=True)
class Answering:
    """How long an answer may be, in tokens (0: it is not asked for), the texts before which it ends, and how many tokens of
    the true one are scored (None: all of them). An example's own `stops` end its answer too."""

    max_new_tokens: int
    stops: tuple[str, ...] = ()
    scored: int | None = None


def greedy_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    scores: Sequence[AnswerScores] | None,
    how: Answering,
    batch_size: int = 32,
    describe: str | None = None,
    steering: Callable[[Sequence[int]], LogitsProcessor] | None = None,
) -> list[str]:
    """The model's greedy answer to each example's question, no longer than `how` says and than its context.

    `scores` are those of the examples' own answers under the same model. They say already what greedy decoding yields up
    to the first token that is not the true one, and it is only from there that anything is generated. An answer ends where the
    tokenizer, its chat template or the model's generation config says that one ends.

    With `steering` the likeliest token is that of changed logits: it is given the lengths of a batch's prompts, which are padded
    on the left, and makes the batch's processor. `scores` are then None.
    """
    questions, limits = _questions(model, examples, how)
    ends, pad = end_tokens(tokenizer) | own_ends(model), _pad(tokenizer)
    said = [_known(s)[:limit] for s, limit in zip(scores, limits, strict=True)] if scores else [[] for _ in examples]
    open_ended = [i for i, answer in enumerate(said) if len(answer) < limits[i] and not ends & {*answer[-1:]}]

    def likely_length(i: int) -> tuple[int, int]:
        """How much of the true answer is left, and how long the prompt is."""
        prompt = len(questions[i]) + len(said[i])
        return len(examples[i]["input_ids"]) - prompt, prompt

    # Those with as much left to say are together, so that few wait for one. Those that the context cuts short go alone.
    open_ended.sort(key=likely_length)
    free = [i for i in open_ended if limits[i] == how.max_new_tokens]
    batches = [*in_batches(free, batch_size), *([i] for i in open_ended if limits[i] < how.max_new_tokens)]
    # The largest first: where memory runs out, few answers are made again.
    batches.sort(key=lambda rows: len(rows) * max(len(examples[i]["input_ids"]) for i in rows), reverse=True)
    bar = progress(describe, "answers", total=len(open_ended))
    found: dict[int, list[int]] = {}
    with in_eval_mode(model), bar:
        for rows in mine(batches, model):
            prompts = [questions[i] + said[i] for i in rows]
            most = max(limits[i] - len(said[i]) for i in rows)
            steered = [steering([len(prompt) for prompt in prompts])] if steering else []
            out = new_tokens(model, prompts, most, ends, pad, processors=steered)
            for i, tokens in zip(rows, out, strict=True):
                found[i] = (said[i] + tokens)[: limits[i]]
            bar.update(len(rows))
    for i, answer in everyones(found).items():
        said[i] = answer
    return [_text(tokenizer, answer, ends, _stops(how, e)) for answer, e in zip(said, examples, strict=True)]


def sampled_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    how: Answering,
    count: int,
    temperature: float,
    seed: int,
    finished: dict[int, list[str]],
    batch_size: int = 32,
    describe: str | None = None,
) -> list[list[str]]:
    """`count` answers to each example's question, sampled from all tokens at a temperature.

    Each question has a seed of its own, so that its answers depend on `seed` and `batch_size` and not on the other questions.
    `finished` gets the answers by the number of the question, so that a call after memory ran out asks only the others.
    torch's own generators are left as they were.
    """
    questions, limits = _questions(model, examples, how)
    ends, pad = end_tokens(tokenizer) | own_ends(model), _pad(tokenizer)
    device = next(model.parameters()).device
    bar = progress(describe, "questions", questions)
    with in_eval_mode(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        for i, (question, limit, example) in enumerate(zip(bar, limits, examples, strict=True)):
            if i in finished:
                continue
            own = hashlib.sha256(json.dumps([seed, question]).encode()).digest()[:8]
            torch.manual_seed(int.from_bytes(own, "big", signed=True))
            tokens: list[list[int]] = []
            while limit > 0 and len(tokens) < count:
                each = min(batch_size, count - len(tokens))
                tokens += new_tokens(model, [question], limit, ends, pad, sampling(temperature), each=each)
            stops = _stops(how, example)
            finished[i] = [_text(tokenizer, answer, ends, stops) for answer in tokens or [[]] * count]
    return [finished[i] for i in range(len(questions))]


def _questions(model: nn.Module, examples: Sequence[Example], how: Answering) -> tuple[list[list[int]], list[int]]:
    """Each example's question as tokens, and how many tokens its answer may have."""
    # The first token is predicted from nothing: of an empty question it is what the model is asked.
    questions = [e["input_ids"][: max(1, answer_start(e))] for e in examples]
    context = getattr(model.config, "max_position_embeddings", None) or math.inf
    return questions, [int(min(how.max_new_tokens, context - len(question))) for question in questions]


def _pad(tokenizer: PreTrainedTokenizerBase) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0


def _known(scores: AnswerScores) -> list[int]:
    """The greedy answer up to its first token that is not the true answer's, that one included."""
    wrong = np.flatnonzero(scores.first_choice != scores.targets)
    return scores.first_choice[: wrong[0] + 1 if len(wrong) else None].tolist()


def _stops(how: Answering, example: Example) -> tuple[str, ...]:
    return (*how.stops, *example.get("stops", ()))


def _text(tokenizer: PreTrainedTokenizerBase, tokens: list[int], ends: Set[int], stops: Sequence[str]) -> str:
    end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
    return text[: min([text.find(stop) for stop in stops if stop in text], default=None)].strip()
