"""Which points a sweep measures, and which one each rule chooses: from records, without a model."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from loramox.evaluate import membership
from loramox.evaluate.measure import Record
from loramox.evaluate.summary import values
from loramox.evaluate.truth_ratio import forget_quality, probability_quality
from loramox.sweep.frontier import Axis, beside, next_value
from loramox.sweep.rules import Choice, like_holdout, like_retrained, within_budget
from loramox.train.diagnostics import STILL_RIGHT

Measured = dict[float, list[Record]]  # the records at each value of the axis, ascending; the reference's at 0

WITHOUT_RATIOS = "probabilities (without wrong answers there are no truth ratios)"


def search(
    measured: Measured, measure: Callable[[float], list[Record]], more: int, prefer: Callable[[Measured], float]
) -> Measured:
    """`measured`, and the records at up to `more` values, each the one that `prefer` names after those before it."""
    for _ in range(more):
        at = float(f"{prefer(measured):.3g}")
        if at in measured:
            break
        measured = dict(sorted({**measured, at: measure(at)}.items()))
    return measured


def next_for(rule: str, measured: Measured, retrained: Sequence[Record], budget: float, axis: Axis) -> float:
    """Where the rule's choice may lie: beside the nearest so far or, for the budget, where retain falls below it; beyond the
    last that was measured, where forget rows still have most of their tokens at it and retain is within the budget.

    Where that tells nothing, or lies above the budget's ceiling, where the frontier bends.
    """
    at, axis = list(measured), _lifted(axis, measured)
    if rule != "budget":
        choices = choose(measured, retrained, budget, axis)
        if nearest := next((choice.nearest for choice in choices if choice.rule == rule), None):
            return beside(at, nearest)
    forget, retain = ([mean(records, part) for records in measured.values()] for part in ("forget", "retain"))
    floor = (1 - budget) * retain[0] if rule == "budget" else None
    last = at[-1]
    if floor is not None and retain[-1] >= floor and last < axis.ceiling and _mostly_right(measured, last):
        return min(axis.ceiling, beside(at, last))
    found = next_value(at, forget, retain, floor)
    return found if found <= axis.ceiling else next_value(at, forget, retain)


def choose(measured: Measured, retrained: Sequence[Record], budget: float, axis: Axis) -> list[Choice]:
    """The choice of each rule that has what it needs. `measured` has the reference at 0."""
    at = [value for value in measured if value > 0]

    def table(part: str, name: str, some: Sequence[float]) -> np.ndarray:
        return np.array([scores(measured[value], part, name) for value in some])

    def finite(name: str, *parts: str) -> list[float]:
        """The values at which no row overflowed, as rows do at one far too high."""
        return [v for v in at if all(np.isfinite(scores(measured[v], part, name)).all() for part in parts)]

    reference, lifted = scores(measured[0.0], "retain", "probability"), _lifted(axis, measured)
    choices = [within_budget(at, table("retain", "probability", at), reference, budget, lifted)]
    if lifted.ceiling > axis.ceiling:
        right = (
            f"; at {axis.ceiling:g}, the value trained for, most tokens that the reference gets right are still right"
        )
        choices[0] = choices[0]._replace(reason=choices[0].reason + right)
    if len(scores(measured[0.0], "holdout", "mia_min_k")):
        some = finite("mia_min_k", "forget", "holdout")
        forget, holdout = (table(part, "mia_min_k", some) for part in ("forget", "holdout"))
        choices.append(like_holdout(some, forget, holdout, membership.auc, axis))
    for name, p_value, test in (
        ("truth_ratio", forget_quality, "truth ratios"),
        ("log_p", probability_quality, WITHOUT_RATIOS),
    ):
        knows, never_knew = (scores(records, "forget", name) for records in (measured[0.0], retrained))
        if len(never_knew) and len(never_knew) == len(knows):
            some = finite(name, "forget")
            choice = like_retrained(some, table("forget", name, some), never_knew, p_value, axis, knows, test)
            choices.append(_with_the_other_test(choice, measured, retrained) if name == "truth_ratio" else choice)
            break
    return [choices[0], *(_with_its_cost(choice, measured) for choice in choices[1:])]


def _lifted(axis: Axis, measured: Measured) -> Axis:
    """The axis without a ceiling where at it forget rows still have most of the tokens that the reference gets right.

    Their probability is no ground for a ceiling then: it fell by few, very improbable tokens.
    """
    return axis._replace(ceiling=math.inf) if _mostly_right(measured, axis.ceiling) else axis


def _mostly_right(measured: Measured, at: float) -> bool:
    right = [scores(measured.get(value, []), "forget", "exact_memorization") for value in (0.0, at)]
    return all(map(len, right)) and bool(right[1].mean() > STILL_RIGHT * right[0].mean())


def _with_the_other_test(choice: Choice, measured: Measured, retrained: Sequence[Record]) -> Choice:
    """The test on probabilities beside the one on truth ratios, which does not see how probable the answers are."""
    if choice.at is None:
        return choice
    log_p = [scores(records, "forget", "log_p") for records in (measured[choice.at], retrained)]
    if not all(len(each) and np.isfinite(each).all() for each in log_p):
        return choice
    return choice._replace(
        reason=f"{choice.reason}; by the test on probabilities p = {probability_quality(*log_p):.2g}"
    )


def _with_its_cost(choice: Choice, measured: Measured) -> Choice:
    """Adds to the reason what the retain rows keep at a value that was chosen by the forget rows alone."""
    if choice.at is None:
        return choice
    kept, before = (mean(measured[value], "retain") for value in (choice.at, 0.0))
    return choice._replace(
        reason=f"{choice.reason}; retain probability there is {kept:.4f}, the reference's {before:.4f}"
    )


def scores(records: Sequence[Record], part: str, name: str) -> np.ndarray:
    """A part's rows' values of a score, where they have it, [rows]."""
    return values([r for r in records if r["part"] == part], name)


def mean(records: Sequence[Record], part: str) -> float:
    """The mean probability of a part's true answers."""
    return float(values([r for r in records if r["part"] == part], "probability").mean())
