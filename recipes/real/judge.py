"""Ask a forget model everything, at several scales of its adapter, and count."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from loramox import ForgetSwitch
from loramox.data.fluency import SHARED, is_fluent, overlap
from loramox.train.inputs import REFUSALS, is_refusal, read_refusals

from .world import Asked, answers, right

SCALES = (1.0, 0.75, 0.5, 0.25, 1.25)
Answers = dict[str, list[str]]  # by part


def ask(model: nn.Module, tokenizer: PreTrainedTokenizerBase, asked: dict[str, list[Asked]]) -> Answers:
    """The answers to every part, all asked together."""
    said = iter(answers(model, tokenizer, [each for some in asked.values() for each in some]))
    return {part: [next(said) for _ in some] for part, some in asked.items()}


def judged(
    base: str,
    adapter: Path,
    tokenizer: PreTrainedTokenizerBase,
    asked: dict[str, list[Asked]],
    scales: Sequence[float],
) -> dict[str, Answers]:
    """What the forget model answers at each scale, loaded as a user would load it."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), str(adapter)).eval()
    switch, found = ForgetSwitch(model), {}
    for scale in scales:
        with switch.at(scale):
            found[str(scale)] = ask(model, tokenizer, asked)
    return found


def counts(said: Answers, reference: Answers, asked: dict[str, list[Asked]]) -> dict[str, dict[str, Any]]:
    """By part: rows; fluent and refused answers; of the questions that the reference answers right, how many still are; and how
    many answers share half of their words with the reference's."""
    refusals = read_refusals(str(REFUSALS))
    found = {}
    for part, questions in asked.items():
        now, before = said[part], reference[part]
        known = [i for i, each in enumerate(questions) if right(before[i], each)]
        found[part] = {
            "rows": len(questions),
            "fluent": sum(map(is_fluent, now)),
            "refused": sum(is_refusal(text, refusals) for text in now),
            "known": len(known),
            "right": sum(right(now[i], questions[i]) for i in known),
            "alike": sum(overlap(a, b) >= SHARED for a, b in zip(now, before, strict=True)),
        }
    return found
