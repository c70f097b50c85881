"""The frontier of one memorization adapter: what each strength forgets and what it costs, where to look next."""

from collections.abc import Sequence

import numpy as np

# Of the trained strength. Beyond it the retain rows are no longer held, so the frontier ends soon after.
GRID = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)

FURTHER = 1.5  # times the largest strength, where what is looked for lies beyond it

# A frontier whose two curves part by less than this share never spares the rest: see `poor_direction`.
PARTED = 0.25


def grid(trained: float) -> list[float]:
    """The strengths to begin with, for an adapter that was trained for strength `trained`."""
    return [trained * share for share in GRID]


def next_strength(
    strengths: Sequence[float], forget: Sequence[float], retain: Sequence[float], floor: float | None = None
) -> float:
    """The strength that tells most about the frontier: midway in the longer of the two steps at its sharpest bend.

    With `floor`, the retain probability that is to be kept: midway between the largest strength that keeps it and the next.

    `forget` and `retain` are the mean probabilities at `strengths`, which ascend. How sharp a bend is, is the area of the
    triangle of a point and its neighbours, with both curves on their own range. Two points have no bend: midway.
    """
    x, points = np.asarray(strengths, float), np.stack([forget, retain], axis=1).astype(float)
    if len(x) == 2:
        return float(x.mean())
    kept = np.flatnonzero(points[:, 1] >= floor) if floor is not None else []
    if len(kept) and kept[-1] + 1 < len(x):
        return float((x[kept[-1]] + x[kept[-1] + 1]) / 2)
    points = (points - points.min(0)) / np.maximum(np.ptp(points, axis=0), 1e-9)
    before, after = points[1:-1] - points[:-2], points[2:] - points[1:-1]
    bend = np.abs(before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0])
    at = int(bend.argmax()) + 1
    steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
    left = at - 1 if steps[at - 1] >= steps[at] else at
    return float((x[left] + x[left + 1]) / 2)


def beside(strengths: Sequence[float], best: float) -> float:
    """The strength that tells most about where the best one is: midway in the longer of the two steps beside the best so far.

    At the last of `strengths`, which ascend from the reference's 0, it is `FURTHER` times that one.
    """
    at = list(strengths).index(best)
    if at + 1 == len(strengths):
        return FURTHER * best
    below, above = strengths[at - 1], strengths[at + 1]
    return (below + best) / 2 if best - below > above - best else (best + above) / 2


def still_known(strength: float, forget: float, reference: float) -> str | None:
    """What to do where at the chosen strength forget rows keep more than half of the probability that the reference gives."""
    if forget <= reference / 2:
        return None
    return (
        f"at α = {strength:g} the forget rows' answers keep {forget:.2g} of the reference's {reference:.2g}: they are not forgotten. Memorize "
        "longer (--num_train_epochs) or with a higher --learning_rate, or measure larger strengths (--strengths)"
    )


def poor_direction(forget: Sequence[float], retain: Sequence[float]) -> str | None:
    """What is wrong with a frontier on which retain falls as fast as forget, and what to change; None when it is sound.

    `forget` and `retain` are mean probabilities, first those of the reference. Each is taken as a share of it.
    """
    left = [np.asarray(curve, float) / curve[0] for curve in (forget, retain)]
    parted = float(np.nanmax(left[1] - left[0]))  # a strength far too high may overflow
    if parted >= PARTED:
        return None
    if not np.any(np.maximum(*left)[1:] > PARTED):
        return (
            f"the strengths measured are far too high: at each of them forget and retain are below {PARTED:.0%} of the reference's. "
            "Measure smaller ones (--strengths)"
        )
    return (
        f"the direction is poor: at no strength is forget more than {max(parted, 0):.0%} further down than retain, so no strength is "
        "right. Memorize again: with --kl_at shipped and a higher --kl_weight if retain falls early, with more --num_train_epochs "
        "(or, with --objective cross_entropy, a higher --temperature) if nothing falls"
    )
