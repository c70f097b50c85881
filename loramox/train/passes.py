"""The passes of a training step: the largest number of tokens in one, its rows, and its loss."""

import math
import warnings
from typing import NamedTuple

import torch
from accelerate import PartialState
from torch import Tensor

from loramox.data.microbatches import Batch, padded_tokens
from loramox.errors import NonFiniteLossError, RunError
from loramox.train.terms import Term

# What may differ in a run that is resumed, and what may not.
GO_ON = "Continue with --resume and --activation_checkpointing true, or on a device with more memory"
LESS = "shorter rows (--max_length) or --quantization nf4"


class PassLoss(NamedTuple):
    """The loss of one part's rows in one pass."""

    name: str  # as the log has it: forget_loss, retain_kl, …
    part: str  # forget, retain, …
    rows: list[str]
    share: float  # of the part's rows in the step
    loss: Tensor  # mean over the rows, a scalar on the model's device


class Passes:
    """The passes of the step that is being computed.

    Args:
        term_of: the term of the loss that each part belongs to.
    """

    def __init__(self, term_of: dict[str, Term]) -> None:
        self.term_of = term_of
        self.most = math.inf  # tokens of a pass of several rows, padding included
        self.losses: list[PassLoss] = []
        self._parts: dict[str, Batch] = {}  # the rows of the pass that has begun last

    def begin(self, parts: dict[str, Batch]) -> None:
        """To be called before each pass, with its rows."""
        self._parts = parts

    def take_smaller(self, error: Exception) -> None:
        """Halve `most`, after a pass for which there was not enough memory.

        Raises:
            RunError: it had one row, or several processes share the step, which have to make the same passes.
        """
        if not self._parts:
            raise error
        tokens = padded_tokens(self._parts)
        if PartialState().num_processes > 1:
            raise RunError(
                f"memory ran out in training ({error}). {GO_ON}. Or start from the beginning with --overwrite, and give a smaller "
                f"--per_device_train_batch_size (with more --gradient_accumulation_steps), {LESS}"
            ) from error
        # Rows of one term that belong together, as of a pair of answers, stay together.
        belong_together = len({self.term_of.get(part) for part in self._parts}) == 1
        if belong_together and all(len(batch["rows"]) == 1 for batch in self._parts.values()):
            (row, *_) = next(iter(self._parts.values()))["rows"]
            raise RunError(
                f"memory ran out in training, in a pass of a single row of {tokens:,} tokens ({row}; {error}). Nothing of this step is "
                f"written. {GO_ON}. Or start from the beginning with --overwrite, and give {LESS}"
            ) from error
        self.most = tokens // 2
        warnings.warn(
            f"memory ran out in a pass of {tokens:,} tokens. This step is computed again, and from now on a pass of several rows has at most "
            f"{self.most:,} tokens. Gradients stay the same, except for rounding",
            stacklevel=3,
        )

    def note(self, name: str, part: str, batch: Batch, loss: Tensor) -> Tensor:
        """Note the mean loss of a part's rows in a pass; return their share of the mean over the part's rows in the step."""
        share = batch.get("share", 1.0)
        self.losses.append(PassLoss(name, part, batch["rows"], share, loss.detach()))
        return share * loss

    def close(self, step: int, folder: str) -> list[PassLoss]:
        """End a step, before its gradients are used; return its losses. Waits for the device once.

        Raises:
            NonFiniteLossError: a loss is NaN or infinite; names the step and the rows.
        """
        losses, self.losses = self.losses, []
        if losses and not math.isfinite(torch.stack([each.loss for each in losses]).sum().item()):
            bad = next((each for each in losses if not math.isfinite(each.loss.item())), losses[-1])
            shown = "; ".join(bad.rows[:3]) + ("; …" if len(bad.rows) > 3 else "")
            what = f"the loss is {bad.loss.item()} at step {step}, in the {bad.part} rows of its batch ({shown})"
            raise not_finite(what, folder)
        return losses


def not_finite(what: str, folder: str) -> NonFiniteLossError:
    """The error that ends a run, with its remedy."""
    # Going on from the last checkpoint would come to the same: it has the same learning rate and rows.
    return NonFiniteLossError(
        f"{what}. This step is not written, and the checkpoints of earlier steps in {folder} are intact. Start again with --overwrite, and "
        "give a lower --learning_rate, a lower --alpha or --dtype bfloat16 in place of --fp16"
    )
