"""Which method to train, MOX or another, and the settings that only the others have."""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

from loramox.errors import SettingsError
from loramox.model.lora import AS_TRAINED
from loramox.settings import check_choices
from loramox.train.config import MemorizeConfig, refuse


class Method(NamedTuple):
    """A method to compare with: where it is from, and its settings, at its paper's values. None has to be given."""

    title: str
    settings: dict[str, Any]
    answers: str | None = None  # taught instead of the true ones: refusals, wanted (a column), random (of retain rows)


_CE = {"retain_term": "ce", "retain_weight": 1.0, "forget_weight": 1.0}
_KL = _CE | {"retain_term": "kl"}
_NONE = _CE | {"retain_term": "none"}

METHODS = {
    "ga": Method("GA, arXiv 2210.01504", _NONE),
    "ga_kl": Method("GA + KL, arXiv 2401.06121", _KL),
    "graddiff": Method("GradDiff, arXiv 2203.12817", _CE),
    "npo": Method("NPO, arXiv 2404.05868", _CE | {"beta": 0.1}),
    # The authors' values for TOFU forget10.
    "simnpo": Method("SimNPO, arXiv 2410.07163", _CE | {"beta": 4.5, "margin": 0.0, "forget_weight": 0.125}),
    "dpo": Method("DPO with refusals, arXiv 2305.18290", _CE | {"beta": 0.1, "refusals": None}, "refusals"),
    "po": Method("PO, arXiv 2401.06121", {"retain_term": "ce", "retain_weight": 1.0, "refusals": None}, "refusals"),
    "altpo": Method("AltPO, arXiv 2409.13474", _CE | {"beta": 0.1}, "wanted"),
    # Those of Zephyr-7B, which has 32 layers.
    "rmu": Method(
        "RMU, arXiv 2403.03218",
        {"retain_term": "states", "retain_weight": 1200.0, "forget_weight": 1.0, "steering": 6.5, "rmu_layer": 7},
    ),
    "whp": Method("WHP, arXiv 2310.02238", _NONE | {"reinforced": None, "whp_strength": 5.0}),
    "llmu": Method("LLMU, arXiv 2310.10683", _KL | {"forget_weight": 0.5}, "random"),
}

# What is MOX's own is off for the others, so that all parts are taken, watched and shipped at θ_ref + ΔW.
_OFF = {
    "strength": AS_TRAINED,
    "kl_at": "memorization",
    "kl_weight": 0.0,
    "momentum": 1.0,
    "objective": "cross_entropy",
    "temperature": 1.0,
    "targeted": "descent",
}
# θ_ref − α·ΔW with ΔW of plain training on the forget rows (arXiv 2212.04089).
_TASK_VECTOR = {"kl_weight": 0.0, "momentum": 1.0, "objective": "cross_entropy", "temperature": 1.0}


@dataclass
class BaselineConfig(MemorizeConfig):
    """Settings of a run by any method. With `method="mox"`, those of MOX; what only other methods have is refused then.

    A setting that is not given has the value of the method's paper.
    """

    method: str = field(
        default="mox",
        metadata={
            "help": "mox; task_vector (mox without KL, temperature and momentum); or another method, shipped as trained: "
            "ga (gradient ascent), ga_kl, graddiff, npo, simnpo, dpo and po (with --refusals), altpo (with --wanted_column), "
            "rmu, whp (with --reinforced), llmu.",
            "choices": ["mox", "task_vector", *METHODS],
        },
    )
    retain_term: str | None = field(
        default=None,
        metadata={
            "help": "Other methods: what holds retain rows: ce, kl (to the reference), none, or states (rmu). Default: as in the paper.",
            "choices": ["ce", "kl", "none", "states"],
        },
    )
    retain_weight: float | None = field(
        default=None, metadata={"help": "Other methods: weight of the retain term. Default: the paper's, mostly 1."}
    )
    forget_weight: float | None = field(
        default=None,
        metadata={"help": "Other methods: weight of the forget rows' term. Default: 1; simnpo 0.125, llmu 0.5."},
    )
    beta: float | None = field(
        default=None, metadata={"help": "β of npo, dpo, altpo (0.1 unless given) and simnpo (4.5)."}
    )
    margin: float | None = field(default=None, metadata={"help": "γ of simnpo. Default: 0."})
    refusals: str | None = field(
        default=None,
        metadata={"help": "dpo and po: text file of refusals, one a line; each forget row gets one by a seeded draw."},
    )
    steering: float | None = field(
        default=None, metadata={"help": "rmu: length of the vector that forget rows are steered to. Default: 6.5."}
    )
    rmu_layer: int | None = field(
        default=None, metadata={"help": "rmu: number of the layer whose output is steered, from 1. Default: 7."}
    )
    reinforced: str | None = field(
        default=None,
        metadata={"help": "whp: folder 'memorization' of a run on the same forget rows, the reinforced model."},
    )
    whp_strength: float | None = field(
        default=None,
        metadata={"help": "whp: how much of what the reinforced model raises is subtracted. Default: 5."},
    )

    ONLY_OTHERS: ClassVar = ("retain_term", "retain_weight", "forget_weight", "beta", "margin", "refusals", "steering",
                             "rmu_layer", "reinforced", "whp_strength")  # fmt: skip

    def __post_init__(self) -> None:
        check_choices(self)
        own = METHODS[self.method].settings if self.is_baseline else {}
        for name in self.ONLY_OTHERS:
            given = getattr(self, name)
            if given is not None and name not in own:
                users = ", ".join(method for method, of in METHODS.items() if name in of.settings)
                raise SettingsError(f"--{name} is of no use to --method {self.method}; it is for {users}. Leave it out")
            setattr(self, name, own.get(name) if given is None else given)
        self._check_values(own)
        preset = _OFF if self.is_baseline else _TASK_VECTOR if self.method == "task_vector" else {}
        self._reset(preset)
        super().__post_init__()
        for name, value in preset.items():
            setattr(self, name, value)

    def _check_values(self, own: dict[str, Any]) -> None:
        for name, value in own.items():
            if value is None and getattr(self, name) is None:
                raise SettingsError(f"--method {self.method} needs --{name}: see --help")
        for name in ("beta", "forget_weight", "steering", "whp_strength"):
            value = getattr(self, name)
            refuse(name, value, value is None or value > 0, "a number above 0")
        for name in ("margin", "retain_weight"):
            value = getattr(self, name)
            refuse(name, value, value is None or value >= 0, "0 or more")
        refuse("rmu_layer", self.rmu_layer, self.rmu_layer is None or self.rmu_layer >= 1, "1 or more")
        states = self.retain_term == "states"
        if self.is_baseline and states != (self.method == "rmu") and self.retain_term != "none":
            raise SettingsError(
                f"retain_term is '{self.retain_term}'; --retain_term states and --method rmu go together"
            )

    def _reset(self, preset: dict[str, Any]) -> None:
        """Back to what `MemorizeConfig` takes by default, for its checks. Raises when something else was given."""
        defaults = {f.name: f.default for f in fields(MemorizeConfig)}
        for name, value in preset.items():
            given = getattr(self, name)
            if given not in (defaults[name], value):
                flag = "alpha" if name == "strength" else name
                why = "ships ΔW as it was trained, at no other strength" if flag == "alpha" else f"has {value} there"
                raise SettingsError(f"{name} is {given}; --method {self.method} {why}. Leave out --{flag}")
            setattr(self, name, defaults[name])

    @property
    def is_baseline(self) -> bool:
        """Whether ΔW is trained to forget, and shipped as it is; else it is memorized, and turned round."""
        return self.method in METHODS

    @property
    def title(self) -> str:
        """The method, and where it is from."""
        if self.method == "task_vector":
            return "task vector, arXiv 2212.04089"
        return METHODS[self.method].title if self.is_baseline else super().title

    @property
    def holds_retain(self) -> bool:
        """Whether retain rows are trained on."""
        return self.retain_term != "none" and self.retain_weight > 0 if self.is_baseline else super().holds_retain
