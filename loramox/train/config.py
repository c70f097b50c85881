"""Settings of training: the method and its own settings, on top of transformers' `TrainingArguments`."""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar

import torch
from transformers import TrainingArguments

from loramox.errors import SettingsError, needs
from loramox.model.precision import has_bf16, warn_of_emulation
from loramox.settings import check_choices, refuse, setting
from loramox.train import methods, mox  # noqa: F401 (importing them registers their methods)
from loramox.train.registry import METHODS, Method

# Settings of transformers that have to stay off, and why: they would have no effect here, or do harm.
OFF = {
    "save_only_model": "false: resuming needs the optimizer",
    "push_to_hub": "false: the adapter in training is not the one that ships. Upload that one: loramox extrapolate … --push_to_hub",
    "dataloader_persistent_workers": "false: each epoch draws other retain rows",
    "label_smoothing_factor": "0: no term here has labels to smooth",
    "use_liger_kernel": "false: losses are computed from hidden states already",
    "load_best_model_at_end": "false: what ships is the momentum average of the whole training",
}


@dataclass
class UnlearnConfig(TrainingArguments):
    """Settings of `UnlearnTrainer`. `per_device_train_batch_size` counts forget rows; retain rows come on top.

    A setting that the method does not have is refused. A setting that is not given takes the method's default
    (`loramox.train.registry`).

    Raises:
        SettingsError: a value out of range, or a setting that the method does not have.
    """

    method: str = setting(
        "Unlearning method: mox, mox_static, npo_mean, npo, simnpo, ga, ga_kl, graddiff, dpo, po, altpo, rmu, whp, llmu, "
        "task_vector. mox memorizes along a path, then extrapolates. mox_static is the MOX paper's own method. dpo and po train "
        "refusals, altpo needs --wanted_column, whp needs --reinforced.",
        "mox",
    )
    alpha: float | None = setting(
        "How far to extrapolate: θ_for = θ_ref − alpha·ΔW, for methods that memorize. Free after training (loramox extrapolate). "
        "Default: 8 for mox, 4 for mox_static, 1 for task_vector.",
        None,
    )
    beta: float | None = setting(
        "β: where training stops pushing an answer down; smaller forgets more. It stops once the log-probability is a few 1/β below the "
        "reference's. The log-probability is a mean over tokens for mox (default 2.1), npo_mean (1.6) and simnpo (4.5; not relative to "
        "the reference), and a sum over the answer for npo, dpo, altpo and --forget_term preference (0.1).",
        None,
        aliases=["--npo_beta"],
    )
    inner_steps: int | None = setting(
        "mox: number K of memorizing steps in each training step. Each has its own mini-batch of forget rows. With 1, and --temperature 1, "
        "the step is that of NPO's loss. Default: 8.",
        None,
    )
    inner_lr: float | None = setting(
        "mox: how far each weight of the fresh LoRA moves in one memorizing step. Larger: harder to relearn. Default: 0.01.",
        None,
    )
    forget_term: str | None = setting(
        "mox_static: loss that memorizes the forget rows: cross_entropy, or the paper's preference variant.",
        None,
        choices=["cross_entropy", "preference"],
    )
    temperature: float | None = setting(
        "mox, mox_static, task_vector: divides the logits of forget rows while they are memorized, so that rows known by heart have a "
        "gradient. mox: at first; it falls to 1 in the first three quarters of training (default 3). Else default 1, the paper's.",
        None,
    )
    kl_at: str | None = setting(
        "mox_static: model at which the retain KL is computed: memorization (θ_ref + ΔW, the paper's default) or shipped (θ_ref − alpha·ΔW).",
        None,
        choices=["memorization", "shipped"],
    )
    targeted: str | None = setting(
        "mox, mox_static: with another answer to teach, descent trains it at θ_ref − alpha·ΔW (default); ascent is the paper's "
        "term, −CE of the wanted answer at θ_ref + ΔW.",
        None,
        choices=["descent", "ascent"],
    )
    retain_term: str | None = setting(
        "Loss on the retain rows: kl (to the reference), ce, none, or states (rmu). Where alpha is free: kl or none. Default: the method's; "
        "mox has kl.",
        None,
        choices=["ce", "kl", "none", "states"],
    )
    retain_weight: float | None = setting(
        "Weight of the retain term. Default: the method's, mostly 1.", None, aliases=["--kl_weight"]
    )
    forget_weight: float | None = setting("Weight of the forget term. Default: 1; simnpo 0.125, llmu 0.5.", None)
    margin: float | None = setting("simnpo: γ. Default: 0.", None)
    instead: str | None = setting(
        "Answer taught instead. refuse: say that it does not know; guess: the reference's likeliest other answer; none. "
        "--wanted_column gives answers of your own; auto is the default. Default: refuse for questions to a chat model, else none.",
        None,
        choices=["auto", "refuse", "guess", "none"],
    )
    refusals: str | None = setting(
        "Text file of refusals, one per line, for --instead refuse, dpo and po; each forget row gets one by a seeded draw. Default: "
        "built-in, two dozen English sentences.",
        None,
    )
    steering: float | None = setting("rmu: length of the vector that forget rows are steered to. Default: 6.5.", None)
    rmu_layer: int | None = setting("rmu: number of the layer whose output is steered, from 1. Default: 7.", None)
    reinforced: str | None = setting(
        "whp: folder 'trained' of a mox_static run on the same forget rows, the reinforced model.", None
    )
    whp_strength: float | None = setting(
        "whp: factor on the rise of the logits in the reinforced model, before it is subtracted. Default: 5.", None
    )
    momentum: float | None = setting(
        "η: average ← η·ΔW + (1 − η)·average. The average ships. "
        "1 turns it off. Default: 0.675 for mox, mox_static and npo_mean, else 1.",
        None,
    )
    momentum_every: int | None = setting(
        "Steps between updates of the average. Without an average (--momentum 1): every step. Default: one epoch.",
        None,
    )
    momentum_rank: int | None = setting(
        "Largest rank at which the average of ΔW is kept. Default: 4 times the adapter's.", None
    )
    retain_per_forget: int = setting("Retain rows drawn with each forget row.", 3)
    reference_cache_gb: float = setting(
        "Largest on-disk cache, in GB, of the reference's hidden states, which saves a pass for each row that is used "
        "again. One per process, in output_dir, deleted at the end. 0: no cache.",
        8.0,
    )
    auto_retain: int | None = setting(
        "Retain rows the model writes. Besides those of --retain: questions that it samples, with its own "
        "answers. 0 by default unless mox forgets questions, or mox_static or npo_mean teaches a chat model another answer, and the model can "
        "write questions. Default: 120 (240 with --retain auto) or 0.",
        None,
    )
    eval_rows: int = setting(
        "Largest number of forget rows, and of retain rows, that are scored during training. They are taken at even distances.",
        64,
    )

    forget_to: float | None = setting(
        "Forget this far, no further. The least alpha (or scale) ships at which forget answers have at most this mean probability, and their "
        "second halves as well (given the first halves), and greedy decoding gives at most this share of them; if another answer is taught, answers must be fluent too. 0: ship as trained. Default: 0.05 if another answer is taught, else 0.",
        None,
    )
    stop_when_forgotten: bool = setting("End training at the first evaluation that meets --forget_to.", False)

    # TrainingArguments' own fields, with defaults that suit a LoRA adapter on a quantized model and a small forget set.
    output_dir: str | None = setting("Folder for checkpoints and logs.", "trained")
    learning_rate: float | None = setting(
        "Peak learning rate. Default: 1e-3, and 2e-4 for a model of 1B parameters or more.", None
    )
    num_train_epochs: float = setting("Passes over the forget rows.", 24)
    per_device_train_batch_size: int = setting("Forget rows per device and micro-batch.", 8)
    per_device_eval_batch_size: int = setting("Rows per device and pass when the forget model is scored.", 32)
    weight_decay: float = setting("AdamW's weight decay.", 0.0)
    warmup_steps: float = setting("Share (below 1) or number of steps over which the learning rate rises.", 0.1)
    bf16: bool | None = setting(
        "Arithmetic in bfloat16. Default: on a GPU that has it, unless --dtype asks for another type.", None
    )
    logging_steps: float = setting("Steps between log lines; below 1, a share of all steps.", 5)
    logging_first_step: bool = setting("Log the first step too.", True)
    logging_nan_inf_filter: bool = setting("Unused: a loss that is not finite stops the run.", False)
    eval_strategy: str = setting("When the forget model is scored while training: no, steps or epoch.", "epoch")
    eval_on_start: bool = setting("Also score the reference before the first step: how well it knows the rows.", True)
    save_strategy: str = setting("When a checkpoint is written: no, steps or epoch.", "epoch")
    save_total_limit: int | None = setting("Checkpoints kept. At least 2, so that one is always whole.", 2)
    report_to: None | str | list[str] = setting(  # noqa: RUF036 (as in TrainingArguments)
        "Where logs go: tensorboard if it is installed. Nothing leaves the machine by default.",
        "tensorboard" if find_spec("tensorboard") else "none",
    )
    remove_unused_columns: bool | None = setting("Unused: rows are read before.", False)
    ddp_find_unused_parameters: bool | None = setting("Every adapter weight is used in every pass.", False)

    OF_METHODS: ClassVar = (
        "alpha", "beta", "inner_steps", "inner_lr", "forget_term", "temperature", "kl_at", "targeted", "retain_term", "retain_weight",
        "forget_weight", "margin", "instead", "refusals", "steering", "rmu_layer", "reinforced", "whp_strength",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise SettingsError(f"method is '{self.method}'; --method takes {', '.join(METHODS)}")
        check_choices(self)
        self._take_defaults()
        self._check_values()
        refuse_shards(self)
        self._choose_precision()
        self.logging_first_step = self.logging_first_step and self.logging_strategy != "no"
        super().__post_init__()
        # A flag wins over accelerate's config.
        self.mixed_precision = "bf16" if self.bf16 else "fp16" if self.fp16 else "no"
        # One process uses one GPU; Trainer would put a DataParallel around the model, whose copies share no hooks. Several
        # GPUs are several processes: torchrun or accelerate launch.
        self._n_gpu = min(self.n_gpu, 1)

    def _take_defaults(self) -> None:
        """Fill in the method's own settings; refuse those that it does not have, and those that it needs and are not given."""
        own = self.spec.settings
        for name in self.OF_METHODS:
            given = getattr(self, name)
            if given is None:
                setattr(self, name, own.get(name))
                if name in own and own[name] is None:
                    raise SettingsError(f"--method {self.method} needs --{name}: see --help")
            elif name not in own and name == "alpha":
                raise SettingsError(
                    f"alpha is {given:g}, and --method {self.method} has none: it trains the forget model itself, θ_ref + ΔW. Leave out "
                    "--alpha. How far it trains is --lora_alpha; a shipped adapter is turned down by its scale (--scale, ForgetSwitch)"
                )
            elif name not in own:
                users = ", ".join(method for method, each in METHODS.items() if name in each.settings)
                raise SettingsError(f"--{name} is of no use to --method {self.method}; it is for {users}. Leave it out")
        self.momentum = own.get("momentum", 1.0) if self.momentum is None else self.momentum
        states = self.retain_term == "states"
        if states != ("rmu_layer" in own) and self.retain_term not in (None, "none"):
            raise SettingsError(
                f"retain_term is '{self.retain_term}'; --retain_term states and --method rmu go together"
            )
        if self.retain_term not in (None, "kl", "none") and self.spec.alpha_is_free:
            raise SettingsError(f"retain_term is '{self.retain_term}'; --method {self.method} takes kl or none")
        if self.forget_term == "preference" and self.temperature != 1:
            raise SettingsError(
                f"temperature is {self.temperature:g}, and --forget_term preference has none. Leave out --temperature"
            )

    def _check_values(self) -> None:
        above_0 = ("alpha", "beta", "inner_lr", "temperature", "forget_weight", "steering", "whp_strength", "num_train_epochs",
                   "retain_per_forget", "eval_rows")  # fmt: skip
        why = {
            "alpha": ": at 0 the model is the reference, and below it is on the memorizing side",
            "retain_per_forget": ": the retain term needs rows",
            "eval_rows": ": use --eval_strategy no --eval_on_start false to score nothing",
        }
        at_least_0 = ("margin", "retain_weight", "reference_cache_gb", "learning_rate", "seed", "auto_retain")
        at_least_1 = ("inner_steps", "rmu_layer", "momentum_every", "momentum_rank", "per_device_train_batch_size",
                      "per_device_eval_batch_size", "gradient_accumulation_steps")  # fmt: skip
        for names, fine, expected in (
            (above_0, lambda value: value > 0, "a number above 0"),
            (at_least_0, lambda value: value >= 0, "0 or more"),
            (at_least_1, lambda value: value >= 1, "1 or more"),
        ):
            for name in names:
                value = getattr(self, name)
                refuse(name, value, value is None or fine(value), expected + why.get(name, ""))
        if self.forget_to is not None:
            refuse("forget_to", self.forget_to, 0 <= self.forget_to < 1, "a probability below 1, like 0.05, or 0")
        refuse("momentum", self.momentum, 0 < self.momentum <= 1, "η above 0 and at most 1, which is off")
        for name, expected in OFF.items():
            refuse(name, getattr(self, name), not getattr(self, name), expected)
        limit, drawn = self.save_total_limit, self.train_sampling_strategy
        expected = "2 or more: one checkpoint must be complete while another is written"
        refuse("save_total_limit", limit, limit is None or limit >= 2, expected)
        expected = "random or sequential: rows of similar length share passes already"
        refuse("train_sampling_strategy", drawn, drawn in ("random", "sequential"), expected)
        if "tensorboard" in (self.report_to or ()):
            with needs("tensorboard"):
                import tensorboard  # noqa: F401 (transformers would miss it only after the model is loaded)
        if str(self.lr_scheduler_type).endswith("reduce_lr_on_plateau"):
            best = self.metric_for_best_model
            expected = "the metric for reduce_lr_on_plateau: forget_probability with --greater_is_better false, or retain_probability"
            refuse("metric_for_best_model", best, best not in (None, "loss"), expected)

    def _choose_precision(self) -> None:
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        refuse(
            "mixed_precision", launched, launched in ("no", "bf16", "fp16"), "no, bf16 or fp16, of accelerate launch"
        )
        device = torch.device("cuda" if torch.cuda.is_available() and not self.use_cpu else "cpu")
        self._by_device = self.bf16 is None and not self.fp16 and launched == "no"
        if self.bf16 is None:
            self.fp16 = self.fp16 or launched == "fp16"
            here = has_bf16(device) if device.type == "cuda" and self._by_device else None
            self.fp16 = self.fp16 or here is False
            self.bf16 = not self.fp16 and (here is not None or launched == "bf16")
        if self.bf16:
            warn_of_emulation(device, "--bf16")
        # Without a GPU there is nothing to pin for, and torch would say so each epoch.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()

    def match_precision(self, dtype: str) -> None:
        """Compute in the type that `--dtype` asks for, if the arithmetic was chosen by the device alone, as on a GPU."""
        # Two 16-bit types that meet are promoted to float32, in which the activations take twice the memory.
        if self._by_device and dtype != "auto" and (self.bf16 or self.fp16):
            self.bf16, self.fp16 = dtype == "bfloat16", dtype == "float16"
            self.mixed_precision = "bf16" if self.bf16 else "fp16" if self.fp16 else "no"

    @property
    def spec(self) -> Method:
        """The method, as it is registered."""
        return METHODS[self.method]

    @property
    def forget_scale(self) -> float:
        """The scale of ΔW at which the model has forgotten, θ_ref + forget_scale·ΔW: −alpha, or 1 for a method without one."""
        return -self.alpha if self.spec.alpha_is_free else 1.0

    @property
    def more_training(self) -> str:
        """How to train longer, in flags."""
        steps = self.max_steps > 0  # wins over the epochs
        return f"--max_steps above {self.max_steps}" if steps else f"--num_train_epochs above {self.num_train_epochs:g}"

    @property
    def holds_retain(self) -> bool:
        """Whether retain rows are trained on."""
        return self.retain_term != "none" and bool(self.retain_weight)


def refuse_shards(args: TrainingArguments) -> None:
    """Raises `SettingsError` where FSDP or DeepSpeed is asked for, by flag or by `accelerate launch`."""
    for name in ("fsdp", "deepspeed"):
        if getattr(args, name) or os.environ.get(f"ACCELERATE_USE_{name.upper()}") == "true":
            # It would run, and scales and momentum, which are set on whole weights, would be wrong.
            raise SettingsError(
                f"{name} is asked for, which would shard the adapter as well. Leave it out: unlearn, train and evaluate split the frozen "
                "layers among the processes with --shard true"
            )
