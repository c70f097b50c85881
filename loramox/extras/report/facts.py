"""The tables and figures of the page, from the files that were read."""

import json
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from loramox.evaluate.attacks import relearn
from loramox.evaluate.attacks.leaks import CRITERIA
from loramox.evaluate.measure import Record
from loramox.evaluate.summary import summarise, values
from loramox.extras.report.read import FORGET, REFERENCE, RETRAINED, Inputs, number, same_value

LEVEL = 0.05  # above this p-value a test does not tell two models apart
PARTS = ("forget", "retain")
# Metric, in words, what is better.
METRICS = {
    "forget_probability": ("Probability of forget answers", "lower"),
    "forget_rouge_l": ("ROUGE-L of the answers to forget questions", "lower"),
    "forget_exact_memorization": ("Exact memorization, forget", "lower"),
    "forget_late_probability": ("Late probability, forget", "lower"),
    "forget_extraction_strength": ("Extraction strength, forget", "lower"),
    "forget_quality": ("Forget quality (p-value, against the retrained model)", "higher"),
    "forget_probability_quality": ("KS test on probabilities (p-value, against the retrained model)", "higher"),
    "mia_min_k": ("Membership AUC (Min-K%, against holdout rows)", "nearer to 0.5"),
    "priv_leak": ("PrivLeak, %", "nearer to 0"),
    "retain_probability": ("Probability of retain answers", "higher"),
    "retain_rouge_l": ("ROUGE-L of the answers to retain questions", "higher"),
    "retain_kl": ("KL from the reference on retain rows, nats a token", "lower"),
    "model_utility": ("Model utility", "higher"),
    "general_ability": ("General ability, a ratio to the reference", "higher"),
    "unlearning_depth": ("Unlearning depth (UDS, 1: as the retrained model)", "higher"),
}

LEAK_AT = re.compile(rf"leak_at_(\d+)_by_({'|'.join(CRITERIA)})")
FROM_EVALUATION = ("general_ability", "unlearning_depth")  # metrics that the sweep may lack, and an evaluation has


def shown(value: Any) -> str:
    """A number as text: 4 decimals, or 3 digits when small or large; a dash when there is none."""
    value = number(value)
    if math.isnan(value):
        return "–"
    if 0 < abs(value) < 0.1:
        return f"{value:#.3g}"
    return f"{value:.4f}" if 0.1 <= abs(value) < 10 else f"{value:.3g}"


def adapter_at(inputs: Inputs, record: dict[str, Any]) -> float:
    """The alpha or scale of the adapter that a record of attacks or of an evaluation is of, NaN when it is not known.

    NaN also for the trained adapter of a method with alpha, θ_ref + ΔW, with which the model forgets nothing.
    """
    adapter = record.get("adapter") or {}
    made_by = adapter.get("made_by")
    if not isinstance(made_by, dict) or (made_by.get("kind") == "trained" and made_by.get("alpha") is not None):
        return math.nan
    scale = number(adapter.get("scale", adapter.get("strength")))  # loramox 0.1 called both strength
    if inputs.unit == "alpha":
        return number(made_by.get("alpha", made_by.get("strength"))) * scale
    shipped = made_by.get("scale")  # folded in; absent where it is 1
    return (1.0 if shipped is None else number(shipped)) * scale


def metrics(inputs: Inputs) -> dict[str, dict[str, float]]:
    """The metrics of the table that the forget model has, by model; NaN where another has none."""
    theirs = {name: m.value for name, m in summarise(inputs.records.get(RETRAINED, ())).metrics.items()}
    evaluated = {
        name: found["value"] for name in FROM_EVALUATION if "value" in (found := evaluated_metric(inputs, name))
    }
    models = {REFERENCE: inputs.point(0.0), FORGET: inputs.point(inputs.at) | evaluated, RETRAINED: theirs}
    found = {name: {model: number(held.get(name)) for model, held in models.items()} for name in METRICS}
    return {name: by_model for name, by_model in found.items() if not math.isnan(by_model[FORGET])}


def evaluated_metric(inputs: Inputs, name: str) -> dict[str, Any]:
    """A metric of the evaluation in the run's folder, if that is of the forget model that is shown."""
    same = inputs.at is not None and same_value(adapter_at(inputs, inputs.evaluation), inputs.at)
    return inputs.evaluation["metrics"].get(name, {}) if same else {}


def metric_rows(inputs: Inputs) -> list[list[str]]:
    return [
        [METRICS[name][0], *map(shown, by_model.values()), METRICS[name][1]]
        for name, by_model in metrics(inputs).items()
    ]


def choices(inputs: Inputs) -> list[list[str]]:
    rows = []
    for c in inputs.frontier.get("choices", ()):
        name = f"{c['rule']} (used)" if c["rule"] == inputs.frontier.get("rule") else c["rule"]
        at = "refuses" if c["at"] is None else f"{number(c['at']):g}"
        low, high = number(c.get("low")), number(c.get("high"))
        rows.append([name, at, "–" if math.isnan(low) else f"{low:g} to {high:g}", str(c["reason"])])
    return rows


def spreads(inputs: Inputs, part: str) -> dict[str, np.ndarray]:
    """Per-row probabilities of a part, by model."""
    by_model = {model: of_part(records, part) for model, records in inputs.records.items()}
    return {model: by_model[model] for model in (REFERENCE, FORGET, RETRAINED) if len(by_model.get(model, ()))}


def of_part(records: Sequence[Record], part: str) -> np.ndarray:
    found = values([r for r in records if r["part"] == part], "probability")
    return found[np.isfinite(found)]


def mean(records: Sequence[Record], part: str) -> float:
    found = of_part(records, part)
    return float(found.mean()) if len(found) else math.nan


def relearned(inputs: Inputs) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """Steps and probabilities of the relearning attacks: rows trained on → model → curve.

    Of several attacks on the same rows, at other rates or with all weights, the one after which the forget model has most.
    """
    attacks: dict[str, dict[str, dict[int, float]]] = {}
    for (attack, model), curve in relearn.curves(inputs.attacks.get("states", ())).items():
        finite = {step: p for step, held in curve.items() if not math.isnan(p := number(held))}
        if finite and model in ("", inputs.control):
            attacks.setdefault(attack, {})[model or FORGET] = finite
    worst: dict[str, dict[str, dict[int, float]]] = {}
    for attack, curves in sorted(attacks.items(), key=lambda each: max(each[1].get(FORGET, {}).values(), default=0)):
        worst[attack.removeprefix("relearn ").partition(",")[0]] = curves
    return {
        rows: {model: (sorted(curve), [curve[step] for step in sorted(curve)]) for model, curve in curves.items()}
        for rows, curves in worst.items()
        if FORGET in curves
    }


def leak_curves(inputs: Inputs) -> dict[str, dict[str, list[dict[str, float]]]]:
    """leak@k of sampled answers: criterion → model → `value` with the ends of its interval, `low` and `high`, by `k`."""
    curves: dict[str, dict[str, list[dict[str, float]]]] = {}
    for state in inputs.attacks.get("states", ()):
        model = str(state["state"])
        if state["attack"] != "sample" or model not in (FORGET, inputs.control):
            continue
        for name, held in state["metrics"].items():
            found, value = LEAK_AT.fullmatch(name), number(held)
            if found and not math.isnan(value):
                ends = (state.get("intervals") or {}).get(name)
                low, high = map(number, ends if isinstance(ends, list) and len(ends) == 2 else (None, None))
                curve = curves.setdefault(found[2], {}).setdefault(model, [])
                curve.append({"k": int(found[1]), "value": value, "low": low, "high": high})
    for models in curves.values():
        for curve in models.values():
            curve.sort(key=lambda each: each["k"])
    return curves


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


def settings(inputs: Inputs) -> list[tuple[str, str]]:
    """All settings; what might be a secret is left out."""
    held = inputs.run["settings"].items()
    return [
        (name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for name, value in sorted(held)
        if value is not None and not name.endswith("token")
    ]
