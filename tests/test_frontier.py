"""The frontier: where to measure next, whether its direction is any good, what each rule chooses, and the sweep."""

import functools
import json
import math
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PEOPLE, TOWNS, questions
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import loramox.sweep.sweep
from loramox import Data, ReferenceConfig, RunConfig, UnlearnConfig
from loramox.adapter.export import ShippingConfig, extrapolate
from loramox.adapter.folder import PROVENANCE, WEIGHTS
from loramox.adapter.provenance import read_provenance
from loramox.cli import main
from loramox.errors import AdapterError, LoramoxError, RunError, SettingsError
from loramox.evaluate.asked import Asked
from loramox.evaluate.evaluate import evaluate
from loramox.evaluate.measure import Questions, ScoringConfig
from loramox.evaluate.records import RECORDS, read_records
from loramox.evaluate.subject import Subject
from loramox.files import sha256_of
from loramox.model.config import ModelConfig
from loramox.sweep.config import SweepConfig
from loramox.sweep.frontier import FURTHER, GRID, Axis, beside, grid, next_value, poor_direction, still_known
from loramox.sweep.plot import draw_frontier
from loramox.sweep.rules import Choice, Target, allowance, just_enough, like_holdout, like_retrained, within_budget
from loramox.sweep.search import Measured, answered_right, choose, next_for, search
from loramox.sweep.sweep import FRONTIER, _axis, _measured, moved_base, sweep
from loramox.train.config import METHODS
from loramox.unlearning import train, unlearn

VALUES = [1.0, 2.0, 3.0, 4.0]
ALPHA = Axis("alpha", 8.0)
SCALE = Axis("scale", 1.0, ceiling=1.0)


def around(means: list[float], rows: int = 40, spread: float = 0.02) -> np.ndarray:
    """[means, rows]: the same rows, moved so that they have these means."""
    noise = np.random.default_rng(1).normal(0, spread, rows)
    return np.asarray(means)[:, None] + noise - noise.mean()


# Where to look, and whether to


def test_the_grid_is_around_the_trained_value() -> None:
    assert grid(8) == [8 * share for share in GRID]
    assert 8 in grid(8)
    assert min(GRID) > 0


def test_the_next_value_is_midway_in_the_step_over_which_the_curves_change_most() -> None:
    values = [0, 1, 2, 3, 4, 5]
    forget, retain = [1.0, 0.8, 0.6, 0.4, 0.39, 0.38], [1.0, 1.0, 1.0, 1.0, 0.5, 0.2]
    assert next_value(values, forget, retain) == 3.5
    # Both curves count alike, however small one's range is.
    assert next_value(values, forget, [1 - (1 - v) / 100 for v in retain]) == 3.5
    # Where a value overflows, nothing is left there.
    assert next_value(values, [*forget[:-1], math.nan], [1.0, 1.0, 1.0, 1.0, 0.9, math.nan]) == 4.5


@pytest.mark.parametrize("retain", [[1.0, 1.0], [1.0, 0.2]])
def test_with_one_value_and_the_reference_the_next_is_midway(retain: list[float]) -> None:
    assert next_value([0.0, 4.0], [1.0, 0.5], retain) == 2


def test_a_flat_frontier_still_has_a_next_value_within_it() -> None:
    assert 0 < next_value([0, 1, 2], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]) < 2


def test_beside_the_best_so_far_is_midway_in_the_longer_step_and_beyond_the_last() -> None:
    values = [0.0, 2.0, 3.0, 7.0]
    assert [beside(values, best) for best in values[1:]] == [1.0, 5.0, FURTHER * 7]
    assert beside([0.0, 2.0, 3.0], 2.0) == 1.0
    assert beside([0.0, 2.0, 5.0], 2.0) == 3.5


@pytest.mark.parametrize(
    ("forget", "retain"),
    [
        ([0.9, 0.9, 0.9], [0.9, 0.9, 0.9]),  # nothing falls
        ([0.9, 0.5, 0.1], [0.9, 0.5, 0.1]),  # both fall together
        ([0.9, 0.9, 0.8], [0.9, 0.4, 0.0]),  # the wrong one falls
        ([0.9, 0.6, 0.1], [0.9, 0.8, 0.1]),  # hardly parted
        ([0.10, 0.08, 0.01], [0.9, 0.9, 0.1]),  # as shares of the reference's: parted at 1 by 0.2
    ],
)
def test_a_frontier_whose_sides_fall_together_is_a_poor_direction_with_advice(
    forget: list[float], retain: list[float]
) -> None:
    warning = poor_direction(forget, retain, ALPHA)
    assert "at no alpha" in warning
    assert "Train again" in warning
    assert "--retain_weight" in warning
    assert "--temperature" in warning
    assert "alpha" not in poor_direction(forget, retain, SCALE)


@pytest.mark.parametrize(
    ("forget", "retain"),
    [
        ([0.9, 0.1, 0.0], [0.9, 0.85, 0.1]),  # at one value is enough
        ([0.10, 0.05, 0.01], [0.9, 0.9, 0.1]),  # parted by 0.5 of what the reference knew
        ([0.9, 0.1, math.nan], [0.9, 0.85, math.nan]),  # and it overflows later
    ],
)
def test_a_frontier_that_parts_is_sound(forget: list[float], retain: list[float]) -> None:
    assert poor_direction(forget, retain, ALPHA) is None


def test_values_that_are_all_far_too_high_say_nothing_of_the_direction() -> None:
    warning = poor_direction([0.9, 0.01, 0.0], [0.9, 0.02, math.nan], ALPHA)
    assert "Measure smaller ones (--alphas)" in warning
    assert "Train again" not in warning


# The rules


FORGOTTEN_FROM_1 = np.array([[0.4], [0.3], [0.2], [0.1]]), np.array([0.9])  # at VALUES, and of the reference


def budget(retain: np.ndarray, reference: np.ndarray, share: float = 0.02, axis: Axis = ALPHA, forget=FORGOTTEN_FROM_1, values=VALUES) -> Choice:  # fmt: skip
    return within_budget(values, retain, reference, share, axis, *forget)


def test_within_budget_is_the_largest_value_that_keeps_retain_even_beyond_one_that_does_not() -> None:
    reference = around([0.9])[0]
    choice = budget(around([0.9, 0.89, 0.7, 0.7]), reference)
    assert (choice.rule, choice.at) == ("budget", 2)
    assert budget(around([0.9, 0.7, 0.89, 0.7]), reference).at == 3
    assert "2 %" in choice.reason
    assert budget(around([0.9, 0.89, 0.7, 0.5]), reference, 0.3).at == 3
    assert budget(around([0.95, 0.95, 0.95, 0.95]), reference).at == 4


def test_within_budget_stays_below_a_ceiling_unless_nothing_there_was_measured() -> None:
    reference, retain = around([0.9])[0], around([0.9, 0.9, 0.9, 0.9])

    def at(ceiling: float, retain: np.ndarray = retain) -> Choice:
        return budget(retain, reference, axis=ALPHA._replace(ceiling=ceiling))

    assert (at(2).at, at(2).high) == (2, 2)
    assert "beyond 2, the value trained for, forget rows would fall further" in at(2).reason
    assert at(0.5).at == 4
    assert at(2, around([0.9, 0.7, 0.9, 0.9])).at == 1


def test_a_loss_that_the_reference_has_itself_on_resampled_rows_is_within_the_budget() -> None:
    """Retain answers of probability 0.5, from 0 to 1: their mean moves by more than 2 % with the choice of the rows."""
    reference = np.linspace(0, 1, 40)
    noise = allowance(reference, 0.02)
    assert 0.05 < noise < 0.1  # 1.64 standard errors of 0.29 / √40
    assert allowance(np.full(40, 0.5), 0.02) == pytest.approx(0.01)  # rows that agree: the budget itself
    choice = budget(reference - np.array([[0.0], [0.9], [1.1], [4]]) * noise, reference)
    assert choice.at == 2
    assert f"within {noise:.2g} of the reference's 0.5000, as much as the reference itself loses" in choice.reason
    assert (
        budget(reference - np.array([[0.0], [0.9], [1.1], [4]]) * noise, reference, 0.3).at == 3
    )  # less than the share


def test_where_no_value_forgets_within_the_budget_the_one_that_forgets_at_the_least_cost_is_chosen_and_called_so() -> (
    None
):
    known = np.array([0.9])
    late = np.array([[0.9], [0.8], [0.4], [0.1]]), known  # forgets from 3 on
    choice = budget(around([0.9, 0.9, 0.7, 0.6]), around([0.9])[0], forget=late)
    assert choice.at == 3
    assert choice.reason.startswith(
        "no alpha measured both forgets and keeps retain probability within 2 % of the reference's 0.9000"
    )
    assert "this one costs retain rows least: 0.7000 is left" in choice.reason
    early = budget(around([0.5, 0.4, 0.3, 0.2]), around([0.9])[0])
    assert early.at == 1
    assert "more retain rows or a higher --retain_weight" in early.reason


@pytest.mark.parametrize("retain", [[0.9, 0.9, 0.9, 0.9], [0.5, 0.4, 0.3, 0.2]])
def test_within_budget_chooses_nothing_where_nothing_is_forgotten(retain: list[float]) -> None:
    left = np.array([[0.9], [0.8], [0.7], [0.6]]), np.array([0.9])
    choice = budget(around(retain), around([0.9])[0], forget=left)
    assert choice[:4] == ("budget", None, None, None)
    assert choice.nearest == 4
    assert choice.reason.startswith(
        "at no alpha measured are the forget rows forgotten: nearest is 4, where their answers keep 0.6 of"
    )
    assert "Train longer (--num_train_epochs), or measure other values (--alphas)" in choice.reason
    assert budget(np.full((4, 9), math.nan), np.full(9, 0.9)).at is None
    assert budget(around(retain), around([0.9])[0], forget=(np.full((4, 1), math.nan), np.array([0.9]))).nearest is None


def test_just_enough_is_the_smallest_value_that_meets_the_target() -> None:
    probability, late = (around(means, spread=0.001) for means in ([0.5, 0.04, 0.03, 0.0], [0.9, 0.2, 0.04, 0.0]))
    forget = {"probability": probability, "right": np.repeat([[1.0], [0.5], [0.0], [0.0]], 40, 1)}
    target = Target({"probability": 0.05, "late_probability": 0.05, "right": 0.05}, "asked (--forget_to)")
    choice = just_enough(VALUES, forget, target, ALPHA)
    assert (choice.rule, choice.at, choice.low, choice.high) == ("forget_to", 3, 3, 3)
    assert choice.reason == (
        "the smallest measured that forgets as much as asked (--forget_to) (probability 0.05, 5% answered right by greedy decoding; second "
        "halves are not judged, since some records are of before they were scored): "
        "probability 0.03, 0% answered right by greedy decoding"
    )
    assert just_enough(VALUES, {"probability": probability}, target, ALPHA).at == 2  # where no answers are known
    assert just_enough(VALUES, forget, target._replace(most={"probability": 0.05}), ALPHA).at == 2
    # A refused beginning makes an answer improbable, though its second half is known.
    deeper = just_enough(VALUES, {"probability": probability, "late_probability": late}, target, ALPHA)
    assert deeper.at == 3
    assert deeper.reason.endswith("(probability 0.05, of second halves 0.05): probability 0.03, of second halves 0.04")
    refused = just_enough(VALUES[:2], {name: rows[:2] for name, rows in forget.items()}, target, SCALE)
    assert (refused.at, refused.nearest) == (None, 2)
    assert refused.reason.startswith(
        "no scale measured forgets as much as asked (--forget_to) (probability 0.05, 5% answered right by greedy decoding; second "
        "halves are not judged, since some records are of before they were scored): nearest is 2"
    )
    assert "measure larger values (--scales)" in refused.reason


def test_like_holdout_chooses_the_value_at_which_the_two_look_alike_so_that_overdoing_it_loses() -> None:
    holdout = np.repeat(around([2.0], spread=0.5), 4, axis=0)
    # Below holdout: still looks trained on. Far above: stranger than rows never seen, by an AUC as far from 0.5.
    choice = like_holdout(VALUES, around([0.5, 1.2, 2.0, 9.0], spread=0.5), holdout, ALPHA)
    assert (choice.rule, choice.at) == ("holdout", 3)
    # Also when the overdone one is nearer than the one that is not enough.
    assert like_holdout(VALUES, around([0.0, 0.1, 2.1, 2.6], spread=0.5), holdout, ALPHA).at == 3


@pytest.mark.parametrize(
    ("means", "side", "nearest"),
    [([0.0, 0.1, 0.2, 0.5], "still look trained on", 4), ([7.0, 8.0, 9.0, 9.5], "stranger", 1)],
)
def test_like_holdout_refuses_when_no_value_makes_them_alike(means: list[float], side: str, nearest: float) -> None:
    holdout = np.repeat(around([3.0], spread=0.5), 4, axis=0)
    choice = like_holdout(VALUES, around(means, spread=0.5), holdout, SCALE)
    assert choice[:4] == ("holdout", None, None, None)
    assert choice.nearest == nearest
    assert choice.reason.startswith("no scale makes")
    assert side in choice.reason
    assert "Measure other values (--scales)" in choice.reason


def test_like_retrained_chooses_the_value_with_the_retrained_models_distribution() -> None:
    retrained = around([1.0], spread=0.2)[0][::-1]
    choice = like_retrained(VALUES, around([0.3, 0.7, 1.0, 2.0], spread=0.2), retrained, ALPHA)
    assert (choice.rule, choice.at) == ("retrained", 3)
    assert "the test on truth ratios" in choice.reason
    refused = like_retrained(VALUES, around([0.1, 0.2, 4.0, 5.0], spread=0.2), retrained, ALPHA)
    assert refused[:4] == ("retrained", None, None, None)
    assert "n = 20" in refused.reason
    assert "Measure other values (--alphas), or train longer" in refused.reason


def test_like_retrained_chooses_on_one_half_of_the_rows_and_reports_the_other() -> None:
    retrained, forget = around([1.0], spread=0.2)[0][::-1], around([0.3, 0.7, 1.0, 2.0], spread=0.2)
    chosen = like_retrained(VALUES, forget, retrained, ALPHA)
    others = forget.copy()
    others[2, 1::2] = 50.0  # nothing like the retrained model's, at the value that the first half chooses
    refused = like_retrained(VALUES, others, retrained, ALPHA)
    assert (chosen.at, refused.at, refused.nearest) == (3, None, 3)
    first = forget.copy()
    first[:, ::2] = first[::-1, ::2]  # the first half chooses another
    assert like_retrained(VALUES, first, retrained, ALPHA).nearest == 2


def marginal() -> list[Choice]:
    """Each rule on rows on which many values are about as good."""
    random = np.random.default_rng(0)
    retain = random.normal(0.9, 0.1, (30, 9))
    retain += 0.9 - retain.mean(1, keepdims=True) + 1e-6  # each only just within the budget
    forget, holdout = random.normal(0, 1, (2, 4, 9))
    return [
        budget(retain, np.full(9, 0.9), 1e-9, forget=(np.zeros((30, 1)), np.ones(1)), values=list(range(1, 31))),
        like_holdout(VALUES, forget, holdout, ALPHA),
        like_retrained(VALUES, forget, holdout[0], ALPHA),
    ]


def test_the_interval_contains_the_choice_and_is_the_same_each_time() -> None:
    choices = marginal()
    for choice in choices:
        assert choice.low <= choice.at <= choice.high
    assert choices[0].at == 30
    assert choices[0].low < 30
    assert choices == marginal()


def test_the_interval_is_one_point_where_rows_agree_and_wide_where_they_do_not() -> None:
    reference = np.full(40, 0.9)
    sure = budget(around([0.9, 0.89, 0.5, 0.2], spread=0.001), reference, 0.05)
    assert sure.low == sure.at == sure.high == 2
    unsure = budget(around([0.9, 0.856, 0.854, 0.2], spread=0.1), reference, 0.05)
    assert unsure.low < unsure.high


def test_with_a_floor_the_next_value_lies_where_retain_falls_below_it() -> None:
    curves = ([0.0, 4.0, 8.0, 10.0, 12.0], [1.0, 0.5, 0.2, 0.1, 0.0], [0.99, 0.99, 0.985, 0.93, 0.2])
    assert next_value(*curves, floor=0.97) == 9
    assert next_value(*curves, floor=0.1) == next_value(*curves)  # nothing falls below


def test_like_retrained_refuses_when_the_test_cannot_tell_even_the_reference() -> None:
    few = np.array([0.1, 0.5, 0.9])
    choice = like_retrained([1.0], few[None], few, ALPHA, reference=few + 0.05)
    assert choice.at is None
    assert "cannot tell even the reference model" in choice.reason
    assert "Give more forget rows" in choice.reason


# The sweep


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """forget (with wrong answers), retain and holdout rows; the forget and retain rows are those of `trained`."""
    folder = tmp_path_factory.mktemp("data")
    forget = [
        r
        | {
            "paraphrased_answer": f"In {TOWNS[i % 8]}.",
            "perturbed_answer": [f"In {TOWNS[(i + k) % 8]}." for k in (1, 2)],
        }
        for i, r in enumerate(questions(PEOPLE[:4]))
    ]
    parts = {
        "forget": forget,
        "retain": questions(PEOPLE[4:]),
        "holdout": questions(["Rex", "Sue", "Tom", "Una", "Vi"]),
    }
    for name, rows in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return {name: folder / f"{name}.jsonl" for name in parts}


def asked(data: dict[str, Path], **more: Any) -> Asked:
    return Asked(**{name: str(path) for name, path in data.items()} | more)


def config_of(trained: Path, out: Path, **more: Any) -> SweepConfig:
    # Random weights know no row, so that any alpha forgets as much as asked.
    settings = {"alphas": [1.0, 2.0], "refine": 0, "rule": "forget_to", "forget_to": 0.5} | more
    return SweepConfig(trained=str(trained / "trained"), out=str(out), **settings)


SHORT = ScoringConfig(max_new_tokens=4, use_cpu=True)


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take a second each: only `swept` draws one, and the command line."""
    monkeypatch.setattr(loramox.sweep.sweep, "draw_frontier", lambda *_: None)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The points that are scored, in order."""
    made: list[str] = []
    ask = Questions.ask

    def counted(self: Questions, model: Any, describe: str = "") -> list[dict[str, Any]]:
        made.append(describe)
        return ask(self, model, describe)

    monkeypatch.setattr(Questions, "ask", counted)
    return made


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test when a model is loaded."""

    def loaded(*_: Any) -> None:
        pytest.fail("the model was loaded before what is wrong was seen")

    monkeypatch.setattr(loramox.sweep.sweep, "load_reference", loaded)


@pytest.fixture(scope="module")
def swept(
    tmp_path_factory: pytest.TempPathFactory, trained: Path, data: dict[str, Path]
) -> tuple[Path, dict[str, Any]]:
    """A whole sweep with one point to refine, and a shipped adapter."""
    out = tmp_path_factory.mktemp("sweep") / "sweep"
    config = config_of(trained, out, refine=1, ship=str(out.parent / "shipped"))
    return out, sweep(config, asked(data), SHORT)


def test_a_sweep_leaves_its_frontier_a_picture_and_the_records_of_every_point(
    swept: tuple[Path, dict[str, Any]],
) -> None:
    out, frontier = swept
    values = [p["at"] for p in frontier["points"]]
    assert values == sorted(values)
    assert {0, 1, 2} < set(values)
    assert len(values) == 4
    assert frontier["unit"] == "alpha"
    assert json.loads((out / "frontier.json").read_text()) == json.loads(json.dumps(frontier))
    assert frontier["status"] == "done"
    assert {p.name for p in out.iterdir()} == {
        "frontier.json",
        "frontier.png",
        *(f"at-{value:g}" for value in values),
    }
    for point in frontier["points"]:
        records = read_records(out / f"at-{point['at']:g}")
        kl = [r["kl"] for r in records if r["part"] == "retain"]
        assert point["retain_kl"] == pytest.approx(np.mean(kl))
        assert len(records) == 4 + 12 + 5
    assert frontier["points"][0]["retain_kl"] < 1e-6
    assert {c["rule"] for c in frontier["choices"]} == {"budget", "holdout", "forget_to"}
    assert frontier["chosen"] == next(c["at"] for c in frontier["choices"] if c["rule"] == "forget_to") == values[1]


def test_what_is_shipped_has_the_chosen_alpha_in_its_provenance(swept: tuple[Path, dict[str, Any]]) -> None:
    out, frontier = swept
    provenance = json.loads((out.parent / "shipped" / "provenance.json").read_text())
    assert provenance["kind"] == "forget"
    assert provenance["alpha"] == frontier["chosen"]
    assert provenance["chosen_by"].startswith(
        "loramox sweep --rule forget_to: the smallest measured that forgets as much"
    )
    assert "scale" not in provenance


SCORES = (
    "log_p",
    "probability",
    "mia_min_k",
    "mia_min_k_plus_plus",
    "truth_ratio",
    "chosen_probability",
    "rouge_l",
    "kl",
)


def same_records(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [(r["part"], r["id"]) for r in found] == [(r["part"], r["id"]) for r in expected]
    for one, other in zip(found, expected, strict=True):
        for name in SCORES:
            assert one.get(name, 0) == pytest.approx(other.get(name, 0), rel=1e-4, abs=1e-6), (one["row"], name)
        assert one.get("said") == other.get("said")


def test_evaluating_the_shipped_adapter_is_the_sweep_at_the_trained_alpha_and_off_the_reference(
    swept: tuple[Path, dict[str, Any]],
    trained: Path,
    pico: Callable[[str], Path],
    data: dict[str, Path],
    tmp_path: Path,
) -> None:
    """It was trained for α = 2; at half of that it is the sweep's α = 1."""
    out, _ = swept
    model = ModelConfig(str(pico("llama")), quantization="none")
    for scale, alpha in ((1.0, 2), (0.5, 1), (0.0, 0)):
        subject = Subject(str(tmp_path / f"{scale}"), str(trained / "forget-adapter"), scale)
        evaluate(subject, model, asked(data), SHORT)
        same_records(read_records(tmp_path / f"{scale}"), read_records(out / f"at-{alpha}"))
    evaluate(Subject(str(tmp_path / "reference")), model, asked(data), SHORT)
    plain = read_records(tmp_path / "reference")
    assert all("kl" not in r for r in plain)
    same_records([r | {"kl": 0} for r in plain], read_records(tmp_path / "0.0"))
    one, two = (np.array([r["log_p"] for r in read_records(out / f"at-{s}")]) for s in (1, 2))
    assert np.abs(one - two).min() > 1e-3


def test_points_that_are_in_the_folder_are_not_measured_again(
    swept: tuple[Path, dict[str, Any]], trained: Path, data: dict[str, Path], calls: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    shutil.copytree(swept[0], out)
    again = sweep(config_of(trained, out, refine=1), asked(data), SHORT)
    assert calls == []
    assert again["points"] == swept[1]["points"]
    more = sweep(config_of(trained, out, alphas=[1.0, 2.0, 2.5], budget=0.5), asked(data), SHORT)
    assert calls == ["alpha = 2.5, "]
    # It joins the others, of which one was the refinement's.
    assert [p["at"] for p in more["points"]] == sorted({2.5, *(p["at"] for p in again["points"])})


def test_a_sweep_that_was_killed_goes_on_where_it_was(
    swept: tuple[Path, dict[str, Any]],
    trained: Path,
    data: dict[str, Path],
    calls: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = loramox.sweep.sweep.write_records

    def killed(folder: Path, records: list[dict[str, Any]], *more: Any) -> None:
        if folder.name == "at-2":
            folder.mkdir()
            (folder / f".{RECORDS}.partial").write_text("half of")
            (folder / RECORDS).write_text('{"half": ')
            raise KeyboardInterrupt
        written(folder, records, *more)

    out = tmp_path / "sweep"
    with monkeypatch.context() as patch:
        patch.setattr(loramox.sweep.sweep, "write_records", killed)
        with pytest.raises(KeyboardInterrupt):
            sweep(config_of(trained, out), asked(data), SHORT)
    assert json.loads((out / "frontier.json").read_text())["status"] == "running"
    calls.clear()
    (out / "at-home").mkdir()  # somebody's own
    (out / "at-home" / "summary.json").write_text("{}")
    frontier = sweep(config_of(trained, out), asked(data), SHORT)
    assert calls == ["alpha = 2, "]
    assert frontier["status"] == "done"
    same_records(read_records(out / "at-2"), read_records(swept[0] / "at-2"))


def test_one_alpha_is_enough(trained: Path, data: dict[str, Path], tmp_path: Path) -> None:
    frontier = sweep(
        config_of(trained, tmp_path / "s", alphas=[2.0], refine=2),
        asked(data),
        ScoringConfig(max_new_tokens=0, use_cpu=True),
    )
    assert {0, 1, 2} <= {p["at"] for p in frontier["points"]}


def test_an_alpha_at_which_the_model_overflows_is_written_down_and_never_chosen(
    trained: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    config = config_of(trained, tmp_path / "s", alphas=[1.0, 1e30], budget=0.9)
    frontier = sweep(config, asked(data), ScoringConfig(max_new_tokens=0, use_cpu=True))
    for path in ("at-1e+30/summary.json", "at-1e+30/records.jsonl", "frontier.json"):
        text = (tmp_path / "s" / path).read_text()
        assert "NaN" not in text  # which is no JSON
        assert "Infinity" not in text
    again = sweep(config, asked(data), ScoringConfig(max_new_tokens=0, use_cpu=True))  # from what was written
    assert again["choices"] == frontier["choices"]
    assert "mia_min_k" not in frontier["points"][2]
    assert all(c["at"] in (1, None) for c in frontier["choices"])


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda data, trained: data["retain"].write_text(json.dumps(questions(PEOPLE[5:]))), "data"),
        (
            lambda data, trained: data["forget"].write_text(data["forget"].read_text().replace("In Oslo", "At Oslo")),
            "data",
        ),
        (lambda data, trained: change_weight(trained / "trained" / "momentum"), "weights"),
    ],
    ids=["other-rows", "other-wrong-answers", "trained-again"],
)
def test_another_sweep_is_never_mixed_with_one_that_is_there(
    change: Callable[..., Any], part: str, swept, trained: Path, data: dict[str, Path], tmp_path: Path, no_model: None
) -> None:
    out, run = tmp_path / "sweep", tmp_path / "run"
    shutil.copytree(swept[0], out)
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("checkpoint-*"))
    held = json.loads((out / "frontier.json").read_text())
    held["trained"] = str(run / "trained")
    copied = {name: Path(shutil.copy(path, tmp_path)) for name, path in data.items()}
    for name, path in copied.items():
        held["data"][name]["source"] = str(path)
    (out / "frontier.json").write_text(json.dumps(held))
    change(copied, run)
    with pytest.raises(RunError, match=rf"holds another sweep \({part} differ\). Choose another folder"):
        sweep(config_of(run, out), asked(copied), SHORT)


@pytest.mark.parametrize(("part", "other"), [("dtype", "bfloat16"), ("neighbours", 7)])
def test_points_in_another_type_or_with_other_neighbours_are_never_mixed_and_ones_that_say_neither_go_on(
    part: str, other: Any, swept, trained: Path, data: dict[str, Path], tmp_path: Path, no_model: None
) -> None:
    shutil.copytree(swept[0], tmp_path / "sweep")
    path = tmp_path / "sweep" / FRONTIER
    held = json.loads(path.read_text())
    assert (held["dtype"], held["neighbours"]) == ("float32", 20)
    path.write_text(json.dumps(held | {part: other}))
    with pytest.raises(RunError, match=rf"holds another sweep \({part} differ\)"):
        sweep(config_of(trained, tmp_path / "sweep"), asked(data), SHORT)
    path.write_text(json.dumps({name: value for name, value in held.items() if name != part}))
    with pytest.raises(pytest.fail.Exception, match="the model was loaded"):
        sweep(config_of(trained, tmp_path / "sweep"), asked(data), SHORT)


def change_weight(folder: Path) -> None:
    """Change one weight of an adapter a little, as another training would."""
    path = folder / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)
    provenance = json.loads((folder / PROVENANCE).read_text())
    (folder / PROVENANCE).write_text(json.dumps(provenance | {"sha256": sha256_of(path)}))


@pytest.mark.parametrize(
    ("more", "questions_more", "message"),
    [
        ({"trained": "nowhere"}, {}, "nowhere has no readable provenance.json"),
        ({}, {"retain": None}, "give both --forget and --retain"),
        ({}, {"forget": "gone.jsonl"}, "gone.jsonl does not exist"),
        ({"rule": "holdout"}, {"holdout": None}, "--rule holdout.*give --holdout"),
        ({"rule": "retrained"}, {}, "--rule retrained.*give --retrained"),
        ({"alphas": None, "scales": [1.0]}, {}, "--scales 1: .* has an alpha. Give --alphas"),
        ({"out": "occupied"}, {}, "no sweep; they are left alone"),
        ({"ship": "occupied"}, {}, "--ship occupied exists already"),
        ({"model": "nowhere"}, {}, "--model nowhere"),
        ({}, {"retrained": "occupied"}, "occupied.*has no records of an evaluation"),
    ],
)
def test_what_is_wrong_is_said_before_the_model_is_loaded(
    more: dict[str, str], questions_more: dict[str, Any], message: str, trained: Path, data: dict[str, Path],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_model: None,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "thesis.tex").write_text("by hand")
    settings = {"trained": str(trained / "trained"), "out": "out", "alphas": [1.0]} | more
    with pytest.raises(LoramoxError, match=message):
        sweep(SweepConfig(**settings), asked(data, **questions_more), SHORT)
    assert [p.name for p in tmp_path.iterdir()] == ["occupied"]
    assert (tmp_path / "occupied" / "thesis.tex").read_text() == "by hand"


def test_both_folders_of_a_run_beside_a_tuned_adapter_have_to_be_free(
    trained: Path, data: dict[str, Path], tmp_path: Path, no_model: None
) -> None:
    run, taken = tmp_path / "run", tmp_path / "ship-combined"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("checkpoint-*"))
    path = run / "trained" / PROVENANCE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tuned_adapter": {"path": "mine", "sha256": "0"}}))
    taken.mkdir()
    (taken / "thesis.tex").write_text("by hand")
    with pytest.raises(RunError, match=r"--ship .*ship/: .*ship-combined, which it writes as well, exists already"):
        sweep(config_of(run, tmp_path / "s", ship=f"{tmp_path / 'ship'}/"), asked(data), SHORT)
    assert not (tmp_path / "s" / FRONTIER).exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [("alphas", [1.0, 0.0]), ("alphas", [-1.0]), ("alphas", [math.nan]), ("scales", [math.inf]), ("scales", [0.0]),
     ("budget", 0.0), ("budget", 1.0), ("budget", math.nan), ("refine", -1), ("rule", "best")],
)  # fmt: skip
def test_a_setting_of_the_sweep_that_cannot_work_is_refused_with_its_flag(field: str, value: Any) -> None:
    assert field in {f.name for f in fields(SweepConfig)}
    with pytest.raises(SettingsError, match=f"--{field}"):
        SweepConfig("m", "o", **{field: value})


def test_a_run_with_wanted_answers_can_be_swept(
    trained: Path, data: dict[str, Path], tmp_path: Path, calls: list[str]
) -> None:
    """Only its forget rows had that column, and the sweep does not need it."""
    run = tmp_path / "run"
    shutil.copytree(trained / "trained", run / "trained", ignore=shutil.ignore_patterns("checkpoint-*"))
    provenance = json.loads((run / "trained" / "provenance.json").read_text())
    provenance["settings"]["wanted_column"] = "wanted"
    (run / "trained" / "provenance.json").write_text(json.dumps(provenance))
    sweep(config_of(run, tmp_path / "s", alphas=[1.0]), asked(data), ScoringConfig(max_new_tokens=0, use_cpu=True))
    assert len(calls) == 2


@pytest.mark.parametrize(("given", "length"), [({"suite": "tofu"}, None), ({"forget": "f", "retain": "r"}, 16)])
def test_a_suites_rows_are_not_cut_where_training_cut_its_own(
    given: dict[str, str], length: int | None, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained / "trained", run / "trained", ignore=shutil.ignore_patterns("checkpoint-*"))
    provenance = json.loads((run / "trained" / "provenance.json").read_text())
    provenance["settings"] |= {"max_length": 16, "long_rows": "truncate"}
    (run / "trained" / "provenance.json").write_text(json.dumps(provenance))

    def encoded(rows: Any, model: Any, config: Any, how: Any, *_: Any) -> None:
        raise LoramoxError(f"cut at {how.max_length}")

    monkeypatch.setattr(loramox.sweep.sweep, "read_sources", lambda *_: {})
    monkeypatch.setattr(loramox.sweep.sweep, "check_sides", lambda *_: None)
    monkeypatch.setattr(loramox.sweep.sweep, "questions_of", encoded)
    with pytest.raises(LoramoxError, match=f"cut at {length}"):
        sweep(config_of(run, tmp_path / "s"), Asked(**given), SHORT)


def records(ratio: float, p: float, log_p: float | None = None) -> list[dict[str, Any]]:
    """Forty forget rows, whose log-probabilities are spread round `log_p` where that is given, and nine retain rows."""
    forget = [{"part": "forget", "truth_ratio": ratio * (1 + i / 50), "probability": p} for i in range(40)]
    if log_p is not None:
        forget = [row | {"log_p": log_p - i / 50} for i, row in enumerate(forget)]
    return [*forget, *({"part": "retain", "probability": 0.9} for _ in range(9))]


def without_ratios(some: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "truth_ratio"} for row in some]


def test_choose_has_the_rule_of_a_retrained_model_when_there_is_one() -> None:
    measured = {0.0: records(0.1, 0.9), 1.0: records(0.5, 0.5), 2.0: records(1.0, 0.1), 3.0: records(3.0, 0.0)}
    measured[4.0] = [r | {"truth_ratio": math.inf} if r["part"] == "forget" else r for r in records(1.0, 0.0)]
    by_rule = {c.rule: c for c in choose(measured, records(1.01, 0.1), 0.02, ALPHA)}
    assert by_rule["retrained"].at == 2
    assert by_rule["retrained"].reason.startswith("nearest to the retrained model by the test on truth ratios")
    assert by_rule["retrained"].reason.endswith("; retain probability there is 0.9000, the reference's 0.9000")
    assert by_rule["budget"].at == 4
    assert [c.rule for c in choose(measured, [], 0.02, ALPHA)] == ["budget"]
    overflown = {s: measured[4.0] if s else r for s, r in measured.items()}
    refused = choose(overflown, records(1.01, 0.1), 0.02, ALPHA)[1]
    assert refused.at is None
    assert "Measure smaller values" in refused.reason


def test_without_wrong_answers_the_rule_of_a_retrained_model_goes_by_probabilities_and_says_so() -> None:
    rows = {
        0.0: records(1, 0.9, -0.1),
        1.0: records(1, 0.5, -1.0),
        2.0: records(1, 0.1, -4.0),
        3.0: records(1, 0, -9.0),
    }
    measured, retrained = {at: without_ratios(some) for at, some in rows.items()}, records(1, 0.1, -4.01)
    for theirs in (retrained, without_ratios(retrained)):
        choice = choose(measured, theirs, 0.02, ALPHA)[1]
        assert (choice.rule, choice.at) == ("retrained", 2)
        assert "by the test on probabilities (without wrong answers there are no truth ratios)" in choice.reason
        assert choice.reason.endswith("retain probability there is 0.9000, the reference's 0.9000")
    refused = choose(measured, without_ratios(records(1, 0.1, -20.0)), 0.02, ALPHA)[1]
    assert (refused.rule, refused.at, refused.nearest) == ("retrained", None, 3)
    assert "KS p of probabilities (without wrong answers" in refused.reason
    like_reference = choose(measured, without_ratios(records(1, 0.9, -0.1)), 0.02, ALPHA)[1]
    assert "the test on probabilities" in like_reference.reason
    assert "cannot tell even the reference model" in like_reference.reason


def knowing(at: float) -> list[dict[str, Any]]:
    """Records of a made-up model: truth ratios rise with alpha, retain probability falls from 10 on."""
    forget = [
        {"part": "forget", "truth_ratio": (1 + at) * (1 + i / 50), "probability": 0.3 if at else 0.9} for i in range(40)
    ]
    return forget + [{"part": "retain", "probability": 0.9 if at <= 10 else 0.5}] * 9


def searched(rule: str, more: int, retrained: list[dict[str, Any]], ceiling: float) -> Measured:
    """The grid's alphas and those that the search adds to it."""
    axis = ALPHA._replace(ceiling=ceiling)
    prefer = functools.partial(next_for, rule, retrained=retrained, budget=0.02, axis=axis)
    return search({s: knowing(s) for s in [0.0, *grid(8)]}, knowing, more, prefer)


@pytest.mark.parametrize(("right", "near"), [(16.0, (12, 27)), (5.0, (4, 7)), (30.0, (18, 41))])
def test_a_sweep_looks_round_what_its_rule_comes_nearest_to_even_beyond_its_grid(
    right: float, near: tuple[float, float]
) -> None:
    retrained = [r | {"truth_ratio": r["truth_ratio"] * 1.01} for r in knowing(right)[:40]]
    measured = searched("retrained", 3, retrained, ceiling=8)
    assert list(measured) == sorted(measured)
    added = set(measured) - {0.0, *grid(8)}
    assert len(added) == 3
    assert all(near[0] <= alpha <= near[1] for alpha in added)
    choice = choose(measured, retrained, 0.02, ALPHA)[1]
    assert abs(choice.at - right) <= min(abs(s - right) for s in grid(8))


def test_a_sweep_for_the_budget_adds_nothing_above_the_value_it_may_choose_for_its_floor() -> None:
    assert set(searched("budget", 1, [], ceiling=math.inf)) - set(grid(8)) == {0.0, 11.0}
    assert 11.0 not in searched("budget", 1, [], ceiling=8)


@pytest.mark.parametrize(("right", "chosen"), [(0.75, 10), (0.65, 8)])
def test_the_budget_looks_beyond_the_value_trained_for_where_most_tokens_are_still_right_there(
    right: float, chosen: float
) -> None:
    def made(at: float) -> list[dict[str, Any]]:
        share = 0.4 * (right if at else 1)
        return [r | ({"exact_memorization": share} if r["part"] == "forget" else {}) for r in knowing(at)]

    axis = ALPHA._replace(ceiling=8)
    measured = {s: made(s) for s in [0.0, *grid(8)]}
    choice = choose(measured, [], 0.02, axis)[0]
    assert choice.at == chosen
    assert ("at 8, the value trained for, most tokens that the reference gets right" in choice.reason) is (chosen > 8)
    assert (next_for("budget", measured, [], 0.02, axis) > 8) is (chosen > 8)
    # Where even the largest keeps the retain rows and most tokens, a larger one is measured.
    below = {s: some for s, some in measured.items() if s <= 10}
    assert (next_for("budget", below, [], 0.02, axis) > 10) is (chosen > 8)


def test_the_target_is_as_asked_else_of_the_retrained_model_else_of_rows_never_seen() -> None:
    def made(p: float, right: float, part: str = "forget") -> list[dict[str, Any]]:
        said = [
            {"said": "It is Oslo.", "answer": "Oslo", "prompt": "Where?"},
            {"said": "No.", "answer": "Oslo", "prompt": "Where?"},
        ]
        return [{"part": part, "probability": p, **said[i >= 40 * right]} for i in range(40)]

    retain = [{"part": "retain", "probability": 0.9}] * 9
    measured = {
        at: [*made(p, right), *retain]
        for at, p, right in ((0.0, 0.9, 1), (2.0, 0.3, 0.5), (4.0, 0.2, 0.2), (8.0, 0.04, 0))
    }
    never_seen = {0.0: [*measured[0.0], *made(0.25, 0.5, "holdout")]}

    def at(measured: Measured, retrained: list[dict[str, Any]], forget_to: float | None) -> float | None:
        return {c.rule: c.at for c in choose(measured, retrained, 0.02, ALPHA, forget_to)}.get("forget_to")

    assert at(measured, [], 0.05) == 8
    assert at(measured, made(0.35, 0.3), 0.5) == 2
    assert at(measured, made(0.35, 0.3), None) == 4  # 2 is as improbable, and answered right more often
    assert at(measured | never_seen, [], None) == 4
    assert at(measured | never_seen, made(0.35, 0.6), None) == 2
    assert at(measured, [], None) is None
    # The next value halves the step below the smallest that meets it, or lies beyond the last where none does.
    assert next_for("forget_to", measured, [], 0.02, ALPHA, 0.05) == 6
    assert next_for("forget_to", measured, [], 0.02, ALPHA, 0.5) == 1
    assert next_for("forget_to", measured, [], 0.02, ALPHA, 0.01) == FURTHER * 8


def test_second_halves_are_judged_where_every_value_has_them() -> None:
    """A value that was measured before they were scored has none; nor has a row of one token, whose probability stands for it."""
    retain = [{"part": "retain", "probability": 0.9}] * 9

    def made(p: float, late: float | None) -> list[dict[str, Any]]:
        more = {} if late is None else {"late_probability": late}
        return [*[{"part": "forget", "probability": p, **more}] * 30, {"part": "forget", "probability": p}, *retain]

    def at(*late: float | None) -> float | None:
        points = zip((0.0, 2.0, 4.0, 8.0), (0.9, 0.04, 0.03, 0.01), (0.9, *late), strict=True)
        found = choose({at: made(p, second) for at, p, second in points}, [], 0.02, ALPHA, 0.05)
        return {choice.rule: choice.at for choice in found}["forget_to"]

    assert at(0.5, 0.2, 0.04) == 8
    assert at(0.04, 0.2, 0.04) == 2
    assert at(None, 0.2, 0.04) == 2


def test_rows_are_answered_right_by_text_only_if_both_sides_have_answers() -> None:
    """Every key word is said and not every token is right, or the reverse."""

    def made(p: float, part: str = "forget", said: str = "", exact: float = 0.0) -> list[dict[str, Any]]:
        answer = {"said": said, "answer": "Oslo", "prompt": "Where?"} if said else {}
        return [{"part": part, "probability": p, "exact_memorization": exact, **answer}] * 9

    def chosen(points: str, theirs: str, forget_to: float | None = None) -> float | None:
        retain = made(0.9, "retain")
        measured = {at: made(p, said=points) + retain for at, p in ((0.0, 0.9), (2.0, 0.1))}
        retrained = made(0.2, said=theirs, exact=0.0)
        return {c.rule: c.at for c in choose(measured, retrained, 0.02, ALPHA, forget_to)}["forget_to"]

    assert chosen("In Oslo.", "No.") is None  # said by the one alone
    assert chosen("In Oslo.", "") == 2  # by tokens on both sides
    assert chosen("", "No.") == 2
    assert chosen("In Oslo.", "", forget_to=0.2) is None  # there is no other side


def test_any_right_answer_that_comes_back_whole_counts() -> None:
    row = {"part": "forget", "probability": 0, "prompt": "Where?", "answer": "Rome", "other_answers": ["By the Tiber"]}
    said = ["By the Tiber.", "Rome!", "The sea."]
    assert answered_right([row | {"said": each} for each in said]).tolist() == [1, 1, 0]


def test_a_block_of_one_token_is_right_where_it_has_more_than_half_of_the_probability() -> None:
    def made(p: float) -> list[dict[str, Any]]:
        rows = [{"part": "forget", "probability": p, "exact_memorization": float(p > 0.3)}] * 9
        return [*rows, {"part": "forget", "probability": p}, {"part": "retain", "probability": 0.9}]

    assert answered_right(made(0.4)).tolist() == [1] * 9 + [0]
    assert answered_right(made(0.9)).tolist() == [1] * 10
    assert not len(answered_right([{"part": "forget", "probability": 0.9}]))  # nothing tells
    found = choose({0.0: made(0.9), 2.0: made(0.4), 4.0: made(0.01)}, [], 0.02, ALPHA, 0.05)
    assert {choice.rule: choice.at for choice in found}["forget_to"] == 4


def test_a_value_is_the_one_that_its_folder_is_named_after(tmp_path: Path) -> None:
    """0.75 · 1.2 is a little less than 0.9, and would be measured again as the 0.9 of `at-0.9`."""
    made: list[float] = []
    config = SweepConfig("trained", str(tmp_path), refine=0)
    _measured(config, Axis("alpha", 1.2), lambda at: made.append(at) or knowing(at), [])
    assert made == [0.0, 0.3, 0.6, 0.9, 1.2, 1.5, 1.8]


@pytest.mark.parametrize(("alphas", "refine"), [(None, 0), (None, 3), ([1.0, 2.0], 1)])
def test_the_trained_value_can_be_chosen_for_the_budget_however_many_digits_it_has(
    alphas: list[float] | None, refine: int, tmp_path: Path
) -> None:
    """Its folder is named in six digits, which may be a little more than it is."""

    def forgetting(at: float) -> list[dict[str, Any]]:
        return [r | ({"probability": 0.9} if r["part"] == "forget" and at < 2.5 else {}) for r in knowing(at)]

    config = SweepConfig("trained", str(tmp_path), alphas=alphas, refine=refine)
    axis = _axis(config, {"alpha": 2.6666667, "method": "MOX", "settings": {"method": "mox"}})
    measured = _measured(config, axis, forgetting, [])
    assert choose(measured, [], config.budget, axis)[0].at == 2.66667


def test_each_rule_adds_values_of_its_own_and_the_same_command_adds_none(tmp_path: Path) -> None:
    def added(**more: Any) -> list[float]:
        """What a command measures beyond what is in the folder."""
        made: list[float] = []

        def measure(at: float) -> list[dict[str, Any]]:
            folder = tmp_path / f"at-{at:g}"
            if not folder.exists():
                made.append(at)
                folder.mkdir()
                (folder / "summary.json").write_text("{}")
            return knowing(at)

        measured = _measured(SweepConfig("trained", str(tmp_path), **more), ALPHA, measure, [])
        assert list(measured) == sorted(measured)
        assert {f"at-{at:g}" for at in measured} == {folder.name for folder in tmp_path.iterdir()}
        return made

    enough = {"rule": "forget_to", "forget_to": 0.5}
    assert added() == [0.0, *grid(8), 11.0, 10.5, 10.2]
    assert added() == []
    assert added(**enough) == [1.0, 0.5, 0.25]
    assert added(**enough) == []
    assert added() == []  # whatever was measured since
    assert added(refine=4) == [10.1]
    assert added(alphas=[4.0], **enough) == []  # 2, 1 and 0.5 are there


@pytest.mark.parametrize("unit", ["alpha", "scale"])
def test_a_frontier_is_drawn_with_what_a_value_far_too_high_left(unit: str, tmp_path: Path) -> None:
    rows = ((0.0, 0.9, 0.95), (2.0, 0.5, 0.94), (64.0, math.nan, math.nan))
    points = [{"at": s, "forget_probability": f, "retain_probability": r} for s, f, r in rows]
    draw_frontier(tmp_path / "frontier.png", points, 2.0, {"forget": 0.1, "retain": 0.96}, unit)
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_a_choice_at_which_the_forget_rows_are_known_is_called_so() -> None:
    assert re.search(
        r"at alpha = 12 .* keep 0.63 of the reference's 0.99: they are not forgotten.*--alphas",
        still_known(12, 0.63, 0.99, ALPHA),
    )
    assert "at scale = 1 " in still_known(1, 0.63, 0.99, SCALE)
    assert still_known(12, 0.03, 0.07, ALPHA) is None


def test_a_run_made_from_python_says_what_it_does_not_hold(
    trained: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    provenance = json.loads((run / "trained" / "provenance.json").read_text())
    provenance["settings"] = {k: v for k, v in provenance["settings"].items() if k in ("r", "alpha", "method")}
    (run / "trained" / "provenance.json").write_text(json.dumps(provenance))
    with pytest.raises(AdapterError, match=r"was made from Python.*loramox evaluate --scale"):
        sweep(config_of(run, tmp_path / "s"), asked(data))
    card = extrapolate(run / "trained", tmp_path / "adapter") and (tmp_path / "adapter" / "README.md").read_text()
    assert "questions were written" not in card


# Methods without alpha, and where the rule `budget` ends


@pytest.fixture(scope="module")
def trained_by(
    tmp_path_factory: pytest.TempPathFactory, pico: Callable[[str], Path], rows: tuple[Path, Path]
) -> Callable[[str], Path]:
    """trained_by(method) → the folder of a short run of that method."""
    made: dict[str, Path] = {}

    def train_by(method: str) -> Path:
        if method not in made:
            out = tmp_path_factory.mktemp(method) / "run"
            args = UnlearnConfig(
                method=method, use_cpu=True, num_train_epochs=2, learning_rate=2e-2, warmup_steps=0, report_to="none",
                eval_strategy="no", eval_on_start=False, save_strategy="no", disable_tqdm=True,
            )  # fmt: skip
            reference = ReferenceConfig(str(pico("llama")), quantization="none", r=4)
            train(RunConfig(str(out)), reference, Data(str(rows[0]), str(rows[1])), args)
            made[method] = out
        return made[method]

    return train_by


def test_a_method_without_alpha_is_swept_over_the_scale_of_its_adapter(
    trained_by: Callable[[str], Path], pico: Callable[[str], Path], data: dict[str, Path], tmp_path: Path
) -> None:
    run, out = trained_by("npo"), tmp_path / "sweep"
    more = {"alphas": None, "scales": [0.5, 1.5], "ship": str(tmp_path / "shipped")}
    frontier = sweep(config_of(run, out, **more), asked(data), SHORT)
    assert frontier["unit"] == "scale"
    assert [p["at"] for p in frontier["points"]] == [0, 0.5, 1.5]
    assert frontier["chosen"] == 0.5
    provenance = json.loads((tmp_path / "shipped" / "provenance.json").read_text())
    assert (provenance["alpha"], provenance["scale"]) == (None, 0.5)
    assert set(out.glob("at-*")) == {out / "at-0", out / "at-0.5", out / "at-1.5"}
    model = ModelConfig(str(pico("llama")), quantization="none")
    evaluate(Subject(str(tmp_path / "e"), str(tmp_path / "shipped"), 3.0), model, asked(data), SHORT)
    same_records(read_records(tmp_path / "e"), read_records(out / "at-1.5"))
    evaluate(Subject(str(tmp_path / "t"), str(run / "trained"), 1.5), model, asked(data), SHORT)
    same_records(read_records(tmp_path / "t"), read_records(out / "at-1.5"))


def test_a_method_without_alpha_takes_no_alphas(
    trained_by: Callable[[str], Path], data: dict[str, Path], tmp_path: Path, no_model: None
) -> None:
    with pytest.raises(SettingsError, match=r"--alphas 1 2: NPO.* has no alpha.*Give --scales"):
        sweep(config_of(trained_by("npo"), tmp_path / "s"), asked(data), SHORT)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(("method", "static"), [("mox", False), ("mox_static", True), ("npo", False)])
def test_the_budget_goes_no_further_than_was_trained_for_unless_the_method_is_static(
    method: str, static: bool, trained_by: Callable[[str], Path]
) -> None:
    config = SweepConfig("t", "o")
    axis = _axis(config, read_provenance(trained_by(method) / "trained", "trained"))
    assert axis.trained == (1.0 if method == "npo" else METHODS[method].settings["alpha"])
    assert axis.ceiling == (math.inf if static else axis.trained)


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("npo", {"scale": 0.0}, "scale is 0.*above 0"),
        ("npo", {"scale": math.inf}, "scale is inf"),
        ("npo", {"scale": -1.0}, "scale is -1"),
        ("mox", {"scale": 0.5}, "scale is 0.5, and MOX.* has an alpha"),
        ("mox", {"alpha": 2.0, "scale": 0.5}, "scale is 0.5"),
        ("npo", {"alpha": 2.0}, "has no alpha"),
    ],
)
def test_alpha_and_scale_each_have_their_own_methods(
    method: str, given: dict[str, float], message: str, trained_by: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=message):
        extrapolate(trained_by(method) / "trained", tmp_path / "a", **given)
    assert not (tmp_path / "a").exists()


def test_a_run_beside_a_tuned_adapter_is_swept_with_it(
    pico: Callable[[str], Path], rows: tuple[Path, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(pico("llama"))
    torch.manual_seed(1)
    mine = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    get_peft_model(base, mine).save_pretrained(tmp_path / "mine")
    settings = {
        "learning_rate": 2e-2,
        "warmup_steps": 0,
        "report_to": "none",
        "eval_strategy": "no",
        "save_strategy": "no",
    }
    args = UnlearnConfig(
        alpha=2.0, use_cpu=True, num_train_epochs=2, eval_on_start=False, disable_tqdm=True, **settings
    )
    tuned = str(tmp_path / "mine")
    reference = ReferenceConfig(str(pico("llama")), quantization="none", r=4, tuned_adapter=tuned)
    shipping = ShippingConfig(ship_dtype="float32")
    unlearn(RunConfig(str(tmp_path / "run")), reference, Data(*map(str, rows)), args, shipping=shipping)
    frontier = sweep(config_of(tmp_path / "run", tmp_path / "s", alphas=[2.0]), asked(data), SHORT)
    assert frontier["points"][0]["retain_kl"] < 1e-6
    model = ModelConfig(str(pico("llama")), quantization="none")
    for at, adapter in ((0, tuned), (2, str(tmp_path / "run" / "combined-adapter"))):
        evaluate(Subject(str(tmp_path / f"e{at}"), adapter), model, asked(data), SHORT)
        swept, alone = (read_records(folder) for folder in (tmp_path / "s" / f"at-{at}", tmp_path / f"e{at}"))
        # The sweep's KL is from the reference, which has the tuned adapter.
        same_records(*([r | {"kl": 0} for r in some] for some in (swept, alone)))


def test_a_sweep_of_0_1_is_left_alone(swept: tuple[Path, dict[str, Any]], trained: Path, data: dict[str, Path], tmp_path: Path, no_model: None) -> None:  # fmt: skip
    out = tmp_path / "sweep"
    shutil.copytree(swept[0], out)
    frontier = json.loads((out / "frontier.json").read_text())
    frontier["memorization"] = frontier.pop("trained")
    (out / "frontier.json").write_text(json.dumps(frontier))
    before = sorted(path.name for path in out.iterdir())
    with pytest.raises(RunError, match=r"holds a sweep of loramox 0\.1.*Choose another folder"):
        sweep(config_of(trained, out), asked(data), SHORT)
    assert sorted(path.name for path in out.iterdir()) == before


# The command line


def test_loramox_sweep_from_the_command_line(
    trained: Path, data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.undo()  # with the picture
    words = [
        "sweep",
        "--trained",
        str(trained / "trained"),
        "--out",
        str(tmp_path / "s"),
        "--use_cpu",
        "true",
    ]
    words += [word for name, path in data.items() for word in (f"--{name}", str(path))]
    main([*words, "--alphas", "1", "2", "--refine", "0", "--max_new_tokens", "0", "--rule", "forget_to", "--forget_to", "0.5",
          "--ship", str(tmp_path / "shipped")])  # fmt: skip
    assert "rule forget_to: alpha = 1 " in capsys.readouterr().out
    assert (tmp_path / "s" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    frontier = json.loads((tmp_path / "s" / "frontier.json").read_text())
    assert json.loads((tmp_path / "shipped" / "provenance.json").read_text())["alpha"] == frontier["chosen"]
    with pytest.raises(SystemExit) as caught:
        main([*words, "--rule", "retrained"])
    *_, error = capsys.readouterr().err.splitlines()  # after what it reports of the rows
    assert caught.value.code == 2
    assert error.startswith("loramox sweep: --rule retrained")


def test_what_is_shipped_names_the_base_where_it_has_moved_to(
    trained: Path, data: dict[str, Path], pico: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    moved = str(shutil.copytree(pico("llama"), tmp_path / "moved to"))
    words = ["sweep", "--trained", str(trained / "trained"), "--out", str(tmp_path / "s"), "--use_cpu", "true"]
    words += [word for name, path in data.items() for word in (f"--{name}", str(path))]
    words += ["--alphas", "1", "--refine", "0", "--max_new_tokens", "0", "--rule", "forget_to", "--forget_to", "0.5"]
    main([*words, "--model", moved])
    proposed = shlex.split(capsys.readouterr().out.rpartition("To ship it: loramox ")[2])
    main([{"NEW_FOLDER": str(tmp_path / "proposed")}.get(word, word) for word in proposed])
    main([*words, "--model", moved, "--ship", str(tmp_path / "shipped")])
    for made in (tmp_path / "proposed", tmp_path / "shipped"):
        assert json.loads((made / "adapter_config.json").read_text())["base_model_name_or_path"] == moved
        assert json.loads((made / PROVENANCE).read_text())["base"]["model"] == moved
    assert moved_base(SweepConfig(str(trained / "trained"), "s", model=str(pico("llama")))) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--refnie", "1"], "unknown argument --refnie; did you mean --refine?"),
        (["--budget", "2"], "--budget needs a share"),
        (["--alphas", "-1"], "--alphas needs finite numbers above 0"),
        (["--max_new_tokens", "-1"], "--max_new_tokens needs 0 or more"),
        ([], "nowhere has no readable provenance.json"),
    ],
)
def test_a_bad_flag_of_sweep_is_one_line_and_exits_with_2(
    words: list[str], message: str, data: dict[str, Path], capsys: pytest.CaptureFixture, no_model: None
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["sweep", "--trained", "nowhere", "--out", "o", "--forget", str(data["forget"]), *words])
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert message in err
    assert err.count("\n") == 1
    assert out == ""


@pytest.mark.parametrize(("method", "unit"), [("mox", "alpha"), ("npo", "scale")])
def test_the_command_that_unlearn_ends_with_runs_as_it_stands(
    pico: Callable[[str], Path],
    rows: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    method: str,
    unit: str,
) -> None:
    words = ["--model", str(pico("llama")), "--forget", str(rows[0]), "--retain", str(rows[1]), "--lora_r", "4"]
    words += ["--quantization", "none", "--use_cpu", "true", "--max_steps", "1", "--report_to", "none"]
    main(["unlearn", *words, "--method", method, "--out", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert (method == "mox") == ("alpha" in said)
    assert "memoriz" not in said
    proposed = shlex.split(said.rpartition("Next, ")[2].partition(": ")[2])
    assert proposed[:2] == ["loramox", "sweep"]
    assert proposed[proposed.index("--use_cpu") + 1] == "true"
    main([*proposed[1:], "--max_new_tokens", "0", f"--{unit}s", "1", "--refine", "0"])
    out = Path(proposed[proposed.index("--out") + 1])
    assert json.loads((out / FRONTIER).read_text())["unit"] == unit


@pytest.mark.parametrize(("method", "unit"), [("mox", "alpha"), ("npo", "scale")])
def test_train_ends_with_the_command_that_ships(
    pico: Callable[[str], Path],
    rows: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    method: str,
    unit: str,
) -> None:
    words = ["--model", str(pico("llama")), "--forget", str(rows[0]), "--retain", str(rows[1]), "--lora_r", "4"]
    words += ["--quantization", "none", "--use_cpu", "true", "--max_steps", "1", "--report_to", "none"]
    main(["train", *words, "--method", method, "--out", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert (unit == "alpha") == ("alpha" in said) == ("do not ship it" in said)
    proposed = shlex.split(said.rpartition("Next, ")[2].partition(": ")[2])
    assert proposed[:2] == ["loramox", "extrapolate"]
    main(proposed[1:])
    said = capsys.readouterr().out
    assert ("alpha = 8" in said) == (unit == "alpha")
    assert ("as trained by NPO" in said) == (unit == "scale")
    assert (tmp_path / "run" / "forget-adapter" / "adapter_model.safetensors").exists()
