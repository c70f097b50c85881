"""Rules that choose a point of a frontier, each with its uncertainty over rows, or with the reason for choosing none."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from loramox.evaluate.bootstrap import resampled
from loramox.evaluate.equivalence import distance
from loramox.evaluate.membership import auc
from loramox.evaluate.truth_ratio import forget_quality
from loramox.sweep.frontier import FORGOTTEN, Axis

RESAMPLES = 200  # a membership AUC of each value is taken for every one
LEVEL = 0.05  # two sets of rows cannot be told apart when a test's p-value, or an interval's error, is above it

Rows = np.ndarray  # [points, rows], or [rows]


class Choice(NamedTuple):
    rule: str
    at: float | None  # alpha or scale; None: it refuses
    low: float | None  # 5 % and 95 % of the choices on resampled rows
    high: float | None
    reason: str  # why this one, or why none
    nearest: float | None = None  # `at`, or where the rule refuses, the value that comes nearest

    def adding(self, reason: str) -> "Choice":
        return self._replace(reason=f"{self.reason}; {reason}")


def allowance(reference: Rows, budget: float) -> float:
    """How much mean probability retain rows may lose: a share `budget` of the reference's, or what its own mean loses at the 5 %
    quantile of resampled rows, where that is more. A smaller loss cannot be told from the choice of the rows.
    """
    means = resampled(lambda rows: float(reference[rows].mean()), len(reference), samples=RESAMPLES)
    return float(max(budget * reference.mean(), reference.mean() - np.quantile(means, LEVEL)))


def within_budget(
    values: Sequence[float], retain: Rows, reference: Rows, budget: float, axis: Axis, forget: Rows, known: Rows
) -> Choice:
    """The largest value, up to the axis' ceiling, that forgets and at which retain rows lose at most their `allowance`.

    A value forgets where forget rows have at most half of the reference's probability. If none that forgets keeps the retain
    rows, the tie-break is the one that costs them least. If none forgets, the rule refuses.

    The ceiling is for methods that train the model that ships: beyond the value trained for, forget rows fall further than in a
    model that never knew them. Values above it count only where none below it was measured. Smaller ones may keep less: retain
    rows are held at the value that was trained for, and at no other.

    `values` ascend. `retain` and `forget` are probabilities at each, [values, rows]; `reference` and `known` the reference's.
    """
    below = sum(value <= axis.ceiling for value in values)
    if 0 < below < len(values):
        values, retain, forget = values[:below], retain[:below], forget[:below]
    allowed = allowance(reference, budget)

    def pick(rows: np.ndarray, others: np.ndarray) -> int | None:
        left = retain[:, rows].mean(1)
        forgets = np.isfinite(left) & (forget[:, others].mean(1) <= FORGOTTEN * known[others].mean())
        both = np.flatnonzero(forgets & (left >= reference[rows].mean() - allowed))
        return int(both[-1]) if len(both) else int(np.where(forgets, left, -1).argmax()) if forgets.any() else None

    sizes = retain.shape[1], forget.shape[1]
    at = pick(*map(np.arange, sizes))
    if at is None:
        means = np.nan_to_num(forget.mean(1), nan=math.inf)
        least = int(means.argmin())
        return refusal(
            "budget",
            f"at no {axis.unit} measured are the forget rows forgotten: nearest is {values[least]:g}, where their answers keep {means[least]:.2g} of "
            f"the reference's {known.mean():.2g}, more than half. Train longer (--num_train_epochs), or measure other values ({axis.flag})",
            float(values[least]) if math.isfinite(means[least]) else None,
        )
    left, before = retain[at].mean(), reference.mean()
    within = f"within {100 * budget:.3g} % of the reference's {before:.4f}"
    if allowed > budget * before:
        within = (
            f"within {allowed:.2g} of the reference's {before:.4f}, as much as the reference itself loses on resampled rows, which is "
            f"more than {100 * budget:.3g} %"
        )
    if left < before - allowed:
        reason = (
            f"no {axis.unit} measured both forgets and keeps retain probability {within}. Of those that forget, this one costs retain rows least: "
            f"{left:.4f} is left. Train again with more retain rows or a higher --retain_weight, or measure other values ({axis.flag})"
        )
    else:
        reason = f"the largest measured at which retain probability, {left:.4f}, is {within}{_beyond(values, at, axis)}"
    return _bootstrapped("budget", values, at, pick, sizes, reason)


def _beyond(values: Sequence[float], at: int, axis: Axis) -> str:
    """Why no value above `at` was chosen for the budget."""
    if at + 1 < len(values):
        return f"; {values[at + 1]:g} costs more"
    if axis.ceiling < math.inf:
        return f"; beyond {axis.ceiling:g}, the value trained for, forget rows would fall further than intended"
    return f", and no larger one was measured ({axis.flag})"


class Target(NamedTuple):
    """How little of the forget rows is to be left."""

    most: dict[str, float]  # score → the most that its mean over the forget rows may be
    like: str  # where it is from, for the reason


# Scores of a target, and how the reason has them: probability of the true answer; that of its second half, given the first;
# whether greedy decoding gives it, 0 or 1.
TARGETED = {
    "probability": "probability {:.2g}",
    "late_probability": "of second halves {:.2g}",
    "right": "{:.0%} answered right by greedy decoding",
}


def just_enough(values: Sequence[float], forget: dict[str, Rows], target: Target, axis: Axis) -> Choice:
    """The smallest value that meets the target. `forget`: some of the scores of `TARGETED`, each [values, rows]."""
    judged = [name for name in TARGETED if name in forget and name in target.most]

    def pick(rows: np.ndarray) -> int | None:
        met = np.all([forget[name][:, rows].mean(1) <= target.most[name] for name in judged], axis=0)
        return int(met.argmax()) if met.any() else None

    if not len(values):
        return refusal("forget_to", _nothing(axis))

    def scores(place: int) -> str:
        return ", ".join(TARGETED[name].format(forget[name][place].mean()) for name in judged)

    limit = ", ".join(TARGETED[name].format(target.most[name]) for name in judged)
    if "late_probability" not in judged:
        limit += "; second halves are not judged, since some records are of before they were scored"
    rows = forget["probability"].shape[1]
    at = pick(np.arange(rows))
    if at is None:
        least = int(np.max([forget[name].mean(1) / max(target.most[name], 1e-9) for name in judged], axis=0).argmin())
        return refusal(
            "forget_to",
            f"no {axis.unit} measured forgets as much as {target.like} ({limit}): nearest is {values[least]:g} "
            f"({scores(least)}). Train longer (--num_train_epochs), or measure larger values ({axis.flag})",
            float(values[least]),
        )
    reason = f"the smallest measured that forgets as much as {target.like} ({limit}): {scores(at)}"
    return _bootstrapped("forget_to", values, at, pick, (rows,), reason)


def like_holdout(values: Sequence[float], forget: Rows, holdout: Rows, axis: Axis) -> Choice:
    """The value at which forget rows look most like rows never seen: membership AUC nearest 0.5, from either side. `forget` and
    `holdout` are membership scores at each of `values`, [values, rows].
    """

    def areas(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
        return np.array([auc(f[rows], h[others]) for f, h in zip(forget, holdout, strict=True)])

    def pick(rows: np.ndarray, others: np.ndarray) -> int:
        found = areas(rows, others)
        equal = np.flatnonzero(np.abs(found - 0.5) == np.abs(found - 0.5).min())
        # Where none differs from another, as at an AUC of 1, the largest is nearest.
        return int(equal[-1] if found[equal[-1]] > 0.5 else equal[0])

    if not len(values):
        return refusal("holdout", _nothing(axis))
    n, m = forget.shape[1], holdout.shape[1]
    whole = np.arange(n), np.arange(m)
    every, at = areas(*whole), pick(*whole)
    # Of an AUC of two samples that are alike (Hanley & McNeil, 1982).
    error = 1.96 * np.sqrt((n + m + 1) / (12 * n * m))
    if abs(every[at] - 0.5) > error:
        side = "still look trained on" if every[at] > 0.5 else "look stranger than rows never seen"
        return refusal(
            "holdout",
            f"no {axis.unit} makes forget rows look like holdout rows: nearest is {values[at]:g}, where they {side} (AUC "
            f"{every[at]:.3f}; 0.5 ± {error:.3f} is alike). Measure other values ({axis.flag})",
            float(values[at]),
        )
    return _bootstrapped("holdout", values, at, pick, (n, m), f"membership AUC {every[at]:.3f} is nearest 0.5")


def like_retrained(
    values: Sequence[float],
    forget: Rows,
    retrained: Rows,
    axis: Axis,
    reference: Rows | None = None,
    test: str = "truth ratios",
) -> Choice:
    """The value whose forget rows are distributed most like the retrained model's, which never saw them.

    It is chosen on every second row, and the test of the other rows is reported: the best of many p-values is too high on the
    rows on which it is the best. With the `reference`'s scores, the rule refuses when the test cannot tell even this model, which
    knows every row, from the retrained one.
    """

    chosen_on, tested_on = np.arange(len(retrained))[::2], np.arange(len(retrained))[1::2]

    def pick(some: np.ndarray) -> int:
        rows = chosen_on[some]
        # For equally many rows, the greatest p-value is that of the smallest D, which is far quicker to compute.
        found = np.array([distance(at[rows], retrained[rows]) for at in forget])
        equal = np.flatnonzero(np.isclose(found, found.min()))  # several where no two samples overlap
        apart = np.abs(np.median(forget[equal][:, rows], axis=1) - np.median(retrained[rows]))
        return int(equal[apart.argmin()])

    if not len(values):
        return refusal("retrained", _nothing(axis))

    def tested(scores: Rows) -> float:
        return forget_quality(scores[tested_on], retrained[tested_on]) if len(tested_on) else 1.0

    if reference is not None and (p := tested(reference)) >= LEVEL:
        return refusal(
            "retrained",
            f"on half of these {len(retrained)} rows the test on {test} cannot tell even the reference model from the retrained one (KS p = "
            f"{p:.2g}), so it can choose nothing. Give more forget rows",
        )
    at = pick(np.arange(len(chosen_on)))
    quality = tested(forget[at])
    if quality < LEVEL:
        return refusal(
            "retrained",
            f"no {axis.unit} makes forget rows look like the retrained model's: nearest is {values[at]:g} (KS p of {test} = {quality:.2g}, "
            f"n = {len(tested_on)}; {LEVEL} or more cannot be told apart). Measure other values ({axis.flag}), or train longer",
            float(values[at]),
        )
    reason = f"nearest to the retrained model by the test on {test}, of every second forget row; of the other {len(tested_on)}, KS p = {quality:.2g}"
    return _bootstrapped("retrained", values, at, pick, (len(chosen_on),), reason)


def refusal(rule: str, reason: str, nearest: float | None = None) -> Choice:
    return Choice(rule, None, None, None, reason, nearest)


def _nothing(axis: Axis) -> str:
    return f"at no {axis.unit} are all scores finite. Measure smaller values ({axis.flag})"


def _bootstrapped(
    rule: str,
    values: Sequence[float],
    at: int,
    pick: Callable[..., int | None],
    sizes: tuple[int, ...],
    reason: str,
) -> Choice:
    """The choice `at`, with the interval of it and of choices on rows drawn again, with replacement (seeded), from each set."""

    def value(*rows: np.ndarray) -> float:
        i = pick(*rows)
        return 0.0 if i is None else values[i]

    picked = resampled(value, *sizes, samples=RESAMPLES)
    low, high = np.quantile(picked, [0.05, 0.95], method="nearest")
    chosen = float(values[at])
    return Choice(rule, chosen, min(float(low), chosen), max(float(high), chosen), reason, chosen)
