"""Settings of a sweep: which points to measure, and the rule that chooses one."""

from dataclasses import dataclass

import numpy as np

from loramox.errors import SettingsError
from loramox.settings import check_choices, setting

RULES = ("budget", "holdout", "retrained", "forget_to")


@dataclass
class SweepConfig:
    """Which points to measure, and the rule that chooses among them."""

    trained: str = setting("Folder 'trained' of a run.")
    out: str = setting("Folder to write. Results in it are reused; rerun the command to resume an interrupted sweep.")
    alphas: list[float] | None = setting(
        "Alphas to measure, for a method that has alpha. Default: 1/4 to 3/2 of the alpha of training.", None
    )
    scales: list[float] | None = setting(
        "Scales to measure, for a method without alpha; 1 is as trained. Default: 1/4 to 3/2.", None
    )
    refine: int = setting("Points to add near the rule's choice.", 3)
    rule: str = setting(
        "Rule that chooses: budget (the largest that costs retain rows no more than --budget), holdout (forget rows look like "
        "rows never seen), retrained (like a model that never saw them), forget_to (the smallest that forgets as much as --forget_to, "
        "--retrained or --holdout).",
        "budget",
        choices=list(RULES),
    )
    budget: float = setting("Share of retain probability that forgetting may cost.", 0.02)
    forget_to: float | None = setting(
        "For rule forget_to: the largest probability of forget answers, and share of them that greedy decoding gives, like 0.05. "
        "Default: as in --retrained, else as the reference has --holdout rows.",
        None,
    )
    ship: str | None = setting("Folder to write the chosen forget adapter to.", None)
    model: str | None = setting("Folder or hub id of the base model, if it has moved since training.", None)

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("alphas", "scales"):
            values = getattr(self, name)
            if values is not None and not all(np.isfinite(value) and value > 0 for value in values):
                raise SettingsError(f"{name} are {values}; --{name} needs finite numbers above 0")
        if not 0 < self.budget < 1:
            raise SettingsError(f"budget is {self.budget}; --budget needs a share above 0 and below 1, like 0.02")
        if self.forget_to is not None and not 0 < self.forget_to < 1:
            raise SettingsError(
                f"forget_to is {self.forget_to}; --forget_to needs a probability above 0 and below 1, like 0.05"
            )
        if self.refine < 0:
            raise SettingsError(f"refine is {self.refine}; --refine needs 0 or more")
