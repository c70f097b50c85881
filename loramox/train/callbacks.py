"""What happens around a training step: fresh retain rows each epoch, a stop, momentum, a warning if nothing can be learned."""

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState

from loramox.data.pairs import Pairs
from loramox.errors import NonFiniteLossError
from loramox.model.lora import current_factors
from loramox.train.config import MemorizeConfig
from loramox.train.diagnostics import UNKNOWN, UNKNOWN_ROWS

if TYPE_CHECKING:
    from loramox.train.trainer import MemorizeTrainer

# Below this share of gradient left, ΔW is mostly noise, and no strength turns noise into forgetting.
SATURATED = 0.01


class Progress(ProgressCallback):
    """One bar, with the newest numbers behind it; every number of every epoch is in TensorBoard and run.json."""

    SHOWN: ClassVar = {"loss": "loss", "eval_forget_probability": "forget", "eval_retain_probability": "retain"}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.newest: dict[str, float] = {}

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        self.newest |= {shown: logs[name] for name, shown in self.SHOWN.items() if name in (logs or {})}
        if self.training_bar is not None:
            self.training_bar.set_postfix({name: f"{value:.3g}" for name, value in self.newest.items()})

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """No bar for the few rows that are watched."""


class PairsEpoch(TrainerCallback):
    """Tells the pairs which epoch it is, before their loader starts."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # After resuming inside an epoch, state.epoch has a fraction.
        self.pairs.epoch = math.floor((state.epoch or 0) + 1e-6)


class StopUnlessFinite(TrainerCallback):
    """Stops the run before weights that are not finite are averaged, watched or written to a checkpoint."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        weights = [p.detach().abs().max() for p in kwargs["model"].parameters() if p.requires_grad]
        if not torch.stack(weights).isfinite().all():
            raise NonFiniteLossError(
                f"the adapter's weights are no longer finite after step {state.global_step}; they are not written, and the "
                f"checkpoints of earlier steps in {args.output_dir} are unharmed. Start again with --overwrite and a lower "
                "--learning_rate, a lower --alpha, or without --fp16"
            )

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        broken = [name for name, value in metrics.items() if name.endswith("_probability") and not math.isfinite(value)]
        if broken:
            raise NonFiniteLossError(
                f"{broken[0]} is {metrics[broken[0]]} after step {state.global_step}: the model's answers overflow; nothing of it is written, and "
                f"the checkpoints of earlier steps in {args.output_dir} are unharmed. Start again with --overwrite and a lower --learning_rate, "
                "a lower --alpha, or --dtype bfloat16"
            )


class MomentumCallback(TrainerCallback):
    """Updates the trainer's momentum every `momentum_every` optimiser steps and after the last; saves it with checkpoints."""

    def __init__(self, trainer: "MemorizeTrainer") -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        steps_an_epoch = math.ceil(len(kwargs["train_dataloader"]) / args.gradient_accumulation_steps)
        self.every = args.momentum_every or steps_an_epoch

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.trainer.momentum.tick(current_factors(self.trainer.model))

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (checkpoint / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing here reads
            # Written last: a checkpoint that has it is whole.
            self.trainer.momentum.save(checkpoint)


class KnownCallback(TrainerCallback):
    """While training, keeps on disk what the reference says of rows that come round again at least once, on average.

    Of several processes each draws its own rows, and keeps a file of its own.
    """

    def __init__(self, trainer: "MemorizeTrainer") -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer, rows = self.trainer, self.trainer.train_dataset
        drawn = state.max_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps
        parts = {
            "forget": (rows.forget, drawn),
            "wanted": (rows.wanted, drawn),
            "retain": (rows.retain, drawn * rows.retain_per_forget),
        }
        again = [row for some, times in parts.values() if times >= 2 * len(some) for row in some]
        where = (trainer.data_collator, Path(args.output_dir), args.reference_cache_gb * 1e9)
        # What one process had on disk already, others would wait for in the layers that they share.
        if args.reference_cache_gb and not trainer.sharded:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            trainer.reference.remember(again, *where)
            trainer.now.remember(rows.protected if drawn >= 2 * len(rows.protected) else [], *where)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.reference.close()
        self.trainer.now.close()


class KnowledgeCallback(TrainerCallback):
    """Says before the first step how well the reference knows the forget rows."""

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        known = metrics.get("eval_forget_probability")
        if state.global_step == 0 and known is not None and state.is_world_process_zero:
            print(f"The reference gives the forget answers probability {known:.4f}.")
            _warn_if_unknown(known)


def _warn_if_unknown(probability: float) -> None:
    if probability < UNKNOWN:
        warnings.warn(UNKNOWN_ROWS, stacklevel=3)


class SaturationCallback(TrainerCallback):
    """Says before the first step how well the reference knows the forget rows, and warns if memorizing cannot move it."""

    def __init__(self, args: MemorizeConfig) -> None:
        self.temperature = args.temperature

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        room = metrics.get("eval_forget_headroom")
        if state.global_step or room is None or not state.is_world_process_zero:
            return
        print(
            f"The reference gives the forget answers probability {metrics['eval_forget_probability']:.4f}; "
            f"at temperature {self.temperature:g}, {room:.1%} of the gradient is left to memorize them with."
        )
        _warn_if_unknown(metrics["eval_forget_probability"])
        if room < SATURATED:
            warnings.warn(
                f"the reference knows the forget rows by heart: {room:.2%} of the gradient is left at temperature "
                f"{self.temperature:g}, so the adapter will learn mostly noise. Raise --temperature (3 is the default)",
                stacklevel=2,
            )
