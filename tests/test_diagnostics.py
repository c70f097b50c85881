"""What is said at the end of a run: nothing when it went well, else the setting to change."""

import re

import pytest

from loramox.data.row import Row
from loramox.train.config import UnlearnConfig
from loramox.train.diagnostics import FEW, advice

WELL = ((0.99, 0.02), (0.99, 0.98))


def row(number: int, answer: str) -> Row:
    return Row("retain.jsonl", number, answer, f"Question {number}")


def said(
    forget: tuple[float, ...],
    retain: tuple[float, ...],
    rows: int = 100,
    answers: tuple[str, ...] = (),
    first: int = 0,
    **args,
) -> str:
    log = [{"loss": 1.0}] + [
        {f"eval_{part}_probability": value, "step": step}
        for part, curve in (("forget", forget), ("retain", retain))
        for step, value in enumerate(curve, first)
    ]
    kept = [row(i, answers[i] if i < len(answers) else f"some other answer {i}") for i in range(rows)]
    forgotten = [row(1, "Born in Rivertown, by the sea"), row(2, "Yes, indeed")]
    return "\n".join(advice(log, forgotten, kept, UnlearnConfig(use_cpu=True, **args)))


def test_nothing_is_said_of_a_run_that_went_well() -> None:
    assert said(*WELL) == ""


@pytest.mark.parametrize(
    ("forget", "retain", "rows", "args", "expected"),
    [
        ((0.03, 0.02), (0.99, 0.99), 100, {}, "hardly knows the forget rows"),
        (
            (0.99, 0.80),
            (0.99, 0.99),
            100,
            {"num_train_epochs": 7},
            "only went from 0.99 to 0.80.*--num_train_epochs above 7",
        ),
        ((0.99, 0.02), (0.99, 0.60), 100, {}, r"retain rows fell from 0.99 to 0.60: raise --retain_weight \(is 1\)"),
        ((0.99, 0.11), (0.99, 0.95), 100, {"num_train_epochs": 7}, "or train longer .--num_train_epochs above 7.;"),
        (*WELL, FEW - 1, {}, rf"few retain rows \({FEW - 1}\) protect little besides themselves.*Give {FEW} or more"),
        ((0.99, 0.02), (0.99, 0.60), 100, {"method": "npo"}, r"raise --retain_weight \(is 1\)"),
        ((0.99, 0.02), (0.99, 0.60), 100, {"method": "ga"}, "0.60: add a retain term"),
    ],
)
def test_what_went_wrong_is_named_with_the_setting_to_change(forget, retain, rows, args, expected) -> None:
    assert re.search(expected, said(forget, retain, rows, **args))


def test_too_little_training_is_not_blamed_where_the_retain_rows_fell_too() -> None:
    assert "only went from" not in said((0.99, 0.8), (0.99, 0.6))


@pytest.mark.parametrize(("last", "warns"), [(0.36, True), (0.27, False)])
def test_answers_that_are_improbable_by_a_few_tokens_alone_are_not_called_forgotten(last: float, warns: bool) -> None:
    log = [{f"eval_{part}_{name}": value, "step": step}
           for name, curves in (("probability", ((0.3, 0.001), (0.9, 0.9))), ("tokens_right", ((0.4, last), (0.9, 0.9))))
           for part, curve in zip(("forget", "retain"), curves, strict=True) for step, value in enumerate(curve)]  # fmt: skip
    kept = [row(i, f"some other answer {i}") for i in range(FEW)]
    said = "\n".join(advice(log, [row(1, "a")], kept, UnlearnConfig(use_cpu=True, alpha=6)))
    expected = r"36% of their tokens are still the model's first choice \(before: 40%\).*above 24\), or look beyond alpha = 6 with loramox sweep"
    assert bool(re.search(expected, said)) is warns
    assert warns or not said


def test_a_run_that_was_not_watched_is_judged_by_its_number_of_retain_rows_alone() -> None:
    assert said((), ()) == ""
    assert said((), (), rows=1).startswith("few retain rows (1) protect")


def test_a_run_whose_reference_was_not_scored_is_not_compared_with_its_first_epoch() -> None:
    assert said((0.9, 0.8), (0.9, 0.5), first=1) == said((0.01, 0.01), (0.9, 0.9), first=1) == ""


def test_retain_rows_with_the_answer_of_a_forget_row_are_counted_but_not_short_answers_that_are_the_same_by_chance() -> (
    None
):
    assert said(*WELL, answers=("Yes, indeed",)) == ""
    found = said(*WELL, answers=("Yes, indeed", "Born in Rivertown, by the sea"))
    assert found.startswith("some retain rows (1; first: row 1) have the answer of a forget row")
    assert "Remove them from the retain rows" in found


def test_one_line_for_each_fault() -> None:
    assert len(said((0.99, 0.02), (0.99, 0.6), rows=5).splitlines()) == 2
