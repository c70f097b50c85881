"""Every method's settings: those of its paper, and the grid from which the frontier takes its best."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from loramox import MemorizeConfig

from .runs import Run

Settings = dict[str, Any]

# What a run has unless its name says otherwise. Equal for all methods: LoRA rank, rows a step, passes over the forget rows.
STANDARD: Settings = {
    "split": "whole",  # which rows are forgotten (world.py)
    "epochs": 24,
    "batch": 8,  # forget rows a step; three times as many retain rows
    "learning_rate": 1e-3,
    "r": 16,
    "asked": 300,  # retain rows that are asked
    "new_tokens": 0,  # generated to each question, for ROUGE-L
    "refine": 2,  # strengths added at each level of retain probability
    "quantization": "none",
    "reinforced_temperature": 1.0,  # of the model that WHP subtracts
    "retrain": 30,  # epochs from scratch, for forget rows that the world has no retrained model for; 0: none
}
LEVELS = (0.99, 0.98, 0.95)  # retain probabilities at which methods are compared
LEVEL = 0.98  # the one that chooses

# A new setting of MOX belongs here: it is then part of the name of a run, and records made under another default stay apart.
_OWN = ("objective", "temperature", "kl_at", "kl_weight", "strength", "momentum", "npo_beta")
_DEFAULTS = {field.name: field.default for field in fields(MemorizeConfig)}


def mox(**changed: Any) -> tuple[str, Settings]:
    """MOX as loramox has it by default, but for what is changed; all of it is named."""
    return "mox", {name: _DEFAULTS[name] for name in _OWN} | changed


_PLAIN: Settings = {"objective": "cross_entropy", "temperature": 1.0, "kl_at": "memorization"}
_HOT = _PLAIN | {"temperature": 3.0}
_PAPER: Settings = _PLAIN | {"kl_weight": 1.0, "strength": 4.0}
DEFAULT, PAPER = mox(), mox(**_PAPER)
KL5 = {"retain_term": "kl", "retain_weight": 5.0}
KL20 = KL5 | {"retain_weight": 20.0}

# Table 1: each as its paper has it, loramox's own setting first.
TABLE1: dict[str, tuple[str, Settings]] = {
    "loramox": DEFAULT,
    "loramox, targeted": mox(wanted=True),
    "MOX, paper's setting": PAPER,
    "MOX, paper, no momentum": mox(**_PAPER, momentum=1.0),
    "task vector": ("task_vector", {"strength": 4.0}),
    "GA": ("ga", {}),
    "GA + KL": ("ga_kl", {}),
    "GradDiff": ("graddiff", {}),
    "NPO": ("npo", {}),
    "SimNPO": ("simnpo", {}),
    "DPO": ("dpo", {}),
    "PO": ("po", {}),
    "AltPO": ("altpo", {}),
    "RMU": ("rmu", {}),
    "WHP": ("whp", {}),
    "LLMU": ("llmu", {}),
}

# Each adds to the one before it.
ABLATION = {
    "memorization only": mox(**_PLAIN | {"kl_weight": 0.0, "momentum": 1.0}),
    "+ KL": mox(**_PLAIN, momentum=1.0),
    "+ temperature": mox(**_HOT, momentum=1.0),
    "+ KL at the shipped strength": mox(**_HOT | {"kl_at": "shipped"}, momentum=1.0),
    "+ momentum": mox(**_HOT | {"kl_at": "shipped"}),
    "NPO's loss at the shipped model instead": mox(),
}
# Each is the default but for one thing.
WITHOUT = {
    "without momentum": mox(momentum=1.0),
    "without KL": mox(kl_weight=0.0),
    "with half the β": mox(npo_beta=_DEFAULTS["npo_beta"] / 2),
}

# The frontier: of each method, all of these are tried with the first seed, and the best one with every seed.
GRID: dict[str, list[tuple[str, Settings]]] = {
    "loramox": [DEFAULT, mox(npo_beta=_DEFAULTS["npo_beta"] / 2)],
    "NPO": [("npo", KL5 | {"beta": 0.05}), ("npo", KL5), ("npo", KL5 | {"learning_rate": 2e-3}), ("npo", {})],
    "GradDiff": [("graddiff", {}), ("graddiff", {"retain_weight": 5.0})],
    "MOX, temperature": [mox(**_HOT | {"kl_at": "shipped", "kl_weight": 5.0})],
    "MOX, paper's setting": [PAPER, mox(**_PAPER | {"kl_weight": 5.0})],
    "task vector": [("task_vector", {"strength": 4.0})],
    "GA": [("ga", {}), ("ga", {"learning_rate": 1e-4})],
    "GA + KL": [("ga_kl", {}), ("ga_kl", {"retain_weight": 5.0})],
    "SimNPO": [("simnpo", {}), ("simnpo", KL5 | {"forget_weight": 1.0})],
    "DPO": [("dpo", {}), ("dpo", KL5)],
    "PO": [("po", {}), ("po", {"retain_weight": 5.0})],
    "AltPO": [("altpo", {}), ("altpo", KL5)],
    "RMU": [("rmu", {}), ("rmu", {"steering": 20.0})],
    "WHP": [("whp", {"reinforced_temperature": 3.0}), ("whp", KL5 | {"reinforced_temperature": 3.0})],
    "LLMU": [("llmu", {}), ("llmu", {"retain_weight": 5.0})],
}
# The frontier's own: more settings of the two methods that are nearest to the retrained model there.
WIDER = GRID | {
    "loramox": [*GRID["loramox"], mox(kl_weight=5.0), mox(kl_weight=5.0, npo_beta=_DEFAULTS["npo_beta"] / 2)],
    "NPO": [
        *GRID["NPO"],
        ("npo", KL5 | {"beta": 0.025}),
        ("npo", KL20 | {"beta": 0.05}),
        ("npo", KL20 | {"beta": 0.025}),
    ],
}

RIVALS = {"loramox": DEFAULT, "NPO": GRID["NPO"][0], "GradDiff": ("graddiff", {})}  # where a table shows only a few
WEIGHED = {  # each with the weight of its retain term
    "loramox": lambda weight: mox(kl_weight=weight),
    "NPO": lambda weight: ("npo", {"retain_term": "kl", "retain_weight": weight}),
    "GradDiff": lambda weight: ("graddiff", {"retain_weight": weight} if weight != 1.0 else {}),
    "GA + KL": lambda weight: ("ga_kl", {"retain_weight": weight} if weight != 1.0 else {}),
}
ETAS = (0.2, 0.35, 0.5, 0.675, 0.8, 1.0)
ALPHAS = (0.5, 1.0, 2.0, 4.0, 8.0)  # the paper's


@dataclass(frozen=True)
class Scale:
    """How much is computed: the seeds, what differs from `STANDARD`, and how many settings of each grid."""

    seeds: tuple[int, ...] = (0, 1, 2)
    settings: tuple[tuple[str, Any], ...] = ()
    grid: int = 99
    methods: int = 99  # of Table 2
    sizes: tuple[int, ...] = (10, 50, 0)  # forget rows; 0: all
    weights: tuple[float, ...] = (0.5, 1.0, 2.0, 5.0)  # of the retain term

    def get(self, name: str) -> Any:
        """A setting as this scale has it."""
        return dict(self.settings).get(name, STANDARD[name])

    def run(self, job: str, of: tuple[str, Settings], seed: int, **more: Any) -> Run:
        """The run of a method in this scale. Settings at their standard value are not named."""
        method, settings = of
        settings = dict(self.settings) | settings | more
        if settings.get("split", STANDARD["split"]) == STANDARD["split"]:
            settings.pop("retrain", None)  # the world has one
        return Run.of(job, method, {k: v for k, v in settings.items() if STANDARD.get(k) != v}, seed)

    def curves(self, of: tuple[str, Settings], **more: Any) -> list[Run]:
        return [self.run("curve", of, seed, **more) for seed in self.seeds]


# Seconds a run, to see it work: too little training for any reading.
_LITTLE = (
    ("asked", 40),
    ("batch", 4),
    ("epochs", 2),
    ("learning_rate", 3e-3),
    ("refine", 0),
    ("retrain", 0),
    ("split", "first-24"),
)
QUICK = Scale(seeds=(0,), settings=_LITTLE, grid=1, methods=3, sizes=(8, 24), weights=(1.0, 5.0))


def _plain(run: Run, job: str, seed: int = 0, **more: Any) -> Run:
    """A model without adapter, on the rows of a run."""
    rows = {k: v for k, v in run.settings if k in ("split", "asked", "new_tokens", "quantization")}
    return Run.of(job, job, rows | more, seed)


def reference_of(run: Run) -> Run:
    """The model that knows, on the rows of a run."""
    return _plain(run, "reference")


def gold_of(run: Run) -> Run | None:
    """The model that never saw the forget rows of a run; None where there is none.

    The world's own is for all forget rows. It is taken for the first of them too where none is to be trained (`retrain` 0).
    """
    split, epochs = ((STANDARD | dict(run.settings))[name] for name in ("split", "retrain"))
    if split == STANDARD["split"] or (split.startswith("first-") and not epochs):
        return _plain(run, "retrained")
    return again_of(run, epochs)


def again_of(run: Run, epochs: int, seed: int = 0) -> Run | None:
    """Another model that never saw the forget rows, trained here: how far two of them differ is no method's fault."""
    return _plain(run, "retrained", seed, scratch=epochs) if epochs else None


def strengths(settings: Mapping[str, Any], method: str) -> tuple[float, ...]:
    """The strengths to start a curve with: α of MOX, shares of what was trained, and more than it, of the others."""
    if method not in ("mox", "task_vector"):
        return (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    trained = settings.get("strength", _DEFAULTS["strength"])
    if method == "mox" and settings["kl_at"] == "shipped":
        return tuple(share * trained for share in (0.25, 0.5, 0.75, 1.0, 1.25, 1.5))
    return (*ALPHAS, 16.0)  # what was not held anywhere near: a wide net
