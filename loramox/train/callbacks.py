"""Around training steps: fresh retain rows each epoch, stopping, momentum, a warning if nothing can be learned."""

import math
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState

from loramox.files import flush
from loramox.model.lora import at_scale, current_factors
from loramox.train.checkpoint import write_checksums
from loramox.train.diagnostics import UNKNOWN, UNKNOWN_ROWS
from loramox.train.earlier import TUNED
from loramox.train.passes import not_finite
from loramox.train.target import met_at_last

if TYPE_CHECKING:
    from loramox.train.trainer import UnlearnTrainer

# Below this share of gradient left, ΔW is mostly noise, and no strength turns noise into forgetting.
SATURATED = 0.01

# A tuned adapter that raises the forget answers' probability by less than both, a factor and a difference, hardly knows the rows.
RAISED = (1.5, 0.05)
NOT_THEIRS = (
    "--tuned_adapter hardly raises the probability of the forget answers ({without:.4f} without it, {known:.4f} with it), so it does not "
    "seem to know these rows. Check that it was trained on them, in the same form (--prompt_template), and that --model is its base"
)


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


class AroundSteps(TrainerCallback):
    """What a run does around its steps.

    Training ends early after `epochs`, and at the first evaluation that meets `target`, which is that of `--forget_to` with
    `--stop_when_forgotten`. The learning rate keeps its planned schedule.
    """

    def __init__(self, trainer: "UnlearnTrainer") -> None:
        self.trainer, args = trainer, trainer.args
        self.target = args.forget_to if args.stop_when_forgotten else None
        self.epochs = math.inf

    def reason(self, state: TrainerState) -> str | None:
        """Why training ends here, before its last planned step; None where it goes on."""
        if met_at_last(state, self.target):
            return f"--stop_when_forgotten: the forget rows meet --forget_to {self.target:g}"
        return f"resumed with --num_train_epochs {self.epochs:g}" if (state.epoch or 0) >= self.epochs else None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        steps_an_epoch = math.ceil(len(kwargs["train_dataloader"]) / args.gradient_accumulation_steps)
        # Without averaging (η = 1), ΔW itself is scored and ships, so it is updated at every step.
        self.every = 1 if args.momentum == 1 else args.momentum_every or steps_an_epoch
        # A resumed run saves and logs as its own settings have it, not as those of its checkpoint.
        state.compute_steps(args, state.max_steps)
        # What one process had on disk already, others would wait for in the layers that they share.
        if args.reference_cache_gb and not self.trainer.sharded:
            self._remember(args, state)

    def _remember(self, args: Any, state: TrainerState) -> None:
        """Keep on disk what the reference says of rows that come round again at least once, on average; each process its own.

        All of them together take at most half of the free disk.
        """
        trainer, rows = self.trainer, self.trainer.train_dataset
        drawn = state.max_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps
        parts = ((rows.forget, drawn), (rows.wanted, drawn), (rows.retain, drawn * rows.retain_per_forget))
        again = [row for some, times in parts if times >= 2 * len(some) for row in some]
        protected = rows.protected if drawn >= 2 * len(rows.protected) else []
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        left = min(args.reference_cache_gb * 1e9, shutil.disk_usage(folder).free / 2 / args.world_size)
        for frozen, some in {trainer.reference: again, trainer.origin: again, trainer.now: protected}.items():
            left -= frozen.remember(some, trainer.data_collator, folder, left)

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # After resuming inside an epoch, state.epoch has a fraction.
        self.trainer.train_dataset.epoch = math.floor((state.epoch or 0) + 1e-6)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Weights that are not finite are neither averaged, scored nor written.
        weights = [p for p in kwargs["model"].parameters() if p.requires_grad]
        if not torch.nn.utils.get_total_norm(weights, math.inf).isfinite():  # one kernel for all, on a GPU
            what = f"the adapter's weights are no longer finite after step {state.global_step}"
            raise not_finite(what, args.output_dir)
        control.should_training_stop |= (state.epoch or 0) >= self.epochs
        if state.global_step % self.every == 0 or control.should_training_stop:
            self.trainer.momentum.tick(current_factors(self.trainer.model))

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        for name, value in metrics.items():
            if name.endswith("_probability") and not math.isfinite(value):
                what = f"{name} is {value} after step {state.global_step}: the model's answers overflow"
                raise not_finite(what, args.output_dir)
        control.should_training_stop |= met_at_last(state, self.target)
        if control.should_training_stop and not self.trainer.momentum.average:
            self.trainer.momentum.tick(current_factors(self.trainer.model))  # which is what was scored
        if state.global_step == 0 and "eval_forget_probability" in metrics:
            say_what_is_known(self.trainer, metrics)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()  # each process writes its own random state
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (checkpoint / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing here reads
            flush(checkpoint)
            self.trainer.momentum.save(checkpoint)
            write_checksums(checkpoint)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for frozen in (self.trainer.reference, self.trainer.origin, self.trainer.now):
            frozen.close()


def say_what_is_known(trainer: "UnlearnTrainer", metrics: dict[str, float]) -> None:
    """Say before the first step how well the reference knows the forget rows, and warn where they leave nothing to learn."""
    args, known, without = trainer.args, metrics["eval_forget_probability"], None
    who, left = "the reference", metrics.get("eval_forget_headroom")
    earlier = "a checkpoint that never saw the rows"
    if trainer.at_checkpoint:
        who = "the checkpoint of --memorize_at"
    if trainer.tuned:
        with at_scale(trainer.model, 0, TUNED):
            off = trainer.predict(trainer.eval_dataset["forget"], metric_key_prefix="off").metrics
        without, earlier = off["off_probability"], "base"
        if not trainer.memorize_beside:
            who, left = "the base", off.get("off_headroom")
    if not trainer.is_world_process_zero():
        return
    at = " at the checkpoint of --memorize_at" if trainer.at_checkpoint else ""
    beside = f" ({without:.4f} without --tuned_adapter)" if without is not None else ""
    room = ""
    if left is not None:
        room = f"; at temperature {args.temperature:g}, {left:.1%} of the gradient is left to memorize them"
    # Above the bar, whose line a plain print would go on.
    tqdm.write(f"Probability of the forget answers before training{at}: {known:.4f}{beside}{room}.")
    if trainer.at_checkpoint:
        tqdm.write(
            "During training, the scores are for this checkpoint + ΔW, and the probability should rise. The model that ships is not in memory."
        )
    if without is not None and known < RAISED[0] * without and known - without < RAISED[1]:
        warnings.warn(NOT_THEIRS.format(without=without, known=known), stacklevel=2)
    if known < UNKNOWN and not trainer.at_checkpoint:
        warnings.warn(UNKNOWN_ROWS, stacklevel=2)
    if left is not None and left < SATURATED:
        ways = [f"give --memorize_at {earlier}", "use --method mox"]
        if args.forget_term != "preference":
            ways.insert(0, "raise --temperature (for example to 3)")
        warnings.warn(
            f"{who} knows the forget rows by heart: {left:.2%} of the gradient is left at temperature "
            f"{args.temperature:g}, so the adapter will learn mostly noise. To mend that, {', or '.join(ways)}",
            stacklevel=2,
        )
