"""Which strengths a sweep measures, and which one each rule chooses: from records, without a model."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from loramox.evaluate import membership
from loramox.evaluate.measure import Record
from loramox.evaluate.summary import values
from loramox.evaluate.truth_ratio import forget_quality, probability_quality
from loramox.sweep.frontier import beside, next_strength
from loramox.sweep.rules import Choice, like_holdout, like_retrained, refusal, within_budget
from loramox.train.diagnostics import STILL_RIGHT

Measured = dict[float, list[Record]]  # the records at each strength, in order; the reference's at 0


def search(
    measured: Measured, measure: Callable[[float], list[Record]], more: int, prefer: Callable[[Measured], float]
) -> Measured:
    """`measured`, and the records at up to `more` strengths, each the one that `prefer` names after those before it."""
    for _ in range(more):
        strength = float(f"{prefer(measured):.3g}")
        if strength in measured:
            break
        measured = dict(sorted({**measured, strength: measure(strength)}.items()))
    return measured


def next_for(rule: str, measured: Measured, retrained: Sequence[Record], budget: float, ceiling: float) -> float:
    """Where the rule's choice may lie: beside what comes nearest to it or, for the budget, where retain falls below it; beyond
    the last that was measured, where forget rows still have most of their tokens at it and retain is within the budget.

    Where that says nothing, or lies above the budget's ceiling, where the frontier bends.
    """
    strengths, ceiling = list(measured), _lifted(ceiling, measured)
    if rule != "budget":
        choices = choose(measured, retrained, budget, ceiling)
        if nearest := next((choice.nearest for choice in choices if choice.rule == rule), None):
            return beside(strengths, nearest)
    forget, retain = ([mean(records, part) for records in measured.values()] for part in ("forget", "retain"))
    floor = (1 - budget) * retain[0] if rule == "budget" else None
    last = strengths[-1]
    if floor is not None and retain[-1] >= floor and last < ceiling and _mostly_right(measured, last):
        return min(ceiling, beside(strengths, last))
    strength = next_strength(strengths, forget, retain, floor)
    return strength if strength <= ceiling else next_strength(strengths, forget, retain)


def choose(measured: Measured, retrained: Sequence[Record], budget: float, ceiling: float = math.inf) -> list[Choice]:
    """What each rule says, those that have what they need. `measured` has the reference at 0; the ceiling is the budget's."""
    strengths = [s for s in measured if s > 0]

    def table(part: str, name: str, at: Sequence[float]) -> np.ndarray:
        return np.array([scores(measured[s], part, name) for s in at])

    def finite(name: str, *parts: str) -> list[float]:
        """The strengths at which no row overflowed, as rows do at one far too high."""
        return [s for s in strengths if all(np.isfinite(scores(measured[s], part, name)).all() for part in parts)]

    reference, lifted = scores(measured[0.0], "retain", "probability"), _lifted(ceiling, measured)
    choices = [within_budget(strengths, table("retain", "probability", strengths), reference, budget, lifted)]
    if lifted > ceiling:
        right = f"; {ceiling:g}, which was trained for, leaves most of the tokens right that were"
        choices[0] = choices[0]._replace(reason=choices[0].reason + right)
    if len(scores(measured[0.0], "holdout", "mia_min_k")):
        at = finite("mia_min_k", "forget", "holdout")
        both = (table(part, "mia_min_k", at) for part in ("forget", "holdout"))
        choices.append(like_holdout(at, *both, membership.auc))
    theirs = scores(retrained, "forget", "truth_ratio")
    if len(retrained) and not len(theirs):
        choices.append(
            refusal(
                "retrained",
                "these forget rows have no wrong answers (perturbed_answer), and without them no truth ratios",
            )
        )
    if len(theirs) and len(theirs) == len(scores(measured[0.0], "forget", "truth_ratio")):
        at = finite("truth_ratio", "forget")
        knows = scores(measured[0.0], "forget", "truth_ratio")
        choice = like_retrained(at, table("forget", "truth_ratio", at), theirs, forget_quality, knows)
        choices.append(_with_the_other_test(choice, measured, retrained))
    return [choices[0], *(_with_its_cost(choice, measured) for choice in choices[1:])]


def _lifted(ceiling: float, measured: Measured) -> float:
    """The budget's ceiling; none where at it forget rows still have most of the tokens that the reference gets right.

    Their probability is no ground for a ceiling then: few tokens, very improbable ones, are all that it has fallen by.
    """
    return math.inf if _mostly_right(measured, ceiling) else ceiling


def _mostly_right(measured: Measured, strength: float) -> bool:
    right = [scores(measured.get(s, []), "forget", "exact_memorization") for s in (0.0, strength)]
    return all(map(len, right)) and bool(right[1].mean() > STILL_RIGHT * right[0].mean())


def _with_the_other_test(choice: Choice, measured: Measured, retrained: Sequence[Record]) -> Choice:
    """Whether the answers are as probable as the retrained model has them, said with the reason: truth ratios do not see that."""
    if choice.strength is None:
        return choice
    log_p = [scores(records, "forget", "log_p") for records in (measured[choice.strength], retrained)]
    if not all(len(each) and np.isfinite(each).all() for each in log_p):
        return choice
    p_value = probability_quality(*log_p)
    return choice._replace(reason=f"{choice.reason}; of the answers' probabilities it is {p_value:.2g}")


def _with_its_cost(choice: Choice, measured: Measured) -> Choice:
    """What the retain rows keep at a strength that was chosen by the forget rows alone, said with the reason."""
    if choice.strength is None:
        return choice
    kept, before = (mean(measured[s], "retain") for s in (choice.strength, 0.0))
    return choice._replace(
        reason=f"{choice.reason}; retain probability there is {kept:.4f}, the reference's {before:.4f}"
    )


def scores(records: Sequence[Record], part: str, name: str) -> np.ndarray:
    """A part's rows' values of a score, where they have it, [rows]."""
    return values([r for r in records if r["part"] == part], name)


def mean(records: Sequence[Record], part: str) -> float:
    """The mean probability of a part's true answers."""
    return float(values([r for r in records if r["part"] == part], "probability").mean())
