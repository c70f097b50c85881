"""Settings of a sweep: which points to measure, and the rule that chooses one."""

import math
from dataclasses import dataclass

from loramox.settings import check_choices, refuse, setting

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
        "Target of rule forget_to, like 0.05. It bounds the mean probability of the forget answers, that of their second halves given "
        "the first halves, and the share of them that greedy decoding gives. Without it, the level of --retrained, else of --holdout, is the target.",
        None,
    )
    ship: str | None = setting("Folder to write the chosen forget adapter to.", None)
    model: str | None = setting("Folder or hub id of the base model, if it has moved since training.", None)

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("alphas", "scales"):
            values = getattr(self, name)
            fine = values is None or all(0 < value < math.inf for value in values)
            refuse(name, values, fine, "finite numbers above 0")
        refuse("budget", self.budget, 0 < self.budget < 1, "a share above 0 and below 1, like 0.02")
        fine = self.forget_to is None or 0 < self.forget_to < 1
        refuse("forget_to", self.forget_to, fine, "a probability above 0 and below 1, like 0.05")
        refuse("refine", self.refine, self.refine >= 0, "0 or more")
