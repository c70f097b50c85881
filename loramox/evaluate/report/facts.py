"""What the page says in words and tables: taken from what was read, nothing is measured anew."""

import json
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from loramox.evaluate.measure import Record
from loramox.evaluate.report.answers import fit
from loramox.evaluate.report.read import FORGET, REFERENCE, RETRAINED, Inputs, number
from loramox.evaluate.summary import summarise, values

LEVEL = 0.05  # above this p-value a test does not tell two models apart
PARTS = ("forget", "retain")
RULES = {
    "budget": ("the largest α within the budget of retain probability", None),
    "holdout": ("forget rows look like rows never seen", "--holdout"),
    "retrained": ("like a model that never saw them", "--retrained, and wrong answers to the forget rows"),
}
# Metric, in words, what is better.
METRICS = {
    "forget_probability": ("Probability of forget answers", "lower"),
    "forget_rouge_l": ("ROUGE-L of what is said to forget questions", "lower"),
    "forget_exact_memorization": ("Exact memorization, forget", "lower"),
    "forget_extraction_strength": ("Extraction strength, forget", "lower"),
    "forget_quality": ("Forget quality (p-value, against the retrained model)", "higher"),
    "mia_min_k": ("Membership AUC (Min-K%, against holdout rows)", "nearer to 0.5"),
    "priv_leak": ("PrivLeak, %", "nearer to 0"),
    "retain_probability": ("Probability of retain answers", "higher"),
    "retain_rouge_l": ("ROUGE-L of what is said to retain questions", "higher"),
    "retain_kl": ("KL from the reference on retain rows, nats a token", "lower"),
    "model_utility": ("Model utility", "higher"),
}
# The settings that say most; all of them are listed after these.
TOLD = (
    "model", "quantization", "dtype", "r", "lora_alpha", "target_modules", "num_train_epochs", "learning_rate",
    "per_device_train_batch_size", "gradient_accumulation_steps", "objective", "temperature", "kl_weight", "kl_at", "strength",
    "momentum", "targeted", "prompt_template", "seed",
)  # fmt: skip


class Verdict(NamedTuple):
    """The run in one line, and what must be said beside it."""

    line: str
    beside: list[str]
    warnings: list[str]


def shown(value: Any) -> str:
    """A number as it stands in text and tables: 4 decimals, or 3 digits when small or large; a dash when there is none."""
    value = number(value)
    if math.isnan(value):
        return "–"
    if 0 < abs(value) < 0.1:
        return f"{value:#.3g}"
    return f"{value:.4f}" if 0.1 <= abs(value) < 10 else f"{value:.3g}"


def verdict(inputs: Inputs) -> Verdict:
    before, after = inputs.point(0.0), inputs.point(inputs.strength)
    warnings = _warnings(inputs)
    if not after:
        return Verdict(_unmeasured(inputs), [], warnings)
    forget, retain = ([number(p.get(f"{part}_probability")) for p in (before, after)] for part in PARTS)
    theirs = _mean(inputs.records.get(RETRAINED, ()), "forget")
    line = f"At strength α = {inputs.strength:g} the probability of the answers to be forgotten {_went(*forget)}"
    line += "" if math.isnan(theirs) else f" (a model that never knew them: {shown(theirs)})"
    line += f", that of the answers to be retained {_went(*retain)}"
    if retain[0] > 0 and not math.isnan(retain[1]):
        line += f" ({100 * retain[1] / retain[0]:.1f} % of it is left)"
    told, evidence = _told_apart(inputs, after)
    line += f"; {told}" + (f" ({'; '.join(evidence)})." if evidence else ".")
    return Verdict(line, [_attacked(inputs)], warnings)


def _went(before: float, after: float) -> str:
    if math.isnan(before) or math.isnan(after):
        return "is not known"
    if abs(after - before) < 0.005 * max(before, 1e-12):
        return f"hardly moved, {shown(before)} to {shown(after)}"
    return f"{'fell' if after < before else 'rose'} from {shown(before)} to {shown(after)}"


def _told_apart(inputs: Inputs, point: dict[str, float]) -> tuple[str, list[str]]:
    """Whether the forget model can be told from one that never knew, and by what."""
    data = (inputs.frontier or {}).get("data", {})
    n, m = (number(data.get(part, {}).get("rows")) for part in ("forget", "holdout"))
    quality, area = number(point.get("forget_quality")), number(point.get("mia_min_k"))
    signs, evidence = [], []
    if not math.isnan(quality):
        signs.append(quality < LEVEL)
        evidence.append(f"forget quality p = {quality:.2g}, n = {shown(n) if math.isnan(n) else int(n)}")
    if not math.isnan(area) and n > 0 and m > 0:
        error = 1.96 * math.sqrt((n + m + 1) / (12 * n * m))  # of an AUC of two samples that are alike
        signs.append(abs(area - 0.5) > error)
        evidence.append(f"membership AUC {area:.3f}, where 0.5 ± {error:.3f} is alike")
    if not signs:
        return (
            "whether it can be told from a model that never knew is not known, as neither a retrained model with wrong answers "
            "nor holdout rows were given to the sweep"
        ), []
    if any(signs):
        return "it can still be told from a model that never knew", evidence
    return "it could not be told from a model that never knew by what was tried", evidence


def _unmeasured(inputs: Inputs) -> str:
    if inputs.frontier:
        refused = next(
            (c["reason"] for c in inputs.frontier["choices"] if c["rule"] == inputs.frontier.get("rule")), None
        )
        return f"No strength was chosen{f': {refused}' if refused else ''}."
    if curves := trajectory(inputs):
        ends = (f"{part} {shown(p[0])} → {shown(p[-1])}" for part, (_, p) in curves.items())
        return f"Not measured after training. On the rows watched while training, probability went {', '.join(ends)}."
    return "Not measured: there is an adapter, and nothing is known yet about what it forgets."


def _warnings(inputs: Inputs) -> list[str]:
    frontier, found = inputs.frontier or {}, []
    if frontier.get("warning"):
        found.append(f"The sweep warns: {frontier['warning']}.")
    if "same rows" in inputs.missing:
        found.append(inputs.missing["same rows"].what)
    if frontier and frontier["chosen"] is None and inputs.strength is not None:
        found.append(f"The rule chose no strength; shown is the one that was shipped, α = {inputs.strength:g}.")
    elif inputs.shipped is not None and inputs.strength is not None and inputs.shipped != inputs.strength:
        there = inputs.point(inputs.shipped)
        at = ", ".join(f"{part} {shown(there.get(f'{part}_probability'))}" for part in PARTS)
        found.append(
            f"The forget adapter in this run's folder is at α = {inputs.shipped:g}, not at the chosen α = {inputs.strength:g} that "
            f"is shown here{f'; at α = {inputs.shipped:g} the probabilities are {at}' if there else ''}."
        )
    attacked = attacked_strength(inputs)
    if inputs.strength is not None and not math.isnan(attacked) and not math.isclose(attacked, inputs.strength):
        found.append(
            f"The attacks were made at α = {attacked:g}, not at the α = {inputs.strength:g} that is shown here."
        )
    return found


def _attacked(inputs: Inputs) -> str:
    rows = [row for row in attack_rows(inputs) if row["attack"] != "none" and not row["of reference"]]
    if not rows:
        return "No attack was made: what comes back is not known."
    base = next((row["forget"] for row in attack_rows(inputs) if row["state"] == "forget model"), math.nan)
    worst = max(rows, key=lambda row: row["forget"])
    before = "" if math.isnan(base) else f", {shown(base)} before any attack"
    by = fit(f"{worst['attack']}: {worst['label']}", 80)["text"]
    if worst["forget"] < base + 0.005:
        return f"No attack brought anything back: the most, by “{by}”, is {shown(worst['forget'])}, and was {shown(base)} before."
    return f"Most came back by “{by}”: probability {shown(worst['forget'])}{before}."


def attacked_strength(inputs: Inputs) -> float:
    """The strength of the adapter that was attacked, NaN when it is not known."""
    adapter = (inputs.attacks or {}).get("adapter") or {}
    made_by = adapter.get("made_by")
    return number(made_by.get("strength")) * number(adapter.get("strength")) if isinstance(made_by, dict) else math.nan


def attack_rows(inputs: Inputs) -> list[dict[str, Any]]:
    """One row a state that was asked, in the order in which they were."""
    rows = []
    for state in (inputs.attacks or {}).get("states", ()):
        metrics = state["metrics"]
        forget = number(metrics.get("forget_probability"))
        if math.isnan(forget):
            continue
        rows.append(
            {
                "attack": str(state["attack"]),
                "state": str(state["state"]),
                "label": re.sub(r", (reference|forget) model$", "", str(state["state"])),
                "of reference": str(state["state"]).endswith("reference model"),
                "forget": forget,
                "retain": number(metrics.get("retain_probability")),
                "rouge": number(metrics.get("forget_rouge_l")),
                "extraction": number(metrics.get("forget_extraction_strength")),
            }
        )
    return rows


def metric_rows(inputs: Inputs) -> list[list[str]]:
    """Metric, better, and its value for reference, forget and retrained model; those that one of them has."""
    theirs = summarise(inputs.records.get(RETRAINED, ())).metrics
    models = [inputs.point(0.0), inputs.point(inputs.strength), {name: m.value for name, m in theirs.items()}]
    rows = []
    for name, (words, better) in METRICS.items():
        cells = [shown(model.get(name)) for model in models]
        if cells[1] != "–":  # of the forget model
            rows.append([words, *cells, better])
    return rows


def choices(inputs: Inputs) -> list[dict[str, str]]:
    """What each rule chose, with its interval, or why it refused, or what it would need."""
    frontier = inputs.frontier or {"choices": []}
    said = {c["rule"]: c for c in frontier["choices"]}
    rows = []
    for rule in [*RULES, *(r for r in said if r not in RULES)]:
        what, needs = RULES.get(rule, ("", None))
        c = said.get(rule)
        row = {"rule": rule, "what": what, "strength": "not asked", "interval": "–", "reason": f"needs {needs}"}
        if c:
            low, high = number(c.get("low")), number(c.get("high"))
            row["strength"] = "refuses" if c["strength"] is None else f"{number(c['strength']):g}"
            row["interval"] = "–" if math.isnan(low) else f"{low:g} to {high:g}"
            row["reason"] = str(c["reason"])
        row["used"] = "yes" if rule == frontier.get("rule") else ""
        rows.append(row)
    return rows


def points(inputs: Inputs) -> list[dict[str, Any]]:
    frontier = inputs.frontier or {"points": []}
    names = ("forget_probability", "retain_probability", "retain_kl", "forget_quality", "mia_min_k", "priv_leak")
    return [{"strength": p["strength"], "cells": [shown(p.get(n)) for n in names]} for p in frontier["points"]]


def spreads(inputs: Inputs, part: str) -> dict[str, np.ndarray]:
    """Per-row probabilities of a part, by model."""
    by_model = {model: of_part(records, part) for model, records in inputs.records.items()}
    return {model: found for model in (REFERENCE, FORGET, RETRAINED) if len(found := by_model.get(model, []))}


def spread_rows(inputs: Inputs) -> list[list[str]]:
    """Part, model, number of rows, mean, and the quantiles of per-row probability."""
    return [
        [part, model, f"{len(p):,}", shown(p.mean()), *(shown(q) for q in np.quantile(p, [0.05, 0.5, 0.95]))]
        for part in PARTS
        for model, p in spreads(inputs, part).items()
    ]


def of_part(records: Sequence[Record], part: str) -> np.ndarray:
    found = values([r for r in records if r["part"] == part], "probability")
    return found[np.isfinite(found)]


def _mean(records: Sequence[Record], part: str) -> float:
    found = of_part(records, part)
    return float(found.mean()) if len(found) else math.nan


def trajectory(inputs: Inputs) -> dict[str, tuple[list[float], list[float]]]:
    """Epochs and probabilities of each part, on the rows watched while training; of those parts that were."""
    curves = {}
    for part in PARTS:
        found = [
            (number(entry.get("epoch")), number(entry.get(f"eval_{part}_probability")))
            for entry in inputs.run.get("log", [])
        ]
        found = [each for each in found if not any(map(math.isnan, each))]
        if len(found) > 1:
            curves[part] = ([epoch for epoch, _ in found], [p for _, p in found])
    return curves


def losses(inputs: Inputs) -> dict[str, list[float]]:
    """epoch, memorize_loss and retain_kl: the two terms of the loss while training."""
    names = ("epoch", "memorize_loss", "retain_kl")
    found = [e for e in inputs.run.get("log", []) if not any(math.isnan(number(e.get(n))) for n in names)]
    return {name: [e[name] for e in found] for name in names}


def settings(inputs: Inputs) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The settings that say most, and all others; what might be a secret is left out."""
    held = inputs.run["settings"]
    told = [(name, _plain(held[name])) for name in TOLD if held.get(name) is not None]
    rest = [
        (n, _plain(v)) for n, v in sorted(held.items()) if n not in TOLD and v is not None and not n.endswith("token")
    ]
    return told, rest


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
