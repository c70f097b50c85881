"""Where a curve of strengths crosses a level of retain probability, and which strengths to add to see it."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from loramox.evaluate.truth_ratio import forget_quality, probability_quality

Point = dict[str, Any]  # strength and metrics
Test = Callable[[Point], float | None]
FORGET, RETAIN, QUALITY = "forget_probability", "retain_probability", "forget_quality"
PROBABILITY_QUALITY = "forget_probability_quality"
NEAR = 0.002  # retain probability this near a level needs no strength nearer
LEAST = 1e-12  # forget probability below which a logarithm says nothing more
BROKEN = 0.5  # retain probability below which no larger strength is of interest


class At(NamedTuple):
    """The point of most forgetting among those that keep the retain probability at a level."""

    point: Point
    crossed: bool  # False: a measured point above the level, as the curve has no crossing with more forgetting
    nearest: Point | None = None  # the measured point nearest to the retrained model among those that keep the level

    def value(self, name: str) -> float | None:
        """A metric at the level. Forget quality: that of the nearest point, as forgetting more is not nearer."""
        return (self.nearest or {}).get(name) if name == QUALITY else self.point.get(name)


def finite(points: Sequence[Point]) -> list[Point]:
    """The points in order of strength. A model that overflows (null in a record) has lost its retain rows."""
    made = []
    for p in sorted(points, key=lambda p: p["strength"]):
        values = [p.get(name) for name in (FORGET, RETAIN)]
        lost = None in values or not all(map(math.isfinite, values))
        made.append({"strength": p["strength"], FORGET: math.nan, RETAIN: 0.0} if lost else p)
    return made


def at_level(points: Sequence[Point], level: float) -> At | None:
    """Every metric at the level, linear in retain probability between neighbours in strength; None where no point reaches it.

    A curve may cross the level several times: KL at one strength does not hold the strengths before it. Of all crossings, and
    of all points measured above the level, the one of most forgetting counts.
    """
    line = finite(points)
    found = [At(p, False) for p in line if p[RETAIN] >= level]
    for a, b in pairwise(line):
        if (a[RETAIN] >= level) != (b[RETAIN] >= level) and not math.isnan(a[FORGET] + b[FORGET]):
            found.append(At(_between(a, b, (level - a[RETAIN]) / (b[RETAIN] - a[RETAIN])), True))
    return min(found, key=lambda at: at.point[FORGET])._replace(nearest=nearest(points, level)) if found else None


def kept_where_forgotten(points: Sequence[Point], forget: float) -> float | None:
    """The highest retain probability at which the forget probability is down to `forget`; None where it never is.

    Between neighbours in strength linear in the logarithm of the forget probability, which falls over many orders of magnitude.
    """
    line = [p for p in finite(points) if not math.isnan(p[FORGET])]
    found = [p[RETAIN] for p in line if p[FORGET] <= forget]
    for a, b in pairwise(line):
        if (a[FORGET] <= forget) != (b[FORGET] <= forget):
            low, high, at = (math.log(max(f, LEAST)) for f in (a[FORGET], b[FORGET], forget))
            found.append(a[RETAIN] + (at - low) / (high - low) * (b[RETAIN] - a[RETAIN]))
    return max(found, default=None)


def of_ratios(point: Point) -> float | None:
    """KS p of the truth ratios beside the retrained model's."""
    return point.get(QUALITY)


def of_both(point: Point) -> float | None:
    """The lesser KS p of two tests, on truth ratios and on probabilities: does either tell the model from the retrained one?"""
    both = [point.get(name) for name in (QUALITY, PROBABILITY_QUALITY)]
    return None if None in both else min(both)


def beside(point: Point, retrained: Point) -> Point:
    """The point of a model without adapter with its KS p, where both models have `truth_ratios`, rows with what is compared."""
    rows = [of.get("truth_ratios", ()) for of in (point, retrained)]
    tests = ((QUALITY, "truth_ratio", forget_quality), (PROBABILITY_QUALITY, "log_p", probability_quality))
    values = {name: ([[r[field] for r in some if field in r] for some in rows], test) for name, field, test in tests}
    return point | {name: test(*both) for name, (both, test) in values.items() if all(both)}


def nearest(points: Sequence[Point], level: float, test: Test = of_ratios) -> Point | None:
    """The measured point of highest KS p among those that keep the level; None where there is no retrained model."""
    kept = [p for p in points if p.get(RETAIN) is not None and p[RETAIN] >= level and test(p) is not None]
    return max(kept, key=test) if kept else None


def _between(a: Point, b: Point, share: float) -> Point:
    both = [name for name in a if None not in (a[name], b.get(name))]
    return {name: a[name] + share * (b[name] - a[name]) for name in both}


def next_strength(points: Sequence[Point], level: float) -> float | None:
    """A strength nearer to where `at_level` reads the level off, or None when one is near enough or nothing is crossed."""
    at = at_level(points, level)
    if at is None or not at.crossed:
        return None
    line, strength = finite(points), at.point["strength"]
    below = max((p for p in line if p["strength"] <= strength), key=lambda p: p["strength"])
    above = min((p for p in line if p["strength"] > strength), key=lambda p: p["strength"])
    if min(abs(p[RETAIN] - level) for p in (below, above)) < NEAR:
        return None
    low, width = below["strength"], above["strength"] - below["strength"]
    new = float(f"{min(max(strength, low + 0.1 * width), low + 0.9 * width):.3g}")
    return None if new in (low, above["strength"]) else new


def nearer_strength(
    points: Sequence[Point], level: float, test: Test = of_ratios, within: float = 0.03
) -> float | None:
    """The strength midway between the nearest point and a neighbour, the nearer one first; None when both midpoints are within
    that share of a strength from it.
    """
    at, line = nearest(points, level, test), sorted(points, key=lambda p: p["strength"])
    if at is None:
        return None
    place = line.index(at)
    around = [p for p in line[max(place - 1, 0) : place + 2] if p is not at]
    between = [(at["strength"] + p["strength"]) / 2 for p in sorted(around, key=lambda p: -(test(p) or 0.0))]
    return next((float(f"{new:.3g}") for new in between if abs(new - at["strength"]) > within * new), None)


def measured(
    measure: Callable[[float], Point],
    start: Point,
    own: float,
    others: Sequence[float],
    levels: Sequence[float],
    refine: int,
) -> list[Point]:
    """`start`, which is at strength 0, a point at `own` strength and at the others up to the first that breaks the model; then
    up to `refine` at each level, as many towards the retrained model at the least level, and three times as many by both tests.
    """
    points = [start, measure(own)]
    for strength in sorted(set(others) - {own}):
        broken = [p["strength"] for p in finite(points) if p[RETAIN] < BROKEN]
        if not broken or strength < min(broken):
            points.append(measure(strength))
    for level in levels:
        for _ in range(refine):
            if (new := next_strength(points, level)) is None:
                break
            points.append(measure(new))
    # Probabilities all move together with the strength, truth ratios little: where both are alike is a narrow place.
    for test, times, within in ((of_ratios, refine, 0.03), (of_both, 3 * refine, 0.01)):
        for _ in range(times):
            if (new := nearer_strength(points, min(levels), test, within)) is not None:
                points.append(measure(new))
    return sorted(points, key=lambda p: p["strength"])
