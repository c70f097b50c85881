"""The settings that are compared, as many of each method, and the runs that each table needs."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from loramox import UnlearnConfig
from loramox.train.config import METHODS
from loramox.train.inputs import RATE

from .choose import chosen_setting
from .runs import Read, Run

Settings = dict[str, Any]
R = 16  # LoRA's rank, of every method
KL5: Settings = {"retain_term": "kl", "retain_weight": 5.0}

# Of each method all of these are run with the first seed, and the best one with every seed. Add as many to every line.
GRID: dict[str, list[Settings]] = {
    "mox": [{"alpha": 8.0}, {"alpha": 1.0}],
    "npo_mean": [{"lora_alpha": 128}, {"lora_alpha": 16}],
    "npo": [KL5 | {"beta": 0.05, "lora_alpha": scale} for scale in (128, 16)],
    "simnpo": [KL5 | {"forget_weight": 1.0, "lora_alpha": scale} for scale in (128, 16)],
}
# Defaults of mox until 2026-12-01. Records of that time have no temperature in their command: at 1 it is no other loss.
FORMER: Settings = {"temperature": 1.0, "beta": 1.8}
FORMERLY = "mox, one temperature"
# One setting each, which nothing chooses: mox as it was, NPO at the LoRA scale at which mox and npo_mean train, and two as in
# their papers.
SCALE_8 = "npo, LoRA scale 8"
FIXED: dict[str, tuple[str, Settings]] = {
    FORMERLY: ("mox", GRID["mox"][0] | FORMER),
    SCALE_8: ("npo", KL5 | {"beta": 0.05, "lora_alpha": 128}),
    "mox_static": ("mox_static", {}),
    "task_vector": ("task_vector", {}),
}
OVERLAP = ("mox", "npo_mean", "npo")  # whose best settings are run where rows overlap
ABLATION: dict[str, Settings] = {
    "mox": {},
    FORMERLY: FORMER,
    "– one inner step": {"inner_steps": 1},
    "– half the inner step": {"inner_lr": 5e-3},
    "– without momentum": {"momentum": 1.0},
    "– KL of weight 5": {"retain_weight": 5.0},
    f"{FORMERLY}, without KL": FORMER | {"retain_term": "none"},
}
TAUGHT = ("instead", "refusals")  # of no effect here: a model without a chat template is taught no other answer
BUDGET = ("num_train_epochs", "learning_rate", "per_device_train_batch_size", "retain_per_forget", "warmup_steps")


@dataclass(frozen=True)
class Size:
    """How much is computed.

    Args:
        training: settings of every training besides its method's.
        scales: multiples of what ships at which it is scored; `wide` is added where rows overlap.
        relearn: steps of the relearning attack after which the other rows are scored.
        below: multiples of what ships from which it is relearned as well, where the reference writes rows.
        share: share of the forget rows that the attacker has.
        forget: forget rows that are used, the first ones; None: all.
        scored: given and never-given retain rows that are scored, of each.
        written: retain rows that the reference is asked to write, where it writes any.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    training: tuple[tuple[str, Any], ...] = ()
    scales: tuple[float, ...] = (0.85, 0.9, 0.95, 1.0, 1.05, 1.1)
    wide: tuple[float, ...] = (0.1, 0.2, 0.35, 0.5, 0.65)
    relearn: tuple[int, ...] = (5, 10, 20, 40)
    below: tuple[float, ...] = (0.95,)
    share: float = 0.2
    forget: int | None = None
    scored: int = 150
    written: int = 120

    def run(self, method: str, changed: Settings, seed: int, split: str = "whole") -> Run:
        """The run of a method with `changed` settings."""
        defaults = {field.name: field.default for field in fields(UnlearnConfig) if field.name in BUDGET}
        defaults["learning_rate"] = RATE
        own = {name: value for name, value in METHODS[method].settings.items() if name not in TAUGHT}
        settings = defaults | {"r": R} | own | dict(self.training) | changed
        return Run(method, tuple(changed.items()), tuple(sorted(settings.items())), seed, split)

    def seeded(self, method: str, changed: Settings, split: str = "whole") -> list[Run]:
        return [self.run(method, changed, seed, split) for seed in self.seeds]

    def reference(self, split: str = "whole") -> Run:
        return Run("reference", (), (), 0, split)

    def retrained(self) -> list[Run]:
        """The control: scored, and attacked with every seed."""
        return [Run("retrained", (), (), seed) for seed in self.seeds]

    def grid(self, methods: Sequence[str]) -> list[Run]:
        return [self.run(name, setting, self.seeds[0]) for name in methods for setting in GRID[name]]

    def best(self, read: Read, methods: Sequence[str], split: str = "whole") -> dict[str, list[Run]]:
        """For each method the runs of its best setting, one a seed; without those whose grid has not been run."""
        chosen = {}
        controls = [read(self.reference()), read(self.retrained()[0])]
        for name in methods:
            records = [read(run) for run in self.grid([name])]
            if None not in (*controls, *records):
                place = chosen_setting(records, *(control["points"][0] for control in controls))
                chosen[name] = self.seeded(name, GRID[name][place], split)
        return chosen


QUICK = Size(
    seeds=(0,),
    training=(("max_steps", 2),),
    scales=(0.9, 1.0, 1.1),
    wide=(0.5,),
    relearn=(1, 2),
    below=(0.9,),
    forget=8,
    scored=4,
    written=2,
)


def frontier(size: Size, read: Read) -> dict[str, list[Run]]:
    return size.best(read, list(GRID)) | {label: size.seeded(*fixed) for label, fixed in FIXED.items()}


def overlap(size: Size, read: Read) -> dict[str, list[Run]]:
    fixed = {label: size.seeded(*FIXED[label], "overlap") for label in (FORMERLY, SCALE_8)}
    return size.best(read, OVERLAP, "overlap") | fixed


def ablation(size: Size, read: Read) -> dict[str, list[Run]]:
    return {label: size.seeded("mox", GRID["mox"][0] | changed) for label, changed in ABLATION.items()}


def written(size: Size, read: Read) -> dict[str, list[Run]]:
    """Each at LoRA scale 8, with retain rows that the reference writes beside the given ones."""
    compared = {name: (name, GRID[name][0]) for name in ("mox", "npo_mean")}
    compared[SCALE_8] = FIXED[SCALE_8]
    rows = {"auto_retain": size.written}
    return {label: size.seeded(method, setting | rows) for label, (method, setting) in compared.items()}
