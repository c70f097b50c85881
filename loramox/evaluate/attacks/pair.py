"""The pair attack: use the difference between base and adapter, and go in the opposite direction."""

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import LogitsProcessor

from loramox.evaluate.answers import greedy_answers
from loramox.evaluate.measure import Questions
from loramox.evaluate.metric import Record, Summary, values
from loramox.evaluate.row_record import rouge_of
from loramox.evaluate.summary import summarise
from loramox.model.lora import at_scale

Scores = dict[str, float]


class Guidance(LogitsProcessor):
    """base + strength·(base − forget model), of the next token's logits (model guidance, arXiv 2505.24379).

    The model that generates is the base, its adapter at scale 0. The forget model is the same one at `scale`, in a second pass
    with a cache of its own; `lengths` are those of the prompts, padded on the left.
    """

    def __init__(self, model: PeftModel, scale: float, strength: float, lengths: Sequence[int]) -> None:
        self.model, self.scale, self.strength = model, scale, strength
        self.lengths, self.width = lengths, max(lengths)
        self.cache: Any = None
        self.takes = inspect.signature(model.get_base_model().forward).parameters
        self.seen = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        column = torch.arange(input_ids.shape[1], device=input_ids.device)
        starts = self.width - torch.tensor(self.lengths, device=input_ids.device)[:, None]
        inputs = {
            "input_ids": input_ids[:, self.seen :],
            "attention_mask": (column >= starts).long(),
            "position_ids": (column - starts).clamp_min(0)[:, self.seen :],
            "logits_to_keep": 1,
        }
        with at_scale(self.model, self.scale):
            taken = {name: value for name, value in inputs.items() if name in self.takes}
            out = self.model(**taken, past_key_values=self.cache, use_cache=True)
        self.cache, self.seen = out.past_key_values, input_ids.shape[1]
        return scores + self.strength * (scores - out.logits[:, -1].to(scores))


def guided(model: PeftModel, questions: Questions, scale: float, strength: float, describe: str) -> list[Record]:
    """A record for each row with a question: the base's greedy answer under guidance away from the forget model at `scale`."""
    steering = functools.partial(Guidance, model, scale, strength)
    with at_scale(model, 0.0):
        answers = questions.answered(model, greedy_answers, scores=None, describe=describe, steering=steering)
    return [record | {"said": said} | rouge_of(said, *row.right_answers) for record, row, said in answers]


def summary(records: Sequence[Record]) -> Summary:
    """The ROUGE-L of the answers; they are not the model's own, so that there are no scores of the true ones."""
    everything = summarise(records)
    return Summary({name: m for name, m in everything.metrics.items() if "rouge_l" in name}, {})


def beyond_base(records: Sequence[Record], base: Sequence[Record]) -> tuple[Scores, list[dict[str, Any]]]:
    """What the answers have of the true ones that the base's own greedy answers do not: means over the forget rows that both
    have, of the ROUGE-L recall of the base's own answers and of how far the others go beyond it (0 where they do not); and the
    rows with the largest gains.
    """
    own = {r["id"]: r["rouge_l"] for r in base if r["part"] == "forget" and "rouge_l" in r}
    rows = [r for r in records if r["part"] == "forget" and "rouge_l" in r and r["id"] in own]
    if not rows:
        return {}, []
    theirs = np.array([own[r["id"]] for r in rows])
    gains = np.maximum(values(rows, "rouge_l") - theirs, 0)
    worst = [
        {"row": rows[i]["row"], "rouge_l": rows[i]["rouge_l"], "base": float(theirs[i])}
        for i in np.argsort(-gains, kind="stable")[:5]
        if gains[i] > 0
    ]
    return {"base_rouge_l": float(theirs.mean()), "rouge_l_beyond_base": float(gains.mean())}, worst
