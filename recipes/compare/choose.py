"""Half A of the forget rows chooses the scale and the setting; half B, which no choice has seen, is reported."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import ks_2samp

from .runs import Record

A, B = slice(0, None, 2), slice(1, None, 2)  # forget rows of even and of odd index
KEEP = 0.98  # share of the reference's retain probability that a scale has to keep
ALIKE = 1e-6  # a lesser p below this counts as 0: it says only that both tests see a difference
DRAWS, INTERVAL = 1000, (5, 95)  # of the bootstrap; percentiles
TESTS = {"truth_ratio": "truth ratio", "log_p": "log-probability"}
Point = dict[str, Any]  # a scale, and the raw values of the rows there (`compute.Scorer`)


def values(point: Point, name: str, half: slice = slice(None)) -> np.ndarray:
    """The raw values of a point, [rows]; NaN where they were not finite."""
    return np.array(point[name], dtype=float)[half]


def shipped(record: Record, scale: float = 1.0) -> Point:
    """The point of what ships, or of a multiple of it."""
    return next(point for point in record["points"] if point["scale"] == scale)


def kept(point: Point, reference: Point, *parts: str) -> float:
    """The retain probability of a part as a share of the reference's; the least of several parts."""
    return min(float(values(point, part).mean() / values(reference, part).mean()) for part in parts)


def p_value(point: Point, retrained: Point, test: str, half: slice) -> float:
    """p of the two-sided Kolmogorov-Smirnov test against the retrained model on half of the forget rows."""
    ours, theirs = (values(each, test, half) for each in (point, retrained))
    return float(ks_2samp(ours, theirs).pvalue) if np.isfinite(ours).all() else 0.0


def lesser_p(point: Point, retrained: Point, half: slice) -> float:
    return min(p_value(point, retrained, test, half) for test in TESTS)


def closeness(point: Point, retrained: Point) -> tuple[float, float]:
    """How near to the retrained model on half A, to be maximised: the lesser p; where that is 0, the mean log-probability."""
    p = lesser_p(point, retrained, A)
    away = abs(values(point, "log_p", A).mean() - values(retrained, "log_p", A).mean())
    return p if p >= ALIKE else 0.0, -float(away) if np.isfinite(away) else -np.inf


def chosen_point(record: Record, reference: Point, retrained: Point) -> Point | None:
    """Of the scales that keep the given retain rows, the one nearest to the retrained model on half A; None if none does."""
    keeping = [point for point in record.get("points", ()) if kept(point, reference, "given") >= KEEP]
    return max(keeping, key=lambda point: closeness(point, retrained)) if keeping else None


def chosen_setting(records: Sequence[Record], reference: Point, retrained: Point) -> int:
    """The place of the setting whose chosen point is nearest to the retrained model on half A; the first if none keeps."""
    points = [chosen_point(record, reference, retrained) for record in records]
    return max(range(len(points)), key=lambda i: closeness(points[i], retrained) if points[i] else (-1.0, -float(i)))


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The Kolmogorov-Smirnov statistic D: the largest distance between both distribution functions, in [0, 1]."""
    everywhere = np.concatenate([ours, theirs])
    shares = (np.searchsorted(np.sort(each), everywhere, side="right") / len(each) for each in (ours, theirs))
    return float(np.abs(np.subtract(*shares)).max())


def distances(points: Sequence[Point], retrained: Point, test: str) -> tuple[list[float], float, float]:
    """D on half B for each seed's point, and a 90 % bootstrap interval of their mean.

    Rows of both models are resampled independently, as the test takes them. This raises D on average; the interval is
    shifted back by as much.
    """
    theirs = values(retrained, test, B)
    ours = [np.nan_to_num(values(point, test, B), nan=np.inf, neginf=-np.inf) for point in points]
    generator = np.random.default_rng(0)

    def drawn(sample: np.ndarray) -> np.ndarray:
        return sample[generator.integers(len(sample), size=len(sample))]

    found = [distance(each, theirs) for each in ours]
    resampled = [np.mean([distance(drawn(each), drawn(theirs)) for each in ours]) for _ in range(DRAWS)]
    low, high = np.clip(np.percentile(resampled, INTERVAL) + np.mean(found) - np.mean(resampled), 0, 1)
    return found, float(low), float(high)


def forgotten_at(record: Record, reference: Point, *parts: str) -> float:
    """The least forget probability at which every part keeps KEEP of the reference's retain probability.

    Linear in the kept share between neighbouring scales, from scale 0, which is the reference.
    """
    points = sorted([reference, *record["points"]], key=lambda point: point["scale"])
    line = [(kept(point, reference, *parts), float(np.exp(values(point, "log_p")).mean())) for point in points]
    found = [forget for keep, forget in line if keep >= KEEP]
    for (keep, forget), (next_keep, next_forget) in itertools.pairwise(line):
        if (keep >= KEEP) != (next_keep >= KEEP):
            found.append(forget + (KEEP - keep) / (next_keep - keep) * (next_forget - forget))
    return min(found)
