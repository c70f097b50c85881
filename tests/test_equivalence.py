"""Tests of equivalence against a closed form, planted differences, and what chance alone makes."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from loramox.evaluate.equivalence import add_equivalence, distance, holm, tost, verdict
from loramox.evaluate.metric import Summary
from loramox.evaluate.summary import summarise
from loramox.sweep.sweep import _points

Record = dict[str, Any]


def normal(mean: float, spread: float, n: int, seed: int = 0) -> np.ndarray:
    """n numbers with exactly that mean and standard deviation."""
    x = np.random.default_rng(seed).normal(size=n)
    return mean + spread * (x - x.mean()) / x.std(ddof=1)


def records(log_p: np.ndarray, reference: np.ndarray | None = None, **more: np.ndarray) -> list[Record]:
    found = [{"id": str(i), "log_p": float(p)} for i, p in enumerate(log_p)]
    for i, record in enumerate(found):
        record |= {name: float(each[i]) for name, each in more.items()}
        record |= {"reference_log_p": float(reference[i])} if reference is not None else {}
    return found


def added(forget: list[Record], *retrained: list[Record], share: float = 0.1) -> Summary:
    found = Summary({}, {})
    add_equivalence(forget, retrained, share, found)
    return found


def test_tost_has_its_closed_form() -> None:
    """With d̄ = 0.1, s = 1, n = 25 and Δ = 0.5, t = (0.5 − 0.1) / (1/5) = 2, of 24 degrees of freedom."""
    assert tost(normal(0.1, 1, 25), 0.5) == pytest.approx(stats.t.sf(2, 24))
    assert tost(normal(0.1, 1, 25), 0.5) == pytest.approx(0.02847, abs=1e-5)


@given(st.floats(-2, 2), st.floats(0.1, 3), st.integers(2, 50), st.floats(0.01, 3))
def test_tost_is_the_larger_p_of_two_one_sided_t_tests(mean: float, spread: float, n: int, bound: float) -> None:
    d = normal(mean, spread, n)
    above = stats.ttest_1samp(d, -bound, alternative="greater").pvalue
    below = stats.ttest_1samp(d, bound, alternative="less").pvalue
    assert tost(d, bound) == pytest.approx(max(above, below))
    assert tost(-d, bound) == pytest.approx(tost(d, bound))


def test_equal_distributions_are_equivalent_with_many_rows_and_not_shown_to_be_with_few() -> None:
    random = np.random.default_rng(0)
    many, few = random.normal(0, 1, 4000), random.normal(0, 1, 8)
    assert verdict(many, 0.1) == "equivalent"
    assert verdict(few, 0.1) == "not shown"
    assert verdict(many + 1, 0.1) == "different"
    assert verdict(np.zeros(5), 0.1) == "equivalent"


def test_tost_errs_in_at_most_5_of_100_on_the_bound_itself() -> None:
    random = np.random.default_rng(1)
    found = [tost(random.normal(0.3, 1, 60), 0.3) < 0.05 for _ in range(1000)]
    assert np.mean(found) < 0.07


@given(st.lists(st.integers(0, 9), min_size=1, max_size=20), st.lists(st.integers(0, 9), min_size=1, max_size=20))
def test_the_distance_is_scipys_statistic_d(a: list[int], b: list[int]) -> None:
    x, y = np.array(a, dtype=float), np.array(b, dtype=float)
    assert distance(x, y) == pytest.approx(stats.ks_2samp(x, y).statistic)
    assert distance(x, x) == 0


def test_holm_multiplies_the_smallest_by_the_number_of_tries_and_keeps_the_order() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.02]) == [0.02]
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


def test_a_planted_difference_is_found_and_bounds_are_a_share_of_the_distance_to_the_reference() -> None:
    retrained = normal(-4, 1, 200)
    reference = normal(-1, 0.3, 200, seed=1)
    metrics, absent = added(records(normal(-4, 1, 200) + 1, reference), records(retrained))
    test = metrics["forget_probability_equivalence"]
    assert test.bound == pytest.approx(0.1 * 3)
    assert test.value > 0.9
    assert test.reading.startswith("different (p = 1): the mean difference is +1 nats, and up to ±0.3")
    assert metrics["forget_probability_difference"].value == pytest.approx(1)
    assert metrics["forget_probability_distance"].value > 0.3
    assert "perturbed_answer" in absent["forget_truth_ratio_equivalence"]
    wide, _ = added(records(normal(-4, 1, 200) + 1, reference), records(retrained), share=0.5)
    assert wide["forget_probability_equivalence"].reading.startswith("equivalent")


def test_rows_are_paired_by_their_id_and_not_by_their_place() -> None:
    """Shuffled, or with rows that the other model lacks, both models' records give the same figures as in the same order."""
    rows = normal(-4, 3, 40)
    ours = records(rows + normal(0.1, 0.2, 40, seed=1), np.full(40, -1.0), truth_ratio=np.exp(rows), reference_truth_ratio=np.full(40, 9.0))  # fmt: skip
    theirs = records(rows, truth_ratio=np.exp(rows + 0.2))
    in_order, _ = added(ours, theirs)
    assert in_order["forget_probability_difference"].value == pytest.approx(0.1)
    low, high = in_order["forget_probability_difference"].interval
    assert high - low < 0.2  # of rows that differ by 3 nats, unpaired means differ by far more
    order = np.random.default_rng(0).permutation(40)
    more = [r | {"id": f"other {r['id']}", "log_p": 0.0, "truth_ratio": 1.0} for r in theirs[:5]]
    shuffled, _ = added(ours, [*more, *(theirs[i] for i in order)])
    assert shuffled == in_order
    first = [theirs[i] for i in order if i < 20]
    assert added(ours, first) == added(ours[:20], theirs[:20])
    assert added(ours, theirs, first) == added(ours[:20], theirs[:20], theirs[:20])


def test_two_retrained_models_show_what_chance_makes() -> None:
    rows = normal(-4, 2, 300)
    ours, a, b = (rows + normal(0, 0.2, 300, seed) for seed in (1, 2, 3))
    reference = np.full(300, -1.0)
    metrics, _ = added(records(ours, reference), records(a)[::-1], records(b))
    found, chance = metrics["forget_probability_distance"], metrics["forget_probability_distance_by_chance"]
    assert chance.value == distance(a, b)
    assert found.value == pytest.approx((distance(ours, a) + distance(ours, b)) / 2)
    assert found.interval is chance.interval is None
    # The spread of rows is far larger than the bound; that of paired differences is not.
    assert metrics["forget_probability_equivalence"].reading.startswith("equivalent")


def test_a_sweep_accounts_for_the_number_of_points_that_it_tried() -> None:
    retrained = [r | {"part": "forget"} for r in records(normal(-4, 1, 60))]
    for i, record in enumerate(retrained):
        record |= {"row": str(i), "plain_text": False}
    spread = normal(0, 0.7, 60, seed=1)
    measured = {
        at: [r | {"log_p": r["log_p"] + shift + each, "reference_log_p": -1.0} for r, each in zip(retrained, spread, strict=True)]
        for at, shift in ((0.0, 3.0), (1.0, 0.3), (2.0, 0.0), (3.0, -2.0))
    }  # fmt: skip
    points = _points(measured, lambda forget: summarise(forget, retrained))
    name = "forget_probability_equivalence"
    p_values = [point[name] for point in points]
    assert [point.get(f"{name}_holm") for point in points] == [None, *holm(p_values[1:])]
    assert points[2][f"{name}_holm"] == pytest.approx(3 * p_values[2])
    assert p_values[2] < 0.05


def test_truth_ratios_are_compared_as_logarithms() -> None:
    log_ratio = normal(0, 0.5, 100)
    ours = records(log_ratio, np.zeros(100), truth_ratio=np.exp(log_ratio), reference_truth_ratio=np.exp(log_ratio - 2))
    metrics, _ = added(ours, records(log_ratio, truth_ratio=np.exp(log_ratio + 0.1)))
    assert metrics["forget_truth_ratio_difference"].value == pytest.approx(-0.1)
    assert metrics["forget_truth_ratio_equivalence"].bound == pytest.approx(0.21)
    assert metrics["forget_truth_ratio_equivalence"].value < 1e-9


@pytest.mark.parametrize(
    ("forget", "retrained", "reason"),
    [
        (records(np.zeros(3), np.ones(3)), [], "needs records of the retrained model"),
        (records(np.zeros(3)), [records(np.zeros(3))], "needs an adapter"),
        (records(np.zeros(1), np.ones(1)), [records(np.zeros(1))], "needs two rows"),
        (records(np.array([0, np.nan]), np.ones(2)), [records(np.zeros(2))], "finite"),
    ],
)
def test_what_a_test_of_equivalence_lacks_is_named(forget: list, retrained: list, reason: str) -> None:
    metrics, absent = added(forget, *retrained)
    assert reason in absent["forget_probability_equivalence"]
    assert "forget_probability_equivalence" not in metrics
