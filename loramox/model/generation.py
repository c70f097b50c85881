"""Generate text: greedy or sampled continuations of prompts, a batch at a time."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from loramox.model.fitting import FittingBatch
from loramox.model.head import in_eval_mode
from loramox.model.sharding import is_sharded

BATCH = 32

# Every setting that changes what comes next, because a model's own generation config may have others.
_PLAIN = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_new_tokens": 0}
GREEDY = _PLAIN | {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}


def sampling(temperature: float, top_p: float = 1.0) -> dict[str, Any]:
    """Settings of `new_tokens` to sample from the likeliest tokens that have `top_p` of the probability together."""
    return _PLAIN | {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}


def own_ends(model: nn.Module) -> set[int]:
    """The tokens at which the model's generation config lets it stop: one, several or none."""
    own: Any = getattr(model.generation_config, "eos_token_id", None)
    return {own} if isinstance(own, int) else set(own or ())


class _Without(LogitsProcessor):
    """Sets the logits of each row's own banned tokens to −inf."""

    def __init__(self, banned: Sequence[Sequence[int]]) -> None:
        self.banned = banned

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for row, tokens in enumerate(self.banned):
            scores[row, list(tokens)] = -torch.inf
        return scores


def continuations(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    ends: Sequence[int],
    sample: bool = False,
    banned: Sequence[Sequence[int]] | None = None,
    shortened: Callable[[str], str] | None = None,
) -> list[str]:
    """The model's continuation of each prompt, without special tokens; in smaller batches where memory runs out.

    Args:
        ends: tokens at which a continuation stops, besides the model's own.
        sample: sample at temperature 0.9 from the likeliest 90 %; otherwise take the likeliest token each time.
        banned: for each prompt the tokens that must not come.
        shortened: changes a continuation that is cut off after `tokens`, before its end.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    stops = own_ends(model).union(ends)
    how = sampling(0.9, 0.9) if sample else GREEDY

    def asked(size: int) -> list[str]:
        found: list[str] = []
        for start in range(0, len(prompts), size):
            some = slice(start, start + size)
            processors = [_Without(banned[some])] if banned else []
            said = new_tokens(model, prompts[some], tokens, stops, pad, how, processors)
            texts = [_added_text(tokenizer, prompt, ids) for prompt, ids in zip(prompts[some], said, strict=True)]
            if shortened:
                texts = [
                    text if stops.intersection(ids) else shortened(text) for text, ids in zip(texts, said, strict=True)
                ]
            found += texts
        return found

    with in_eval_mode(model):
        return FittingBatch(BATCH, flag=None).ask(asked)


def _added_text(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The text that tokens add to their prompt, without special tokens.

    Both are decoded together: of tokens alone, SentencePiece's decoders drop the space that they begin with.
    """
    before, both = tokenizer.batch_decode([[*prompt], [*prompt, *ids]], skip_special_tokens=True)
    return both[len(before) :] if both.startswith(before) else tokenizer.decode(ids, skip_special_tokens=True)


def new_tokens(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    ends: Collection[int],
    pad: int,
    how: dict[str, Any] = GREEDY,
    processors: Sequence[LogitsProcessor] = (),
    each: int = 1,
) -> list[list[int]]:
    """The tokens that come after each prompt, all prompts in one batch; the pad token fills those that end early.

    `how` is `GREEDY` or what `sampling` gives; `each` prompt has so many continuations, one after the other.
    """
    device = next(model.parameters()).device
    rows = [torch.tensor(ids) for ids in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left").to(device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    out = model.generate(
        input_ids=ids,
        attention_mask=(torch.arange(ids.shape[1], device=device) >= ids.shape[1] - lengths[:, None]).long(),
        max_new_tokens=tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
        num_return_sequences=each,
        logits_processor=LogitsProcessorList(processors),
        synced_gpus=is_sharded(model),
        **how,
    )
    return out[:, ids.shape[1] :].tolist()
