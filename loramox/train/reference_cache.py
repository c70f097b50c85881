"""On-disk cache of a frozen model's hidden states of the answers, computed once per row."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn

from loramox.data.encode import Example
from loramox.data.pairs import Collator, answer_positions, key_of
from loramox.model.head import answer_states, in_eval_mode

GROUP_TOKENS = 1024  # of the rows that are worked out together, padding included


class Kept(NamedTuple):
    """Where in the file a row's states are, in answer tokens, and with which rows it is worked out."""

    start: int
    count: int  # type: ignore[assignment]  # hides the method of tuples, which nobody calls
    group: list[Example]


class FrozenStates:
    """The last hidden states [N, hidden size] of a batch's N answer tokens, of θ_ref or of another model that stays as it is.

    `still` is the context in which `model` is that one. Unless it is to `remember` rows, each batch is passed through it. The
    states of a row that is remembered are of the row alone, whichever batch it is in: it is always worked out together with the
    same others, of like length. They differ from those of a batch by rounding. They are in a file without a name, so that memory
    does not grow, and the disk has it back when the process ends, however it ends.
    """

    def __init__(self, model: PeftModel, still: Callable[[], AbstractContextManager]) -> None:
        self.causal_lm, self.still = model.get_base_model(), still
        self.kept: dict[bytes, Kept] = {}
        self._written: set[bytes] = set()
        self._file: IO[bytes] | None = None

    def remember(self, rows: Sequence[Example], collator: Collator, folder: Path, most: float) -> None:
        """Keep these rows' states in a file in `folder`, unless it would take over `most` bytes, or half of the free disk."""
        self.close()
        each = {key_of(row): row for row in rows}
        tokens = {key: len(answer_positions(row)) for key, row in each.items()}
        size = sum(tokens.values()) * 4 * self.causal_lm.config.get_text_config().hidden_size
        if size > min(most, shutil.disk_usage(folder).free / 2):
            return
        start = 0
        for group in _groups(sorted(each.values(), key=lambda row: (len(row["input_ids"]), key_of(row)))):
            for key in map(key_of, group):
                self.kept[key] = Kept(start, tokens[key], group)
                start += tokens[key]
        self._file, self._collator = tempfile.TemporaryFile(dir=folder), collator  # noqa: SIM115 (open until `close`)

    def states(self, model: nn.Module, batch: dict[str, Any], layer: int | None = None) -> Tensor:
        """Row by row; of the last layer, or, never kept, what `layer`, counted from 1, gives to the next."""
        if layer is not None or not all(key in self.kept for key in batch["keys"]):
            return self._pass(model, batch, layer)
        for key in batch["keys"]:
            if key not in self._written:
                self._work_out(model, self.kept[key].group, batch["labels"].device)
        return torch.cat([self._read(key) for key in batch["keys"]]).to(batch["labels"].device)

    def close(self) -> None:
        """Remember nothing, and give the disk back."""
        if self._file is not None:
            self._file.close()
        self._file, self.kept, self._written = None, {}, set()

    def _pass(self, model: nn.Module, batch: dict[str, Any], layer: int | None = None) -> Tensor:
        with in_eval_mode(model), torch.no_grad(), self.still():
            return answer_states(model, self.causal_lm, batch, layer).hidden

    def _work_out(self, model: nn.Module, group: list[Example], device: torch.device) -> None:
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self._collator(group).items()}
        hidden = self._pass(model, batch).cpu()
        self._like = hidden[:0]
        for key, of_row in zip(batch["keys"], hidden.split([len(at) for at in batch["answers"]]), strict=True):
            content = of_row.contiguous().view(torch.uint8).numpy().tobytes()
            os.pwrite(self._file.fileno(), content, self._bytes(self.kept[key].start))
            self._written.add(key)

    def _read(self, key: bytes) -> Tensor:
        start, count, _ = self.kept[key]
        held = bytearray(os.pread(self._file.fileno(), self._bytes(count), self._bytes(start)))
        return torch.frombuffer(held, dtype=self._like.dtype).view(count, -1)

    def _bytes(self, tokens: int) -> int:
        return tokens * self._like.shape[1] * self._like.element_size()


def _groups(rows: list[Example]) -> Iterator[list[Example]]:
    """Neighbours, of ascending length, that go through the model together."""
    group: list[Example] = []
    for row in rows:
        if group and (len(group) + 1) * len(row["input_ids"]) > GROUP_TOKENS:
            yield group
            group = []
        group.append(row)
    if group:
        yield group
