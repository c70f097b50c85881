"""Is the model like a retrained one? Equivalence tests, effect sizes, and the distance between two retrained models.

A test of difference that finds none proves nothing: too few rows find none either. A test of equivalence has to show that the
difference is smaller than a bound. With d_i the difference of row i's score from the retrained model's (of their mean, where
there are several), mean d̄, standard deviation s and n rows:

    TOST        p = P(T ≥ (Δ − |d̄|) / (s / √n)), T of Student's t with n − 1 degrees of freedom (Schuirmann, 1987)
    Δ           a share of the distance of means between the reference and the retrained model
    D           largest distance between the distribution functions of the two models' scores (Kolmogorov-Smirnov)

Scores are an answer's mean log-probability per token, and the logarithm of its truth ratio, both in nats.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from scipy import stats

from loramox.evaluate.bootstrap import interval_of_mean
from loramox.evaluate.metric import RETRAINED, Metric, Record, Summary

LEVEL = 0.05
# What is compared: its name, the field of a record, and whether its logarithm is taken.
COMPARED = (("forget_probability", "log_p", False), ("forget_truth_ratio", "truth_ratio", True))


def tost(differences: np.ndarray, bound: float) -> float:
    """p-value of two one-sided paired t-tests: small where the mean is shown to be within ±`bound`. Two rows at least."""
    n = len(differences)
    error = differences.std(ddof=1) / np.sqrt(n)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(stats.t.sf((bound - abs(differences.mean())) / error, n - 1))


def verdict(differences: np.ndarray, bound: float) -> str:
    """equivalent: within ±`bound`; different: neither that nor 0 is plausible; not shown: too few rows to tell. At 5 %."""
    if tost(differences, bound) < LEVEL:
        return "equivalent"
    return "different" if stats.ttest_1samp(differences, 0).pvalue < LEVEL else "not shown"


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """The KS statistic D of two samples, from 0 (the same distribution) to 1 (no overlap). scipy's is slow in a bootstrap."""
    at = np.concatenate([a, b])
    return float(np.abs(_share_up_to(a, at) - _share_up_to(b, at)).max())


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tries, adjusted so that one below 0.05 is found by chance in one of 20 such families (Holm, 1979)."""
    order, found, highest = np.argsort(p_values), [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - place) * p_values[i]))
        found[i] = highest
    return found


def add_equivalence(
    forget: Sequence[Record], retrained: Sequence[Sequence[Record]], share: float, into: Summary
) -> None:
    """Enter test, difference and distances of both scores, or what they lack.

    The bound of the test is a `share` of the distance between the reference and the retrained model.
    """
    for name, field, as_log in COMPARED:
        ours, *theirs = _common(field, as_log, forget, *retrained)
        if not theirs:
            into.absent[f"{name}_equivalence"] = f"needs {RETRAINED} (--retrained)"
            continue
        if as_log and not len(ours):
            into.absent[f"{name}_equivalence"] = "needs wrong answers to the forget rows (column perturbed_answer)"
            continue
        if len(ours) < 2 or not np.isfinite([ours, *theirs]).all():
            into.absent[f"{name}_equivalence"] = "needs two rows with finite scores in both models"
            continue
        # Without intervals: a bootstrap of D, which is never below 0, is too high where the models are alike.
        n, D = len(ours), float(np.mean([distance(ours, each) for each in theirs]))
        into.metrics[f"{name}_distance"] = Metric(D, "lower", n, RETRAINED, "KS statistic D")
        if len(theirs) > 1:
            by_chance = float(np.mean([distance(*pair) for pair in combinations(theirs, 2)]))
            others = f"{len(theirs)} retrained models, with each other"
            into.metrics[f"{name}_distance_by_chance"] = Metric(
                by_chance, "none: to compare with", n, others, "KS statistic D"
            )
        before = [r | {field: r[f"reference_{field}"]} for r in forget if f"reference_{field}" in r]
        ours, reference, *theirs = _common(field, as_log, forget, before, *retrained)
        if len(ours) < 2 or not np.isfinite(reference).all():
            into.absent[f"{name}_equivalence"] = (
                "needs an adapter (--adapter): the bounds are a share of the distance between reference and retrained model"
            )
            continue
        mean_of_theirs = np.mean(theirs, axis=0)
        bound = share * float(abs(reference.mean() - mean_of_theirs.mean()))
        _add_test(name, ours - mean_of_theirs, bound, share, into)


def _add_test(name: str, differences: np.ndarray, bound: float, share: float, into: Summary) -> None:
    n, p, said = len(differences), tost(differences, bound), verdict(differences, bound)
    between = interval_of_mean(differences)
    into.metrics[f"{name}_difference"] = Metric(
        float(differences.mean()), "nearer to 0", n, RETRAINED, "mean over rows, nats", between
    )
    reading = (
        f"{said} (p = {p:.2g}): the mean difference is {differences.mean():+.3g} nats, and up to ±{bound:.3g} counts as none, {share:.0%} of the "
        "distance between reference and retrained model"
    )
    source = "two one-sided paired t-tests, p-value; below 0.05 equivalence is shown"
    into.metrics[f"{name}_equivalence"] = Metric(p, "lower", n, RETRAINED, source, None, bound, reading)


def _common(field: str, as_log: bool, *of: Sequence[Record]) -> list[np.ndarray]:
    """The field in each of several models' records, of the rows for which all of them have it, in the same order."""
    by_row = [{r["id"]: r[field] for r in records if field in r} for records in of]
    rows = [row for row in by_row[0] if all(row in each for each in by_row)]
    found = [np.array([each[row] for row in rows], dtype=float) for each in by_row]
    with np.errstate(divide="ignore", invalid="ignore"):
        return [np.log(each) for each in found] if as_log else found


def _share_up_to(sample: np.ndarray, at: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.sort(sample), at, side="right") / len(sample)
