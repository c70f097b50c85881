"""The runs: each is one call of `loramox unlearn`, with two defaults off unless a run says otherwise.

`--forget_to 0` ships all of the trained alpha, so that the scales at which it is judged are shares of that. `--auto_retain 0`
trains on the retain rows of the file alone.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramox.adapter.folder import PROVENANCE


@dataclass(frozen=True)
class Run:
    """A title for the tables, and the flags besides model, rows, seed and folder."""

    title: str
    flags: tuple[str, ...] = ()


KEPT = ("command", "log", "timings", "forget_to")  # what a record has of run.json, where that has it
BASE = "BASE"  # in flags: a model that never saw the forget rows

RUNS = {
    "default": Run("`mox --instead refuse`"),
    "guess": Run("`mox --instead guess`", ("--instead", "guess")),
    "none": Run("`mox --instead none`", ("--instead", "none")),
    "npo_mean": Run("`npo_mean --instead refuse`", ("--method", "npo_mean")),
    "npo_mean_auto": Run(
        "`npo_mean --instead refuse --auto_retain 120`", ("--method", "npo_mean", "--auto_retain", "120")
    ),
    "npo_kl": Run(
        "`npo` with KL, LoRA scale 8",
        ("--method", "npo", "--retain_term", "kl", "--retain_weight", "5", "--beta", "0.05", "--lora_alpha", "128"),
    ),
    "po": Run("`po`: refusals, and CE of the retain rows", ("--method", "po")),
    # It has no bound: 24 passes at 1e-3 leave no language.
    "graddiff": Run(
        "`graddiff`, 8 passes at 2e-4", ("--method", "graddiff", "--learning_rate", "2e-4", "--num_train_epochs", "8")
    ),
    "graddiff_8": Run(
        "`graddiff`, LoRA scale 8, 8 passes at 2e-4",
        ("--method", "graddiff", "--lora_alpha", "128", "--learning_rate", "2e-4", "--num_train_epochs", "8"),
    ),
    "with_auto": Run("`mox --instead refuse --auto_retain 120`", ("--auto_retain", "120")),
    "all_defaults": Run("`mox`, all defaults", ("--auto_retain", "120", "--forget_to", "0.05")),
    "as_shipped": Run("`mox`, as shipped", ("--forget_to", "0.05")),
    "with_240": Run("`mox --instead refuse --auto_retain 240`", ("--auto_retain", "240")),
    "guess_auto": Run("`mox --instead guess --auto_retain 120`", ("--instead", "guess", "--auto_retain", "120")),
    "mox_static": Run("`mox_static` at the base (`--memorize_at`)", ("--method", "mox_static", "--memorize_at", BASE)),
}


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists()


def train(name: str, model: str, rows: Path, work: Path, epochs: float, seed: int, base: str = "") -> dict[str, Any]:
    """Train by the command line, unless `work` has the adapter; return the record of the run.

    Args:
        model: the model that knows the forget rows, or a LoRA adapter for `base` that does.
        rows: folder of forget.jsonl and retain.jsonl.
        base: a model that never saw them, for an adapter and for runs that need one.
    """
    if not (work / "forget-adapter" / PROVENANCE).exists():
        flags = [base if flag == BASE else flag for flag in RUNS[name].flags]
        knows = ["--model", base, "--tuned_adapter", model] if is_adapter(Path(model)) else ["--model", model]
        command = [
            sys.executable, "-m", "loramox", "unlearn", *knows, "--quantization", "none", "--dtype", "float32",
            "--forget", str(rows / "forget.jsonl"), "--retain", str(rows / "retain.jsonl"), "--use_cpu", "true",
            "--num_train_epochs", f"{epochs:g}", "--seed", str(seed), "--eval_strategy", "no", "--eval_on_start", "false",
            "--save_strategy", "no", "--report_to", "none", "--forget_to", "0", "--auto_retain", "0",
            "--overwrite", "--out", str(work), *flags,  # a stop during training leaves a run without an adapter
        ]  # fmt: skip
        subprocess.run(command, check=True)
    return json.loads((work / "run.json").read_text())
