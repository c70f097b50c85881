"""The rows of a plan: the user's own, those that the reference would write, or made-up rows of one length."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from loramox.data.encode import IGNORED, Example, Tokenisation
from loramox.data.pairs import Pairs
from loramox.data.rows import Columns, Data
from loramox.model.lora import ReferenceConfig
from loramox.train.config import UnlearnConfig
from loramox.train.inputs import taught_refusals
from loramox.train.prepare import prepare
from loramox.train.writer import ANSWER_TOKENS, LATER, QUESTION_TOKENS

Parts = dict[str, list[Example]]  # forget, retain, wanted, protected

ROWS = 100  # forget rows, where none are given


class Rows(NamedTuple):
    """The rows as the trainer takes them, and how they come together in an epoch."""

    datasets: dict[str, Sequence[Example]]  # forget, retain, wanted, protected
    retain_per_forget: int

    def micro_batches(self, size: int, seed: int, epoch: int = 0) -> list[Parts]:
        """Those of an epoch, dealt as the trainer deals them."""
        forget, retain, wanted, protected = (
            self.datasets.get(p, ()) for p in ("forget", "retain", "wanted", "protected")
        )
        pairs = Pairs(forget, retain, self.retain_per_forget, wanted, seed, protected)
        pairs.epoch = epoch
        order = torch.randperm(len(forget), generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        batches = []
        for start in range(0, len(order), size):
            items = [pairs[i] for i in order[start : start + size]]
            batches.append({part: [e for item in items for e in item[part]] for part in items[0]})
        return batches

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(e["input_ids"]) for examples in self.datasets.values() for e in examples)


def rows_of(
    reference: ReferenceConfig, data: Data, args: UnlearnConfig, columns: Columns, tokenisation: Tokenisation
) -> Rows:
    prepared = prepare(reference, data, args, columns, tokenisation)
    datasets: dict[str, Sequence[Example]] = {
        part.removesuffix("_dataset"): rows for part, rows in prepared.datasets.items()
    }
    # Rows that the reference would write (--auto_retain, --instead guess) count at their greatest length.
    prompt = max(next(i for i, label in enumerate(e["labels"]) if label != IGNORED) for e in datasets["forget"])
    longest = _row(min(prompt + QUESTION_TOKENS + ANSWER_TOKENS, prepared.context))
    after_refusal = _row(min(2 * prompt + QUESTION_TOKENS + 2 * ANSWER_TOKENS, prepared.context))
    later = prepared.to_write // LATER if taught_refusals(args) else 0
    datasets["retain"] = [*datasets["retain"], *[longest] * (prepared.to_write - later), *[after_refusal] * later]
    if args.instead == "guess":
        datasets["wanted"] = [longest] * len(datasets["forget"])
    return Rows(datasets, _held(args))


def _held(args: UnlearnConfig) -> int:
    return args.retain_per_forget if args.holds_retain else 0


def made_up(length: int, args: UnlearnConfig) -> Rows:
    row = _row(length)
    return Rows(
        {"forget": [row] * ROWS, "retain": [row] * ROWS * max(1, _held(args)), "wanted": [], "protected": []},
        _held(args),
    )


def _row(length: int) -> Example:
    """A row whose second half is its answer."""
    labels = [IGNORED] * (length // 2) + [0] * (length - length // 2)
    return {"input_ids": [0] * length, "labels": labels, "row": "made up"}
