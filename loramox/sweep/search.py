"""The points that a sweep measures, and the choice of each rule: from records, without a model."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from loramox.data.fluency import leaked
from loramox.evaluate.measure import Record
from loramox.evaluate.summary import values
from loramox.sweep.frontier import FORGOTTEN, Axis, beside, next_value, three_digits
from loramox.sweep.rules import (
    TARGETED,
    Choice,
    Target,
    allowance,
    just_enough,
    like_holdout,
    like_retrained,
    within_budget,
)
from loramox.train.diagnostics import STILL_RIGHT

Measured = dict[float, list[Record]]  # the records at each value of the axis, ascending; the reference's at 0

WITHOUT_RATIOS = "probabilities (without wrong answers there are no truth ratios)"
STILL_KNOWN = "most tokens that the reference gets right are still right, or more than half of the probability is left"


def search(
    measured: Measured, measure: Callable[[float], list[Record]], more: int, prefer: Callable[[Measured], float]
) -> Measured:
    """`measured`, and the records at up to `more` values, each the one that `prefer` names after those before it."""
    for _ in range(more):
        at = prefer(measured)
        if at in measured:
            break
        measured = dict(sorted({**measured, at: measure(at)}.items()))
    return measured


def next_for(
    rule: str,
    measured: Measured,
    retrained: Sequence[Record],
    budget: float,
    axis: Axis,
    forget_to: float | None = None,
) -> float:
    """Where the rule's choice may lie: beside the nearest so far; for the budget where retain falls below it, or beyond the last
    that was measured, where at it forget rows are still known and retain is within the budget; for a target below the smallest
    that meets it.

    Where that tells nothing, or lies above the budget's ceiling, where the frontier bends.
    """
    at, axis = list(measured), _lifted(axis, measured)
    forget, retain = ([mean(records, part) for records in measured.values()] for part in ("forget", "retain"))
    if rule != "budget":
        choices = choose(measured, retrained, budget, axis, forget_to)
        choice = next((choice for choice in choices if choice.rule == rule), None)
        if choice and choice.at and rule == "forget_to":
            return three_digits((at[at.index(choice.at) - 1] + choice.at) / 2)
        return beside(at, choice.nearest) if choice and choice.nearest else next_value(at, forget, retain)
    floor = retain[0] - allowance(scores(measured[0.0], "retain", "probability"), budget)
    last = at[-1]
    if retain[-1] >= floor and last < axis.ceiling and _still_known(measured, last):
        return min(axis.ceiling, beside(at, last))
    found = next_value(at, forget, retain, floor)
    return found if found <= axis.ceiling else next_value(at, forget, retain)


def choose(
    measured: Measured, retrained: Sequence[Record], budget: float, axis: Axis, forget_to: float | None = None
) -> list[Choice]:
    """The choice of each rule that has what it needs. `measured` has the reference at 0."""
    points = [at for at in measured if at > 0]

    def table(part: str, name: str, some: Sequence[float]) -> np.ndarray:
        return np.array([scores(measured[at], part, name) for at in some])

    def finite(name: str, *parts: str) -> list[Any]:
        """The values at which no row overflowed, as rows do at one far too high; then each part's scores at these."""
        some = [at for at in points if all(np.isfinite(scores(measured[at], part, name)).all() for part in parts)]
        return [some, *(table(part, name, some) for part in parts)]

    retain, forget = (table(part, "probability", points) for part in ("retain", "forget"))
    reference, known = (scores(measured[0.0], part, "probability") for part in ("retain", "forget"))
    lifted = _lifted(axis, measured)
    choices = [within_budget(points, retain, reference, budget, lifted, forget, known)]
    if lifted.ceiling > axis.ceiling:
        choices[0] = choices[0].adding(f"at {axis.ceiling:g}, the value trained for, {STILL_KNOWN}")
    if len(scores(measured[0.0], "holdout", "mia_min_k")):
        some, forget, holdout = finite("mia_min_k", "forget", "holdout")
        choices.append(like_holdout(some, forget, holdout, axis))
    for name, test in (("truth_ratio", "truth ratios"), ("log_p", WITHOUT_RATIOS)):
        knows, never_knew = (scores(records, "forget", name) for records in (measured[0.0], retrained))
        if len(never_knew) and len(never_knew) == len(knows):
            some, forget = finite(name, "forget")
            choices.append(like_retrained(some, forget, never_knew, axis, knows, test))
            break
    # By their text only if both sides have generated answers: by tokens, another share of rows is answered right.
    sides = [measured[0.0], *([retrained] if retrained and forget_to is None else [])]
    by_text = all(any("said" in record for record in side) for side in sides)
    if target := _target(measured, retrained, forget_to, by_text):
        some, forget = finite("probability", "forget")
        right = np.array([answered_right(measured[at], by_text=by_text) for at in some])
        found = {"probability": forget, "right": right}
        if all(late_of(measured[at]).size for at in some):
            found["late_probability"] = np.array([late_of(measured[at]) for at in some])
        choices.append(just_enough(some, {name: rows for name, rows in found.items() if rows.size}, target, axis))
    return [choices[0], *(_with_its_cost(choice, measured) for choice in choices[1:])]


def _lifted(axis: Axis, measured: Measured) -> Axis:
    """The axis without a ceiling where at it forget rows are still known."""
    return axis._replace(ceiling=math.inf) if _still_known(measured, axis.ceiling) else axis


def _still_known(measured: Measured, at: float) -> bool:
    """Whether forget rows keep half of the reference's probability, or most of the tokens that it gets right.

    In the second case it may be few, very improbable tokens that make the answers improbable.
    """
    for name, share in (("probability", FORGOTTEN), ("exact_memorization", STILL_RIGHT)):
        before, now = (scores(measured.get(value, []), "forget", name) for value in (0.0, at))
        if len(before) and len(now) and now.mean() > share * before.mean():
            return True
    return False


def _target(measured: Measured, retrained: Sequence[Record], forget_to: float | None, by_text: bool) -> Target | None:
    """How little is to be left: as asked, else as in the retrained model, else as of rows never seen; None without any."""
    if forget_to is not None:
        return Target(dict.fromkeys(TARGETED, forget_to), "asked (--forget_to)")
    holdout = [record for record in measured[0.0] if record["part"] == "holdout"]
    for records, part, like in (
        (retrained, "forget", "in the retrained model"),
        (holdout, "holdout", "the reference knows holdout rows"),
    ):
        found = {"probability": scores(records, part, "probability"), "late_probability": late_of(records, part)}
        found["right"] = answered_right(records, part, by_text)
        if len(found["probability"]):
            return Target({name: float(rows.mean()) for name, rows in found.items() if len(rows)}, like)
    return None


def late_of(records: Sequence[Record], part: str = "forget") -> np.ndarray:
    """The probability of each answer's second half, [rows]; of the whole where that is one token. Empty for records of before it
    was measured."""
    some = [record for record in records if record["part"] == part]
    known = any("late_probability" in record for record in some)
    return np.array([record.get("late_probability", record["probability"]) for record in some] if known else [])


def answered_right(records: Sequence[Record], part: str = "forget", by_text: bool = True) -> np.ndarray:
    """Whether greedy decoding answers each row right, 0 or 1, [rows]: the answer has all key words of a true one or, where none
    was generated or it is not judged `by_text`, every token of the true one is the first choice. Empty where nothing tells."""
    some = [record for record in records if record["part"] == part]

    def right(record: Record) -> bool:
        if by_text and "said" in record:
            answers = (record["answer"], *record.get("other_answers", ()))
            return any(leaked(record["said"], each, record["prompt"]) == 1 for each in answers)
        # The last block of a text may be one token, which has no exact memorization; above a half it is the first choice.
        return record.get("exact_memorization", record["probability"] > 0.5) == 1

    told = any("exact_memorization" in record or (by_text and "said" in record) for record in some)
    return np.array([right(record) for record in some] if told else [], dtype=float)


def _with_its_cost(choice: Choice, measured: Measured) -> Choice:
    """Adds to the reason what the retain rows keep at a value that was chosen by the forget rows alone."""
    if choice.at is None:
        return choice
    kept, before = (mean(measured[value], "retain") for value in (choice.at, 0.0))
    return choice.adding(f"retain probability there is {kept:.4f}, the reference's {before:.4f}")


def scores(records: Sequence[Record], part: str, name: str) -> np.ndarray:
    return values([r for r in records if r["part"] == part], name)


def mean(records: Sequence[Record], part: str) -> float:
    """The mean probability of a part's true answers."""
    return float(scores(records, part, "probability").mean())
