"""Text from a model: greedy or sampled continuations of prompts, a batch at a time."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

BATCH = 32
SAMPLED = {"do_sample": True, "temperature": 0.9, "top_p": 0.9, "top_k": 0}


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
) -> list[str]:
    """The model's continuation of each prompt, without special tokens.

    Args:
        prompts: token ids, each prompt at least one.
        tokens: most new tokens.
        ends: tokens at which a continuation stops.
        sample: sample at temperature 0.9 from the likeliest 90 %; otherwise take the likeliest token each time.
        banned: for each prompt the tokens that must not come.
    """
    device, found = next(model.parameters()).device, []
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    # A config of its own: the model's may ask for penalties or sampling.
    how = GenerationConfig(
        max_new_tokens=tokens,
        pad_token_id=pad,
        eos_token_id=list(ends),
        **(SAMPLED if sample else {"do_sample": False}),
    )
    training = model.training
    model.eval()
    try:
        for start in range(0, len(prompts), BATCH):
            rows = [torch.tensor(ids) for ids in prompts[start : start + BATCH]]
            ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left").to(device)
            lengths = torch.tensor([len(row) for row in rows], device=device)
            attended = (torch.arange(ids.shape[1], device=device) >= ids.shape[1] - lengths[:, None]).long()
            processors = LogitsProcessorList([_Without(banned[start : start + BATCH])] if banned else [])
            with torch.inference_mode():
                said = model.generate(
                    input_ids=ids, attention_mask=attended, generation_config=how, logits_processor=processors
                )
            found += tokenizer.batch_decode(said[:, ids.shape[1] :], skip_special_tokens=True)
    finally:
        model.train(training)
    return found
