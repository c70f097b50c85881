"""Where a curve of strengths crosses a level of retain probability, and which strengths to add to see it."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

Point = dict[str, Any]  # strength and metrics
FORGET, RETAIN = "forget_probability", "retain_probability"
NEAR = 0.002  # retain probability this near a level needs no strength nearer
BROKEN = 0.5  # retain probability below which no larger strength is of interest


class At(NamedTuple):
    """The point of most forgetting among those that keep the retain probability at a level."""

    point: Point
    crossed: bool  # False: a measured point above the level, as the curve has no crossing with more forgetting


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
    return min(found, key=lambda at: at.point[FORGET]) if found else None


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


def measured(
    measure: Callable[[float], Point],
    start: Point,
    own: float,
    others: Sequence[float],
    levels: Sequence[float],
    refine: int,
) -> list[Point]:
    """`start`, which is at strength 0, a point at `own` strength and at the others up to the first that breaks the model, and
    up to `refine` at each level."""
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
    return sorted(points, key=lambda p: p["strength"])
