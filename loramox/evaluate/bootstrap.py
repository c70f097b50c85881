"""The percentile bootstrap over rows."""

from collections.abc import Callable

import numpy as np

RESAMPLES = 1000


def resampled(statistic: Callable[..., float], *rows: int, seed: int = 0, samples: int = RESAMPLES) -> np.ndarray:
    """statistic(i, …) for `samples` samples of row numbers, one i for each set of `rows`, drawn with replacement."""
    random = np.random.default_rng(seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.array([statistic(*(random.integers(0, n, n) for n in rows)) for _ in range(samples)])


def interval(found: np.ndarray) -> tuple[float, float] | None:
    """The middle 95 % of what `resampled` found; samples without a value do not count.

    None if all samples agree, as for one row or for rows that are all alike: such rows do not tell how others would differ.
    """
    found = found[np.isfinite(found)]
    if not len(found) or np.ptp(found) == 0:
        return None
    low, high = np.quantile(found, [0.025, 0.975]).tolist()
    return low, high


def interval_of_mean(values: np.ndarray) -> tuple[float, float] | None:
    """`interval` of the mean of one value a row."""
    return interval(resampled(lambda i: float(values[i].mean()), len(values)))
