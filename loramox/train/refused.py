"""Values of settings that are refused, and settings of transformers that would have no effect here, or do harm."""

import math
import operator
import os
from collections.abc import Callable
from typing import Any

from transformers import TrainingArguments

from loramox.errors import SettingsError

# Settings of transformers: what is fine, and what is expected instead.
OF_TRAINER: dict[str, tuple[Callable[[Any], bool], str]] = {
    "save_total_limit": (
        lambda limit: limit is None or limit >= 2,
        "2 or more: one checkpoint must be complete while another is written",
    ),
    "save_only_model": (operator.not_, "false: resuming needs the optimiser"),
    "push_to_hub": (
        operator.not_,
        "false: the adapter in training is not the one that ships. Upload that one: loramox extrapolate … --push_to_hub",
    ),
    "dataloader_persistent_workers": (operator.not_, "false: each epoch draws other retain rows"),
    "train_sampling_strategy": (
        lambda drawn: drawn in ("random", "sequential"),
        "random or sequential: rows of similar length share passes already",
    ),
    "label_smoothing_factor": (operator.not_, "0: no term here has labels to smooth"),
    "use_liger_kernel": (operator.not_, "false: losses are computed from hidden states already"),
}
WATCHED = (
    "the metric for --load_best_model_at_end and reduce_lr_on_plateau: forget_probability with --greater_is_better "
    "false, or retain_probability"
)


def refuse(name: str, value: Any, fine: bool, expected: str) -> None:
    """Raises `SettingsError` naming field and flag, unless `value` is fine and finite."""
    if not fine or (isinstance(value, float) and not math.isfinite(value)):
        raise SettingsError(f"{name} is {value}; --{name} needs {expected}")


def refuse_shards(args: TrainingArguments) -> None:
    """Raises `SettingsError` where FSDP or DeepSpeed is asked for, by flag or by `accelerate launch`."""
    for name in ("fsdp", "deepspeed"):
        if getattr(args, name) or os.environ.get(f"ACCELERATE_USE_{name.upper()}") == "true":
            # It would run, and scales and momentum, which are set on whole weights, would be wrong.
            raise SettingsError(
                f"{name} is asked for, which would shard the adapter as well. Leave it out: unlearn, train and evaluate split the frozen "
                "layers among the processes with --shard true"
            )
