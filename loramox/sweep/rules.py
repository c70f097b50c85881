"""Rules that choose a point of a frontier, each with its uncertainty over rows, or with a refusal and its reason."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from loramox.sweep.frontier import Axis

RESAMPLES = 200
LEVEL = 0.05  # two sets of rows cannot be told apart when a test's p-value, or an interval's error, is above it

Rows = np.ndarray  # [points, rows], or [rows]


class Choice(NamedTuple):
    """What a rule chooses."""

    rule: str
    at: float | None  # alpha or scale; None: it refuses
    low: float | None  # 5 % and 95 % of the choices on resampled rows
    high: float | None
    reason: str  # why this one, or why none
    nearest: float | None = None  # `at`, or where the rule refuses, the value that comes nearest


def within_budget(values: Sequence[float], retain: Rows, reference: Rows, budget: float, axis: Axis) -> Choice:
    """The largest value, up to the axis' ceiling, at which retain rows lose at most a share `budget` of their mean probability.

    The ceiling is for methods that train the model that ships: beyond the value trained for, forget rows fall further than in a
    model that never knew them. Values above it count only where none below it was measured. Smaller ones may keep less: retain
    rows are held at the value that was trained for, and at no other.

    Args:
        values: alphas or scales, ascending.
        retain: the rows' probabilities at each of them, [values, rows].
        reference: those of the reference model, [rows].
    """

    below = sum(value <= axis.ceiling for value in values)
    if 0 < below < len(values):
        values, retain = values[:below], retain[:below]

    def pick(rows: np.ndarray) -> int | None:
        kept = retain[:, rows].mean(1) >= (1 - budget) * reference[rows].mean()
        return int(np.flatnonzero(kept)[-1]) if kept.any() else None

    at = pick(np.arange(retain.shape[1]))
    floor = (1 - budget) * reference.mean()
    if at is None:
        return refusal(
            "budget",
            f"no {axis.unit} keeps retain probability at {floor:.4f} ({100 * budget:.3g} % below the reference's): at {values[0]:g}, the "
            f"least measured, it is {retain[0].mean():.4f}. Measure smaller values ({axis.flag}), or train again with a higher --retain_weight",
        )
    if at + 1 < len(values):
        beyond = f"; {values[at + 1]:g} costs more"
    elif axis.ceiling < math.inf:
        beyond = f"; beyond {axis.ceiling:g}, the value trained for, forget rows would fall further than intended"
    else:
        beyond = f", and no larger one was measured ({axis.flag})"
    reason = f"the largest measured at which retain probability, {retain[at].mean():.4f}, is within {100 * budget:.3g} % of the reference's {reference.mean():.4f}{beyond}"
    return _bootstrapped("budget", values, at, pick, (retain.shape[1],), reason)


def like_holdout(
    values: Sequence[float], forget: Rows, holdout: Rows, auc: Callable[[Rows, Rows], float], axis: Axis
) -> Choice:
    """The value at which forget rows look most like rows never seen: membership AUC nearest 0.5, from either side.

    `forget` and `holdout` are membership scores at each of `values`, [values, rows]; `auc` takes those of one value.
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
    p_value: Callable[[Rows, Rows], float],
    axis: Axis,
    reference: Rows | None = None,
    test: str = "truth ratios",
) -> Choice:
    """The value whose forget rows are distributed most like the retrained model's, which never saw them.

    Args:
        forget: a score at each of `values`, [values, rows].
        retrained: the retrained model's, [rows].
        p_value: the test of two samples: TOFU's forget quality of truth ratios, or the same of log-probabilities.
        reference: the reference model's scores, [rows]. With them the rule refuses when not even this model, which knows every
            row, can be told from the retrained one.
        test: what the scores are, for the reason.
    """

    def pick(rows: np.ndarray) -> int:
        found = np.array([p_value(at[rows], retrained[rows]) for at in forget])
        equal = np.flatnonzero(found == found.max())  # several where no two samples overlap
        apart = np.abs(np.median(forget[equal][:, rows], axis=1) - np.median(retrained[rows]))
        return int(equal[apart.argmin()])

    if not len(values):
        return refusal("retrained", _nothing(axis))
    if reference is not None and p_value(reference, retrained) >= LEVEL:
        return refusal(
            "retrained",
            f"on these {len(retrained)} rows the test on {test} cannot tell even the reference model from the retrained one (KS p = "
            f"{p_value(reference, retrained):.2g}), so it can choose nothing. Give more forget rows",
        )
    at = pick(np.arange(forget.shape[1]))
    quality = p_value(forget[at], retrained)
    if quality < LEVEL:
        return refusal(
            "retrained",
            f"no {axis.unit} makes forget rows look like the retrained model's: nearest is {values[at]:g} (KS p of {test} = {quality:.2g}, "
            f"n = {forget.shape[1]}; {LEVEL} or more cannot be told apart). Measure other values ({axis.flag}), or train longer",
            float(values[at]),
        )
    reason = f"nearest to the retrained model by the test on {test}, KS p = {quality:.2g}"
    return _bootstrapped("retrained", values, at, pick, (forget.shape[1],), reason)


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
    generator = np.random.default_rng(0)
    picked = []
    for _ in range(RESAMPLES):
        i = pick(*(generator.integers(0, n, n) for n in sizes))
        picked.append(0.0 if i is None else values[i])
    low, high = np.quantile(picked, [0.05, 0.95], method="nearest")
    chosen = float(values[at])
    return Choice(rule, chosen, min(float(low), chosen), max(float(high), chosen), reason, chosen)
