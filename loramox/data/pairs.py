"""Forget rows paired with retain rows, and the padded batches made of them."""

import functools
import hashlib
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from loramox.data.encode import IGNORED, Example


class Pairs(Dataset):
    """Forget row i with its wanted answer, if any, `retain_per_forget` retain rows (0: none), and one protected row, if any.

    Retain rows and protected rows are dealt from a seeded shuffle of all of them, without repeating one before all have been
    dealt, and to the forget rows in another order each epoch, as a function of (seed, epoch, i) alone: the same for any number
    of processes, and after resuming.
    """

    def __init__(
        self,
        forget: Sequence[Example],
        retain: Sequence[Example],
        retain_per_forget: int,
        wanted: Sequence[Example] = (),
        seed: int = 0,
        protected: Sequence[Example] = (),
    ) -> None:
        self.forget, self.retain, self.wanted, self.protected = forget, retain, wanted, protected
        self.retain_per_forget = retain_per_forget
        self.epoch, self.seed = 0, seed
        self._orders = {"retain": _shuffled(len(retain), seed), "protected": _shuffled(len(protected), seed)}

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, index: int) -> dict[str, list[Example]]:
        turn = self.epoch * len(self.forget) + _shuffled(len(self.forget), self.seed + self.epoch)[index]
        others = {
            "retain": self._dealt("retain", turn, self.retain_per_forget),
            "protected": self._dealt("protected", turn, 1 if self.protected else 0),
            "wanted": [self.wanted[index]] if self.wanted else [],
        }
        return {"forget": [self.forget[index]]} | {part: rows for part, rows in others.items() if rows}

    def _dealt(self, part: str, turn: int, count: int) -> list[Example]:
        rows, order = getattr(self, part), self._orders[part]
        return [rows[order[(turn * count + k) % len(rows)]] for k in range(count)]


@functools.lru_cache(maxsize=2)  # asked for once a row
def _shuffled(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def answer_positions(example: Example) -> array:
    """The positions of the answer's tokens, without the first of the sequence, which is predicted from nothing."""
    # No list: accelerate would go through its numbers one by one, to move those that are tensors.
    return array("q", [at for at, label in enumerate(example["labels"]) if at and label != IGNORED])


def key_of(example: Example) -> bytes:
    """The same for rows of the same tokens, of which the same are the answer's."""
    return hashlib.blake2b(array("q", [*example["input_ids"], *example["labels"]]), digest_size=16).digest()


class Collator:
    """Examples → one padded batch; pairs → one batch for each part, so that short rows are not padded to long ones."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if "input_ids" in items[0]:
            return self._pad(items)
        return {part: self._pad([example for item in items for example in item[part]]) for part in items[0]}

    def _pad(self, examples: Sequence[Example]) -> dict[str, Any]:
        def stack(values: list[list[int]], filler: int) -> Tensor:
            return pad_sequence([torch.tensor(v) for v in values], batch_first=True, padding_value=filler)

        ids = [e["input_ids"] for e in examples]
        return {
            "input_ids": stack(ids, self.pad_token_id),
            "attention_mask": stack([[1] * len(i) for i in ids], 0),
            "labels": stack([e["labels"] for e in examples], IGNORED),
            "rows": [e["row"] for e in examples],
            "lengths": [len(i) for i in ids],
            "answers": [answer_positions(e) for e in examples],
            "keys": [key_of(e) for e in examples],
        }
