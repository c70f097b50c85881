"""What a model answers, word by word its first choice, and how near that comes to the true answer."""

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from loramox.data.chat import end_tokens
from loramox.data.encode import Example
from loramox.evaluate.scores import AnswerScores, in_eval_mode
from loramox.evaluate.shares import everyones, mine, shows
from loramox.model.sharding import is_sharded

# Said one by one, because a model's own generation config may say otherwise.
GREEDY = {"do_sample": False, "num_beams": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 50} | {
    "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_new_tokens": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Answering:
    """How long an answer may be, in tokens (0: it is not asked for), the texts before which it ends, and how many tokens of
    the true one are scored (None: all of them)."""

    max_new_tokens: int
    stops: tuple[str, ...] = ()
    scored: int | None = None


def greedy_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    scores: Sequence[AnswerScores],
    how: Answering,
    batch_size: int = 32,
    describe: str | None = None,
) -> list[str]:
    """The model's greedy answer to each example's question, no longer than `how` says and than its context.

    `scores` are those of the examples' own answers under the same model. They say already what greedy decoding yields up
    to the first token that is not the true one, and it is only from there that anything is generated. An answer ends where the
    tokenizer, its chat template or the model's generation config says that one ends.
    """
    device = next(model.parameters()).device
    ends = end_tokens(tokenizer) | _own_ends(model)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    questions = [e["input_ids"][: -len(s.targets)] for e, s in zip(examples, scores, strict=True)]
    context = getattr(model.config, "max_position_embeddings", None) or math.inf
    limits = [int(min(how.max_new_tokens, context - len(q))) for q in questions]
    said = [_known(s)[:limit] for s, limit in zip(scores, limits, strict=True)]
    open_ended = [i for i, answer in enumerate(said) if answer[-1] not in ends and len(answer) < limits[i]]
    # Those with as much left to say are together, so that few wait for one. Those that the context cuts short go alone.
    open_ended.sort(key=lambda i: (len(scores[i].targets) - len(said[i]), len(questions[i]) + len(said[i])))
    free = [i for i in open_ended if limits[i] == how.max_new_tokens]
    batches = [free[start : start + batch_size] for start in range(0, len(free), batch_size)]
    batches += [[i] for i in open_ended if limits[i] < how.max_new_tokens]
    bar = tqdm(total=len(open_ended), desc=describe, disable=not shows(describe), leave=False, unit="answers")
    found: dict[int, list[int]] = {}
    with in_eval_mode(model), bar:
        for rows in mine(batches, model):
            prompts = [torch.tensor(questions[i] + said[i]) for i in rows]
            ids = pad_sequence(prompts, batch_first=True, padding_value=pad, padding_side="left").to(device)
            lengths = torch.tensor([len(p) for p in prompts], device=device)
            out = model.generate(
                input_ids=ids,
                attention_mask=(torch.arange(ids.shape[1], device=device) >= ids.shape[1] - lengths[:, None]).long(),
                max_new_tokens=max(limits[i] - len(said[i]) for i in rows),
                eos_token_id=sorted(ends) or None,
                pad_token_id=pad,
                synced_gpus=is_sharded(model),
                **GREEDY,
            )
            for i, tokens in zip(rows, out[:, ids.shape[1] :].tolist(), strict=True):
                found[i] = (said[i] + tokens)[: limits[i]]
            bar.update(len(rows))
    for i, answer in everyones(found).items():
        said[i] = answer
    return [_text(tokenizer, answer, ends, how.stops) for answer in said]


def _known(scores: AnswerScores) -> list[int]:
    """The greedy answer up to its first token that is not the true answer's, that one included."""
    wrong = np.flatnonzero(scores.first_choice != scores.targets)
    return scores.first_choice[: wrong[0] + 1 if len(wrong) else None].tolist()


def _own_ends(model: nn.Module) -> set[int]:
    """The tokens at which the model's generation config, its config.json in its stead, lets it stop: one, several or none."""
    own: Any = getattr(model.generation_config, "eos_token_id", None)
    return {own} if isinstance(own, int) else set(own or ())


def _text(tokenizer: PreTrainedTokenizerBase, tokens: list[int], ends: Set[int], stops: Sequence[str]) -> str:
    end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
    return text[: min([text.find(stop) for stop in stops if stop in text], default=None)].strip()
