"""How hard the forget rows are to recover: the worst state of each family of attacks, beside the reference and the control."""

import math
import re
from dataclasses import dataclass, field
from typing import Any

from loramox.evaluate.attacks.attacked import NEVER_KNOWN
from loramox.evaluate.attacks.config import ATTACKS
from loramox.evaluate.attacks.leaks import CRITERIA
from loramox.evaluate.attacks.relearn import CONTROLS, sentence
from loramox.extras.report.answers import fit, named
from loramox.extras.report.facts import LEAK_AT, shown
from loramox.extras.report.read import FORGET, REFERENCE, Inputs, number

# A family is the first word of its attacks' names.
TITLES = {
    "none": "Not attacked",
    "forms": "Asked in other forms",
    "ask": "Asked otherwise",  # as loramox 0.1 had it
    "context": "Asked with other rows in the context",
    "sample": "Sampled many times",
    "relearn": "Trained for some steps more",
    "requantize": "Merged and quantized",
    "pair": "Base and adapter together",
}
# Metric, and its name on the page. A family is judged by the first that it has; leak@k comes after the first.
MEASURES = {
    "leak": "share of rows that leak",
    "rouge_l_beyond_base": "ROUGE-L beyond the base's own answers",
    "forget_probability": "probability of the true answers",
    "forget_rouge_l": "ROUGE-L of the answers",
}
ALSO = {"forget_extraction_strength": "extraction strength", "retain_probability": "probability, retain rows"}

State = tuple[str, str]  # attack, and its label without the model


@dataclass
class Family:
    """The states of one family of attacks, each with the metrics of forget model, reference and controls."""

    name: str
    states: dict[State, dict[str, dict[str, float]]] = field(default_factory=dict)
    leaking: dict[State, list[tuple[str, str]]] = field(default_factory=dict)  # rows and figures, if a state names some
    before: dict[str, dict[str, float]] = field(default_factory=dict)  # metrics of each model that is not attacked

    @property
    def title(self) -> str:
        return TITLES.get(self.name) or fit(self.name, 40)["text"]

    @property
    def measure(self) -> str:
        """By what the family is judged; empty where no state of the forget model has any of it."""
        had: dict[str, float] = {}  # the highest value of each metric
        for models in self.states.values():
            for name, value in models.get(FORGET, {}).items():
                had[name] = max(value, had.get(name, value))
        sampled = sorted(filter(LEAK_AT.fullmatch, had), key=lambda m: (_by_k(m)[0], had[m]))  # the worst last
        return next((m for m in ("leak", *sampled[-1:], *MEASURES) if m in had), "")

    @property
    def worst(self) -> State:
        """The worst state of the forget model; of those that name rows, where there are some: others are parts of them."""
        ours = {
            s: models[FORGET][self.measure]
            for s, models in self.states.items()
            if self.measure in models.get(FORGET, ())
        }
        return max([s for s in ours if s in self.leaking] or ours, key=lambda s: ours[s])

    @property
    def where(self) -> str:
        """The worst state in words; empty where there is but one."""
        attack, label = self.worst
        return fit(": ".join(filter(None, (attack.removeprefix(self.name).strip(), label))), 60)["text"]

    def value(self, model: str) -> tuple[float, bool]:
        """Of a model in the worst state; or of that model as it is, and False, where it was not attacked so. NaN: not known."""
        there = self.states[self.worst].get(model, {})
        attacked = self.measure in there
        return (there if attacked else self.before.get(model, {})).get(self.measure, math.nan), attacked

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Every state of the forget model: its metrics, and the measure of the other models there."""
        ours = {s: models for s, models in self.states.items() if FORGET in models}
        had = {name for models in ours.values() for name in models[FORGET]}
        names = [n for n in (*MEASURES, *ALSO) if n in had] + sorted(filter(LEAK_AT.fullmatch, had), key=_by_k)
        others = [o for o in (REFERENCE, *CONTROLS) if any(self.measure in m.get(o, ()) for m in ours.values())]
        head = ["attack", "state", *map(in_words, names), *(f"{o}: {in_words(self.measure)}" for o in others)]
        return head, [
            [*(fit(text or "–", 80)["text"] for text in state)]
            + [shown(m[FORGET].get(n)) for n in names]
            + [shown(m.get(o, {}).get(self.measure)) for o in others]
            for state, m in ours.items()
        ]


def families(inputs: Inputs) -> list[Family]:
    """Each family of attacks that ran, "none" first."""
    found: dict[str, Family] = {}
    for each in inputs.attacks.get("states", ()):
        attack, (label, model) = str(each["attack"]), _model_of(str(each["state"]))
        name, state = attack.split(" ")[0], (attack, label)
        family = found.setdefault(name, Family(name))
        metrics = {n: value for n, held in each["metrics"].items() if not math.isnan(value := number(held))}
        family.states.setdefault(state, {})[model] = metrics
        if model == FORGET and isinstance(each.get("worst"), list):
            family.leaking[state] = [_figures(row) for row in each["worst"] if isinstance(row, dict) and "row" in row]
    for family in found.values():
        family.before = found.get("none", family).states.get(("none", ""), {})
    order = list(TITLES)
    every = (family for family in found.values() if family.measure)
    return sorted(every, key=lambda f: order.index(f.name) if f.name in order else len(order))


def recovered(inputs: Inputs) -> str:
    """What attacks recovered most, in a few sentences: beyond the control, or else beyond the forget model before any attack."""

    def gain(family: Family) -> float:
        control, attacked = family.value(inputs.control)
        return family.value(FORGET)[0] - (control if attacked else family.before.get(FORGET, {}).get(family.measure, 0))

    # Whoever has the pair has the base, and with it the rows: what matters there is more than that.
    attacks = [family for family in families(inputs) if family.name not in ("none", "pair")]
    if not attacks:
        return "No attack was made, so it is not known whether the rows can be recovered."
    most = max(attacks, key=gain)
    before, (control, attacked) = most.before.get(FORGET, {}).get(most.measure), most.value(inputs.control)
    by = f"“{most.title}{most.where and f', {most.where}'}”: {in_words(most.measure)} {shown(most.value(FORGET)[0])}"
    was = "" if before is None else f", {shown(before)} before any attack"
    control_is = NEVER_KNOWN if inputs.control == NEVER_KNOWN else "the retrained model"
    nothing = f"No attack recovered {f'more than from {control_is}' if attacked else 'anything'}. The most is"
    says = [f"{'Most was recovered' if gain(most) >= 0.005 else nothing} by {by}{was}."]
    says.append(
        f"The control, {control_is}, has {shown(control)} there." if attacked else "There is no control for it."
    )
    says.append(f"These are means over {asked_rows(inputs)}{_and_never_known(inputs)}.")
    saved = inputs.attacks.get("steps_saved") or {}
    return " ".join(says + [sentence(attack, found) for attack, found in saved.items() if "forget rows" in attack])


def not_attacked(inputs: Inputs) -> list[str]:
    """The families that did not run, and what was left out of those that did, in sentences."""
    if not inputs.attacks:
        return []
    absent = inputs.attacks.get("absent") or {}
    ran = {family.name for family in families(inputs)} | {name.split(" ")[0].removesuffix(":") for name in absent}
    says = [f"{TITLES.get(name, name)}: not tried (--attacks {name})." for name in ATTACKS if name not in ran]
    parts: dict[str, list[str]] = {}
    for name, why in absent.items():
        family, _, part = name.partition(": ")
        if part:
            parts.setdefault(family, []).append(part)
        else:
            says.append(f"{TITLES.get(family, family.capitalize())}: {why}.")
    return says + [f"{TITLES.get(name, name)}: not as {', '.join(some)}." for name, some in parts.items()]


def asked_rows(inputs: Inputs) -> str:
    """The forget rows that the attacks' figures are over; the verdict's are over all."""
    held = inputs.attacks.get("rows") or {}
    known, asked = (number(held.get(name)) for name in ("attacker's", "asked"))
    total = number((inputs.attacks.get("data") or {}).get("forget", {}).get("rows", known + asked))
    if asked < total - known:  # with --quick
        return f"{asked:,.0f} of the {total - known:,.0f} forget rows that the attacker did not train on"
    some = "" if math.isnan(total + asked) else f"{asked:,.0f} of {total:,.0f} "
    return f"the {some}forget rows that the attacker did not train on"


def _and_never_known(inputs: Inputs) -> str:
    held = (inputs.attacks.get("rows") or {}).get(NEVER_KNOWN)
    if inputs.control != NEVER_KNOWN or not isinstance(held, dict) or math.isnan(asked := number(held.get("asked"))):
        return ""
    return f" and, for the control, over {asked:,.0f} {NEVER_KNOWN}"


def in_words(metric: str) -> str:
    if found := LEAK_AT.fullmatch(metric):
        return f"leak@{found[1]} by {CRITERIA[found[2]]}"
    return (MEASURES | ALSO)[metric]


def _by_k(metric: str) -> tuple[int, str]:
    _, _, k, _, by = metric.split("_", 4)
    return int(k), by


def _model_of(state: str) -> tuple[str, str]:
    """Label and model of a state, which is the forget model's where it names none; its rows, where those are never known."""
    found = re.fullmatch(rf"(?:(.*), )?(reference model|{'|'.join((FORGET, *CONTROLS))})", state, re.DOTALL)
    return (found[1] or "", REFERENCE if found[2].startswith(REFERENCE) else found[2]) if found else (state, FORGET)


def _figures(row: dict[str, Any]) -> tuple[str, str]:
    """A row that leaks: where it is, and everything that its state says of it."""
    others = {
        MEASURES.get(f"forget_{name}", name.replace("_", " ")): value for name, value in row.items() if name != "row"
    }
    figures = (
        f"{n} {fit(value, 40)['text'] if isinstance(value, str) else shown(value)}" for n, value in others.items()
    )
    return named(row), ", ".join(figures)
