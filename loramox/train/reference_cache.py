"""On-disk cache of a frozen model's hidden states of the answers, computed once per row."""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from loramox.data.encode import Example
from loramox.data.pairs import Collator, answer_positions, key_of
from loramox.model.head import answer_states, in_eval_mode

GROUP_TOKENS = 1024  # of the rows that are worked out together, padding included


class FrozenStates:
    """The last hidden states [N, hidden size] of a batch's N answer tokens, of θ_ref or of another model that stays as it is.

    `still` is the context in which `model` is that one. Unless it is to `remember` rows, each batch is passed through it. The
    states of a row that is remembered are of the row alone, whichever batch it is in: it is always worked out together with the
    same others, of like length. They differ from those of a batch by rounding. They are in a file without a name, so that memory
    does not grow, and the disk has it back when the process ends, however it ends.
    """

    def __init__(self, model: PeftModel, still: Callable[[], AbstractContextManager]) -> None:
        self.causal_lm, self.still = model.get_base_model(), still
        self.kept: dict[bytes, list[Example]] = {}  # each remembered row's key, and the rows that it is worked out with
        self._places: dict[bytes, tuple[int, int]] = {}  # where in the file its states are, and how many bytes
        self._file: IO[bytes] | None = None

    def remember(self, rows: Sequence[Example], collator: Collator, folder: Path, most: float) -> int:
        """Keep these rows' states in a file in `folder`, unless it would take over `most` bytes; return how many it takes."""
        self.close()
        each = {key_of(row): row for row in rows}
        tokens = sum(len(answer_positions(row)) for row in each.values())
        size = tokens * 4 * self.causal_lm.config.get_text_config().hidden_size
        if size > most:
            return 0
        for group in _groups(sorted(each.values(), key=lambda row: (len(row["input_ids"]), key_of(row)))):
            self.kept |= {key_of(row): group for row in group}
        self._file, self._collator = tempfile.TemporaryFile(dir=folder), collator  # noqa: SIM115 (open until `close`)
        return size

    def states(self, model: nn.Module, batch: dict[str, Any], layer: int | None = None) -> Tensor:
        """Row by row; of the last layer, or, never kept, what `layer`, counted from 1, gives to the next."""
        if layer is not None or not all(key in self.kept for key in batch["keys"]):
            return self._pass(model, batch, layer)
        for key in batch["keys"]:
            if key not in self._places:
                self._work_out(model, self.kept[key], batch["labels"].device)
        return torch.cat([self._read(key) for key in batch["keys"]]).to(batch["labels"].device)

    def close(self) -> None:
        """Remember nothing, and give the disk back."""
        if self._file is not None:
            self._file.close()
        self._file, self.kept, self._places = None, {}, {}

    def _pass(self, model: nn.Module, batch: dict[str, Any], layer: int | None = None) -> Tensor:
        with in_eval_mode(model), torch.no_grad(), self.still():
            return answer_states(model, self.causal_lm, batch, layer).hidden

    def _work_out(self, model: nn.Module, group: list[Example], device: torch.device) -> None:
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self._collator(group).items()}
        hidden = self._pass(model, batch).cpu()
        self._like = hidden[:0]
        for key, of_row in zip(batch["keys"], hidden.split([len(at) for at in batch["answers"]]), strict=True):
            content = of_row.contiguous().view(torch.uint8).numpy().tobytes()
            start = self._file.seek(0, os.SEEK_END)
            self._file.write(content)
            self._places[key] = start, len(content)

    def _read(self, key: bytes) -> Tensor:
        start, size = self._places[key]
        self._file.seek(start)
        held = bytearray(self._file.read(size))
        return torch.frombuffer(held, dtype=self._like.dtype).view(-1, self._like.shape[1])


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
