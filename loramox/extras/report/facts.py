"""The tables and figures of the page, from the files that were read."""

import json
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from loramox.evaluate.measure import Record
from loramox.evaluate.summary import summarise, values
from loramox.extras.report.read import FORGET, REFERENCE, RETRAINED, Inputs, number

LEVEL = 0.05  # above this p-value a test does not tell two models apart
PARTS = ("forget", "retain")
RULES = {
    "budget": "the largest within the budget of retain probability",
    "holdout": "forget rows look like rows never seen",
    "retrained": "like a model that never saw them",
}
# Metric, in words, what is better.
METRICS = {
    "forget_probability": ("Probability of forget answers", "lower"),
    "forget_rouge_l": ("ROUGE-L of the answers to forget questions", "lower"),
    "forget_exact_memorization": ("Exact memorization, forget", "lower"),
    "forget_extraction_strength": ("Extraction strength, forget", "lower"),
    "forget_quality": ("Forget quality (p-value, against the retrained model)", "higher"),
    "forget_probability_quality": ("The same test on answers' probabilities (p-value)", "higher"),
    "mia_min_k": ("Membership AUC (Min-K%, against holdout rows)", "nearer to 0.5"),
    "priv_leak": ("PrivLeak, %", "nearer to 0"),
    "retain_probability": ("Probability of retain answers", "higher"),
    "retain_rouge_l": ("ROUGE-L of the answers to retain questions", "higher"),
    "retain_kl": ("KL from the reference on retain rows, nats a token", "lower"),
    "model_utility": ("Model utility", "higher"),
}
# The settings that matter most; all others are listed after these.
MAIN = (
    "method", "alpha", "model", "quantization", "dtype", "r", "lora_alpha", "target_modules", "num_train_epochs", "learning_rate",
    "per_device_train_batch_size", "gradient_accumulation_steps", "beta", "inner_steps", "inner_lr", "forget_term", "temperature",
    "retain_term", "retain_weight", "kl_at", "momentum", "targeted", "prompt_template", "seed",
)  # fmt: skip


def shown(value: Any) -> str:
    """A number as text: 4 decimals, or 3 digits when small or large; a dash when there is none."""
    value = number(value)
    if math.isnan(value):
        return "–"
    if 0 < abs(value) < 0.1:
        return f"{value:#.3g}"
    return f"{value:.4f}" if 0.1 <= abs(value) < 10 else f"{value:.3g}"


def attacked_at(inputs: Inputs) -> float:
    """The alpha or scale of the model that was attacked, NaN when it is not known."""
    adapter = (inputs.attacks or {}).get("adapter") or {}
    made_by = adapter.get("made_by")
    if not isinstance(made_by, dict):
        return math.nan
    scale = number(adapter.get("scale", adapter.get("strength")))  # loramox 0.1 called both strength
    if inputs.unit == "alpha":
        return number(made_by.get("alpha", made_by.get("strength"))) * scale
    shipped = made_by.get("scale")  # folded in; absent where it is 1
    return (1.0 if shipped is None else number(shipped)) * scale


def attack_rows(inputs: Inputs) -> list[dict[str, Any]]:
    """One row for each state of the forget model, in order, beside the reference in the same state.

    The reference is no attack: it has forgotten nothing. "reference" is its probability where it was scored, else NaN.
    """
    rows: list[dict[str, Any]] = []
    reference: dict[tuple[str, str], float] = {}
    for state in (inputs.attacks or {}).get("states", ()):
        metrics = state["metrics"]
        forget = number(metrics.get("forget_probability"))
        if math.isnan(forget):
            continue
        attack, label = str(state["attack"]), re.sub(r"(^|, )(reference|forget) model$", "", str(state["state"]))
        if str(state["state"]).endswith("reference model"):
            reference[attack, label] = forget
            continue
        if str(state["state"]).endswith("retrained model"):  # the control
            continue
        rows.append(
            {
                "attack": attack,
                "label": label or "before any attack",
                "of": (attack, label),
                "forget": forget,
                "retain": number(metrics.get("retain_probability")),
                "rouge": number(metrics.get("forget_rouge_l")),
                "extraction": number(metrics.get("forget_extraction_strength")),
            }
        )
    own = reference.get(("none", ""), math.nan)  # what the pair of base and adapter is to be compared with
    return [
        row | {"reference": reference.get(row.pop("of"), own if row["attack"] == "pair" else math.nan)} for row in rows
    ]


def metric_rows(inputs: Inputs) -> list[list[str]]:
    """Metric, better, and its value for reference, forget and retrained model; those that one of them has."""
    theirs = summarise(inputs.records.get(RETRAINED, ())).metrics
    models = [inputs.point(0.0), inputs.point(inputs.at), {name: m.value for name, m in theirs.items()}]
    rows = []
    for name, (words, better) in METRICS.items():
        cells = [shown(model.get(name)) for model in models]
        if cells[1] != "–":  # of the forget model
            rows.append([words, *cells, better])
    return rows


def choices(inputs: Inputs) -> list[dict[str, str]]:
    """The choice of each rule with its interval, or why it refused, or what it would need."""
    frontier = inputs.frontier or {"choices": []}
    made = {c["rule"]: c for c in frontier["choices"]}
    rows = []
    for rule in [*RULES, *(r for r in made if r not in RULES)]:
        c = made.get(rule)
        row = {"rule": rule, "what": RULES.get(rule, ""), "at": "not used", "interval": "–"}
        if c:
            low, high = number(c.get("low")), number(c.get("high"))
            row["at"] = "refuses" if c["at"] is None else f"{number(c['at']):g}"
            row["interval"] = "–" if math.isnan(low) else f"{low:g} to {high:g}"
        row["reason"] = str(c["reason"]) if c else lacks(inputs, rule)
        row["used"] = "yes" if rule == frontier.get("rule") else ""
        rows.append(row)
    return rows


def lacks(inputs: Inputs, rule: str) -> str:
    """What a rule would need that the sweep did not have."""
    frontier = inputs.frontier or {}
    if rule == "holdout":
        given = "holdout" in frontier.get("data", {})
        return "gave no score of the holdout rows" if given else "needs holdout rows (--holdout)"
    if rule == "retrained" and not frontier.get("retrained"):
        return "needs a retrained model's records (--retrained)"
    return "was not used by this sweep"


def lacks_truth_ratios(inputs: Inputs) -> str:
    """What the test on truth ratios would need that the sweep did not have."""
    frontier = inputs.frontier or {}
    wanting = []
    if not frontier.get("retrained"):
        wanting.append("a retrained model's records (--retrained)")
    if "forget_truth_ratio" not in inputs.point(0.0):
        wanting.append("wrong answers to the forget rows (column perturbed_answer)")
    elif frontier.get("retrained"):
        wanting.append("wrong answers in the retrained model's records as well (column perturbed_answer)")
    return f"needs {' and '.join(wanting)}"


def points(inputs: Inputs) -> list[dict[str, Any]]:
    frontier = inputs.frontier or {"points": []}
    names = ("forget_probability", "retain_probability", "retain_kl", "forget_quality", "mia_min_k", "priv_leak")
    return [{"at": p["at"], "cells": [shown(p.get(n)) for n in names]} for p in frontier["points"]]


def spreads(inputs: Inputs, part: str) -> dict[str, np.ndarray]:
    """Per-row probabilities of a part, by model."""
    by_model = {model: of_part(records, part) for model, records in inputs.records.items()}
    return {model: by_model[model] for model in (REFERENCE, FORGET, RETRAINED) if len(by_model.get(model, ()))}


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


def mean(records: Sequence[Record], part: str) -> float:
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
    """epoch, forget_loss and retain_kl: the two terms of the loss while training."""
    names = ("epoch", "forget_loss", "retain_kl")
    found = [e for e in inputs.run.get("log", []) if not any(math.isnan(number(e.get(n))) for n in names)]
    return {name: [e[name] for e in found] for name in names}


def settings(inputs: Inputs) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The settings that matter most, and all others; what might be a secret is left out."""
    held = inputs.run["settings"]
    main = [(name, _plain(held[name])) for name in MAIN if held.get(name) is not None]
    rest = [
        (n, _plain(v)) for n, v in sorted(held.items()) if n not in MAIN and v is not None and not n.endswith("token")
    ]
    return main, rest


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
