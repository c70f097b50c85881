"""The frontier of one trained adapter: forgetting and its cost along an axis, and the points to measure next."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# Shares of the value that the adapter was trained for. Retain rows are not held beyond it, so the frontier ends soon after.
GRID = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)

FURTHER = 1.5  # times the largest value, where the search has to go beyond it

FORGOTTEN = 0.5  # a value forgets where forget rows have at most this share of the reference's probability

# A frontier whose two curves are never further apart than this share spares nothing: see `poor_direction`.
PARTED = 0.25


class Axis(NamedTuple):
    """What a sweep varies."""

    unit: str  # alpha, for a method that has one, where the model is θ_ref − alpha·ΔW; else scale, where it is θ_ref + scale·ΔW
    trained: float  # the value that ΔW was trained for: the alpha of training, or scale 1
    ceiling: float = np.inf  # rule `budget` goes no further than this

    @property
    def flag(self) -> str:
        return f"--{self.unit}s"

    def scale(self, at: float) -> float:
        """The multiple of ΔW that the model at this value has."""
        return -at if self.unit == "alpha" else at


def grid(trained: float) -> list[float]:
    return [trained * share for share in GRID]


def as_named(value: float) -> float:
    """The value in six digits, as the folder of its records is named."""
    return float(f"{value:g}")


def three_digits(value: float) -> float:
    """What is enough of a value that is looked for between others."""
    return float(f"{value:.3g}")


def next_value(
    values: Sequence[float], forget: Sequence[float], retain: Sequence[float], floor: float | None = None
) -> float:
    """The value that tells most about the frontier: midway in the step over which the two curves change most, each on its range.

    With `floor`, the retain probability to keep: midway between the largest value that keeps it and the next. `values` ascend.
    """
    x = np.asarray(values, float)
    points = np.nan_to_num(np.stack([forget, retain], axis=1))  # a value far too high may overflow
    kept = np.flatnonzero(points[:, 1] >= floor) if floor is not None else []
    if len(kept) and kept[-1] + 1 < len(x):
        step = int(kept[-1])
    else:
        ranges = np.maximum(np.ptp(points, axis=0), 1e-9)
        step = int(np.linalg.norm(np.diff(points, axis=0) / ranges, axis=1).argmax())
    return three_digits((x[step] + x[step + 1]) / 2)


def beside(values: Sequence[float], best: float) -> float:
    """The value that tells most about where the best one is: midway in the longer of the two steps beside the best so far.

    At the last of `values`, which ascend from the reference's 0, it is `FURTHER` times that one.
    """
    at = list(values).index(best)
    if at + 1 == len(values):
        return three_digits(FURTHER * best)
    below, above = values[at - 1], values[at + 1]
    return three_digits((below + best) / 2 if best - below > above - best else (best + above) / 2)


def still_known(at: float, forget: float, reference: float, axis: Axis) -> str | None:
    """What to do where forget rows keep more than half of the reference's probability at the chosen value."""
    if forget <= FORGOTTEN * reference:
        return None
    return (
        f"at {axis.unit} = {at:g} the forget rows' answers keep {forget:.2g} of the reference's {reference:.2g}: they are not forgotten. Train "
        f"longer (--num_train_epochs) or with a higher --learning_rate, or measure larger values ({axis.flag})"
    )


def poor_direction(forget: Sequence[float], retain: Sequence[float], axis: Axis) -> str | None:
    """What is wrong with a frontier on which retain falls as fast as forget, and what to change; None when it is sound.

    `forget` and `retain` are mean probabilities, first those of the reference. Each is taken as a share of it.
    """
    left = [np.asarray(curve, float) / curve[0] for curve in (forget, retain)]
    parted = float(np.nanmax(left[1] - left[0]))  # a value far too high may overflow
    if parted >= PARTED:
        return None
    if not np.any(np.maximum(*left)[1:] > PARTED):
        return (
            f"all values of {axis.unit} measured are far too high: at each, forget and retain are below {PARTED:.0%} of the reference's. "
            f"Measure smaller ones ({axis.flag})"
        )
    return (
        f"the direction is poor: at no {axis.unit} is forget more than {max(parted, 0):.0%} further down than retain, so none is right. "
        "Train again: with a higher --retain_weight (mox_static: and --kl_at shipped) if retain falls early, with more --num_train_epochs "
        "(mox_static: or a higher --temperature) if nothing falls"
    )


def records_folder(sweep: Path, at: float) -> Path:
    """The folder of a point's records, which loramox 0.1 named strength-8 and not at-8."""
    folder, before = sweep / f"at-{at:g}", sweep / f"strength-{at:g}"
    return before if before.exists() and not folder.exists() else folder


def frontier_as_now(frontier: dict[str, Any]) -> dict[str, Any]:
    """The frontier.json that loramox 0.1 wrote, as this version writes it; a newer one as it is.

    0.1 swept methods with an alpha only, and called it `strength`.
    """
    if "memorization" not in frontier:
        return frontier

    def renamed(each: Any) -> Any:
        if not isinstance(each, dict):  # the file may be damaged, which its reader checks afterwards
            return each
        return {"at" if name == "strength" else name: value for name, value in each.items()}

    lists = {
        name: [renamed(each) for each in frontier[name]]
        for name in ("points", "choices")
        if isinstance(frontier.get(name), list)
    }
    return frontier | lists | {"unit": "alpha", "trained": frontier["memorization"]}
