"""Rules that choose a strength α from a frontier, each with its uncertainty over rows, or with a plain refusal."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 200
LEVEL = 0.05  # two sets of rows cannot be told apart when a test's p-value, or an interval's error, is above it

Rows = np.ndarray  # [strengths, rows], or [rows]
NOTHING = "no strength has scores that are all finite. Measure smaller strengths"


class Choice(NamedTuple):
    """What a rule says."""

    rule: str
    strength: float | None  # None: it refuses
    low: float | None  # 5 % and 95 % of the choices on resampled rows
    high: float | None
    reason: str  # why this one, or why none
    nearest: float | None = None  # the strength, or where it refuses what comes nearest to it


def within_budget(
    strengths: Sequence[float], retain: Rows, reference: Rows, budget: float, ceiling: float = math.inf
) -> Choice:
    """The largest strength, up to `ceiling`, at which retain rows keep their mean probability but for a share of `budget`.

    The ceiling is for an objective that has an end where it was trained, on forget rows: beyond it they fall further than a
    model that never knew them would let them. Strengths above it count only where none below it was measured. Smaller ones may
    keep less: the KL term holds retain rows at the strength that was trained for, and at no other.

    `retain` are the rows' probabilities at each of `strengths`, which ascend, [strengths, rows]; `reference` those of the
    reference model, [rows].
    """

    below = sum(s <= ceiling for s in strengths)
    if 0 < below < len(strengths):
        strengths, retain = strengths[:below], retain[:below]

    def pick(rows: np.ndarray) -> int | None:
        kept = retain[:, rows].mean(1) >= (1 - budget) * reference[rows].mean()
        return int(np.flatnonzero(kept)[-1]) if kept.any() else None

    at = pick(np.arange(retain.shape[1]))
    floor = (1 - budget) * reference.mean()
    if at is None:
        return refusal(
            "budget",
            f"no strength keeps retain probability at {floor:.4f} ({100 * budget:.3g} % below the reference's): at {strengths[0]:g}, the "
            f"least measured, it is {retain[0].mean():.4f}. Measure smaller strengths, or memorize again with a higher --kl_weight",
        )
    if at + 1 < len(strengths):
        beyond = f"; {strengths[at + 1]:g} costs more"
    elif ceiling < math.inf:
        beyond = f"; beyond {ceiling:g}, which was trained for, forget rows would fall further than is asked"
    else:
        beyond = ", and no larger one was measured (--strengths)"
    reason = f"the largest measured at which retain probability, {retain[at].mean():.4f}, is within {100 * budget:.3g} % of the reference's {reference.mean():.4f}{beyond}"
    return _bootstrapped("budget", strengths, at, pick, (retain.shape[1],), reason)


def like_holdout(strengths: Sequence[float], forget: Rows, holdout: Rows, auc: Callable[[Rows, Rows], float]) -> Choice:
    """The strength at which forget rows look most like rows never seen: membership AUC nearest 0.5, from either side.

    `forget` and `holdout` are membership scores at each of `strengths`, [strengths, rows]; `auc` takes one strength's.
    """

    def areas(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
        return np.array([auc(f[rows], h[others]) for f, h in zip(forget, holdout, strict=True)])

    def pick(rows: np.ndarray, others: np.ndarray) -> int:
        found = areas(rows, others)
        equal = np.flatnonzero(np.abs(found - 0.5) == np.abs(found - 0.5).min())
        # Where none is strong enough to be told from another, as at an AUC of 1, the strongest is nearest.
        return int(equal[-1] if found[equal[-1]] > 0.5 else equal[0])

    if not len(strengths):
        return refusal("holdout", NOTHING)
    n, m = forget.shape[1], holdout.shape[1]
    every, at = (of(np.arange(n), np.arange(m)) for of in (areas, pick))
    # Of an AUC of two samples that are alike (Hanley & McNeil, 1982).
    error = 1.96 * np.sqrt((n + m + 1) / (12 * n * m))
    if abs(every[at] - 0.5) > error:
        side = "still look trained on" if every[at] > 0.5 else "look stranger than rows never seen"
        return refusal(
            "holdout",
            f"no strength makes forget rows look like holdout rows: nearest is {strengths[at]:g}, where they {side} (AUC "
            f"{every[at]:.3f}; 0.5 ± {error:.3f} is alike). Measure other strengths",
            float(strengths[at]),
        )
    return _bootstrapped("holdout", strengths, at, pick, (n, m), f"membership AUC {every[at]:.3f} is nearest 0.5")


def like_retrained(
    strengths: Sequence[float],
    forget: Rows,
    retrained: Rows,
    p_value: Callable[[Rows, Rows], float],
    reference: Rows | None = None,
) -> Choice:
    """The strength whose forget rows are distributed most like the retrained model's, which never saw them.

    `forget` are truth ratios at each of `strengths`, [strengths, rows], `retrained` the retrained model's, [rows];
    `p_value` of two samples is TOFU's forget quality. With `reference`, the reference model's truth ratios, [rows], it refuses
    when not even that model, which knows everything, can be told from the retrained one.
    """

    def pick(rows: np.ndarray) -> int:
        found = np.array([p_value(at[rows], retrained[rows]) for at in forget])
        equal = np.flatnonzero(found == found.max())  # several where no two samples overlap
        apart = np.abs(np.median(forget[equal][:, rows], axis=1) - np.median(retrained[rows]))
        return int(equal[apart.argmin()])

    if not len(strengths):
        return refusal("retrained", NOTHING)
    if reference is not None and p_value(reference, retrained) >= LEVEL:
        return refusal(
            "retrained",
            f"on these {len(retrained)} rows the test cannot tell even the reference model from the retrained one (KS p = "
            f"{p_value(reference, retrained):.2g}), so it can choose nothing. Give more forget rows",
        )
    at = pick(np.arange(forget.shape[1]))
    quality = p_value(forget[at], retrained)
    if quality < LEVEL:
        return refusal(
            "retrained",
            f"no strength makes forget rows look like the retrained model's: nearest is {strengths[at]:g} (KS p = {quality:.2g}, "
            f"n = {forget.shape[1]}; {LEVEL} or more cannot be told apart). Measure other strengths, or memorize for longer",
            float(strengths[at]),
        )
    return _bootstrapped(
        "retrained", strengths, at, pick, (forget.shape[1],), f"forget quality is highest, KS p = {quality:.2g}"
    )


def refusal(rule: str, reason: str, nearest: float | None = None) -> Choice:
    return Choice(rule, None, None, None, reason, nearest)


def _bootstrapped(
    rule: str,
    strengths: Sequence[float],
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
        picked.append(0.0 if i is None else strengths[i])
    low, high = np.quantile(picked, [0.05, 0.95], method="nearest")
    chosen = float(strengths[at])
    return Choice(rule, chosen, min(float(low), chosen), max(float(high), chosen), reason, chosen)
