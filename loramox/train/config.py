"""What can be set about memorizing, on top of everything that transformers' `TrainingArguments` can set."""

import math
import operator
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from loramox.errors import SettingsError
from loramox.settings import check_choices


@dataclass
class MemorizeConfig(TrainingArguments):
    """Settings of `MemorizeTrainer`. `per_device_train_batch_size` counts forget rows; retain rows come on top.

    The defaults are what won on a reference that knows its rows by heart (recipes/README.md has the figures). The
    paper's own setting is `objective="cross_entropy", temperature=1, kl_at="memorization", strength=4`.
    """

    objective: str = field(
        default="npo",
        metadata={
            "help": "What ΔW is trained for on forget rows: npo descends on NPO's loss at θ_ref − α·ΔW, the model that ships; cross_entropy "
            "(the paper's) memorizes them, at θ_ref + ΔW.",
            "choices": ["npo", "cross_entropy"],
        },
    )
    temperature: float = field(
        default=3.0,
        metadata={
            "help": "Of --objective cross_entropy: divides the logits of forget rows, so that rows known by heart have a gradient. The "
            "paper: 1."
        },
    )
    npo_beta: float = field(
        default=1.6,
        metadata={
            "help": "β of --objective npo: a row is let go once its answer's log-probability a token is a few 1/β below the reference's. "
            "Smaller forgets more."
        },
    )
    kl_weight: float = field(
        default=1.0, metadata={"help": "Weight of the retain rows' KL(p_ref ‖ p_θ), in nats per answer token."}
    )
    kl_at: str = field(
        default="shipped",
        metadata={
            "help": "Where retain rows are held to the reference: shipped (θ_ref − α·ΔW, the model that is used) or "
            "memorization (θ_ref + ΔW, as in the paper).",
            "choices": ["shipped", "memorization"],
        },
    )
    strength: float = field(
        default=8.0,
        metadata={
            "aliases": ["--alpha"],
            "help": "α of θ_ref − α·ΔW: where the KL is taken, and what extrapolating uses unless told.",
        },
    )
    momentum: float = field(
        default=0.675,
        metadata={"help": "η: the share of the new model in θ_for ← η·θ_for + (1 − η)·(θ_for before). 1 is off."},
    )
    momentum_every: int | None = field(
        default=None, metadata={"help": "Optimiser steps between momentum updates. Default: one epoch."}
    )
    momentum_rank: int | None = field(
        default=None,
        metadata={"help": "Largest rank at which the average of ΔW is kept. Default: 4 times the adapter's."},
    )
    retain_per_forget: int = field(default=3, metadata={"help": "Retain rows drawn with each forget row."})
    reference_cache_gb: float = field(
        default=8.0,
        metadata={
            "help": "Largest file, in GB, in which the reference's states of rows that come round again are kept while training, instead "
            "of another pass; in output_dir, and gone at the end. One for each process. 0: none."
        },
    )
    targeted: str = field(
        default="descent",
        metadata={
            "help": "How forget rows with a wanted answer are used: descent (train it on the forget model, θ_ref − α·ΔW) or "
            "ascent (the paper's term, −CE of the wanted answer on the memorization model).",
            "choices": ["descent", "ascent"],
        },
    )
    eval_rows: int = field(
        default=64,
        metadata={"help": "Forget rows and retain rows on which the forget model is watched while training."},
    )

    # TrainingArguments' own fields, with defaults that suit a LoRA adapter on a quantized model and a small forget set.
    output_dir: str | None = field(default="memorization", metadata={"help": "Folder for checkpoints and logs."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate. LoRA wants 1e-4 to 1e-3."})
    num_train_epochs: float = field(default=24, metadata={"help": "Passes over the forget rows."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Forget rows a device and step."})
    per_device_eval_batch_size: int = field(
        default=32, metadata={"help": "Rows a device and step when watching the forget model."}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's weight decay."})
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Share (below 1) or number of steps over which the learning rate rises."}
    )
    bf16: bool | None = field(default=None, metadata={"help": "Arithmetic in bfloat16. Default: on a GPU that has it."})
    logging_steps: float = field(
        default=5, metadata={"help": "Steps between log lines; below 1, a share of all steps."}
    )
    logging_first_step: bool = field(default=True, metadata={"help": "Log the first step too."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Unused: a loss that is not finite stops the run."}
    )
    eval_strategy: str = field(
        default="epoch", metadata={"help": "When the forget model is watched: no, steps or epoch."}
    )
    eval_on_start: bool = field(
        default=True, metadata={"help": "Watch it before the first step too: how saturated the reference is."}
    )
    save_strategy: str = field(default="epoch", metadata={"help": "When a checkpoint is written: no, steps or epoch."})
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Checkpoints kept. At least 2, so that one is always whole."}
    )
    report_to: None | str | list[str] = field(  # noqa: RUF036 (as in TrainingArguments)
        default="tensorboard", metadata={"help": "Where logs go. Nothing leaves the machine by default."}
    )
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Unused: rows are read before."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every adapter weight is used in every pass."}
    )

    def __post_init__(self) -> None:
        check_choices(self)
        for name, low, why in (
            ("temperature", 0, "it divides the logits"),
            ("npo_beta", 0, "it divides the objective"),
            ("strength", 0, "α = 0 is the reference, and negative values are the memorization model's side"),
            ("retain_per_forget", 0, "the KL term needs retain rows"),
            ("eval_rows", 0, "use --eval_strategy no --eval_on_start false to watch nothing"),
        ):
            refuse(name, getattr(self, name), getattr(self, name) > low, f"a number above {low}: {why}")
        for name in ("kl_weight", "reference_cache_gb", "learning_rate", "seed"):
            refuse(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            refuse(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        refuse("num_train_epochs", self.num_train_epochs, self.num_train_epochs > 0, "a number above 0")
        refuse("momentum", self.momentum, 0 < self.momentum <= 1, "η above 0 and at most 1, which is off")
        for name in ("momentum_every", "momentum_rank"):
            refuse(name, getattr(self, name), getattr(self, name) is None or getattr(self, name) >= 1, "1 or more")
        for name, (fine, expected) in OF_TRAINER.items():
            refuse(name, getattr(self, name), fine(getattr(self, name)), expected)
        if self.load_best_model_at_end or str(self.lr_scheduler_type).endswith("reduce_lr_on_plateau"):
            best = self.metric_for_best_model
            refuse("metric_for_best_model", best, best not in (None, "loss"), WATCHED)
        refuse_shards(self)
        import torch

        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        refuse(
            "mixed_precision", launched, launched in ("no", "bf16", "fp16"), "no, bf16 or fp16, of accelerate launch"
        )
        if self.bf16 is None:
            self.fp16 = self.fp16 or launched == "fp16"
            here = torch.cuda.is_available() and torch.cuda.is_bf16_supported() and not self.use_cpu
            self.bf16 = not self.fp16 and (here or launched == "bf16")
        # Without a GPU there is nothing to pin for, and torch would say so each epoch.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        self.logging_first_step = self.logging_first_step and self.logging_strategy != "no"
        super().__post_init__()
        # A flag wins over accelerate's config.
        self.mixed_precision = "bf16" if self.bf16 else "fp16" if self.fp16 else "no"
        # One process uses one GPU; Trainer would put a DataParallel around the model, whose copies share no hooks. Several
        # GPUs are several processes: torchrun or accelerate launch.
        self._n_gpu = min(self.n_gpu, 1)

    @property
    def kl_strength(self) -> float:
        """The strength at which retain rows are held: α, or −1 for the memorization model."""
        return self.strength if self.kl_at == "shipped" else -1.0

    @property
    def title(self) -> str:
        """The method, and where it is from."""
        mox = "MOX, arXiv 2602.06441"
        return mox if self.memorizes else f"{mox}, with NPO's loss (arXiv 2404.05868) at the forget model as objective"

    @property
    def memorizes(self) -> bool:
        """Whether forget rows are trained on at θ_ref + ΔW, not at θ_ref − α·ΔW."""
        return self.objective == "cross_entropy"

    @property
    def holds_retain(self) -> bool:
        """Whether retain rows are trained on."""
        return self.kl_weight > 0


# Settings of transformers' that would do nothing here, or harm: what is fine, and what is expected instead.
OF_TRAINER: dict[str, tuple[Callable[[Any], bool], str]] = {
    "save_total_limit": (
        lambda limit: limit is None or limit >= 2,
        "2 or more: one checkpoint must be whole while another is written",
    ),
    "save_only_model": (operator.not_, "false: resuming needs the optimiser"),
    "push_to_hub": (
        operator.not_,
        "false: what trains is the memorization adapter, which forgets nothing. Push what ships: loramox extrapolate … --push_to_hub",
    ),
    "dataloader_persistent_workers": (operator.not_, "false: each epoch deals other retain rows"),
    "train_sampling_strategy": (
        lambda drawn: drawn in ("random", "sequential"),
        "random or sequential: passes are of rows of like length already",
    ),
    "label_smoothing_factor": (operator.not_, "0: no term here has labels to smooth"),
    "use_liger_kernel": (operator.not_, "false: losses are made of hidden states already"),
}
WATCHED = (
    "the name of what is watched, for --load_best_model_at_end and reduce_lr_on_plateau: forget_probability with --greater_is_better "
    "false, or retain_probability"
)


def refuse(name: str, value: Any, fine: bool, expected: str) -> None:
    """Raises `SettingsError` naming field and flag, unless `value` is fine and finite."""
    if not fine or (isinstance(value, float) and not math.isfinite(value)):
        flag = "alpha" if name == "strength" else name
        raise SettingsError(f"{name} is {value}; --{flag} needs {expected}")


def refuse_shards(args: TrainingArguments) -> None:
    """Raises `SettingsError` where FSDP or DeepSpeed is asked for, by flag or by `accelerate launch`."""
    for name in ("fsdp", "deepspeed"):
        if getattr(args, name) or os.environ.get(f"ACCELERATE_USE_{name.upper()}") == "true":
            # It would run, and strengths and momentum, which are set on whole weights, would be wrong.
            raise SettingsError(
                f"{name} is asked for, which would cut the adapter as well. Leave it out: unlearn, memorize and evaluate cut the frozen layers "
                "over the processes with --shard true"
            )
