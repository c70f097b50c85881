"""The runs: each is one call of `loramox unlearn`, as a user would make it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """A title for the tables, and the flags besides model, rows, seed and folder."""

    title: str
    flags: tuple[str, ...] = ()


RUNS = {
    "default": Run("`mox`, the default: `--instead refuse`"),
    "guess": Run("`mox --instead guess`", ("--instead", "guess")),
    "none": Run("`mox --instead none`", ("--instead", "none")),
    "npo_mean": Run("`npo_mean --instead refuse`", ("--method", "npo_mean")),
    "npo_kl": Run(
        "`npo` with KL, LoRA scale 8",
        ("--method", "npo", "--retain_term", "kl", "--retain_weight", "5", "--beta", "0.05", "--lora_alpha", "128"),
    ),
    "po": Run("`po`: refusals, and CE of the retain rows", ("--method", "po")),
    "graddiff": Run("`graddiff`", ("--method", "graddiff")),
}
