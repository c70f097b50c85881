"""Just enough forgetting: a target, the smallest alpha or scale that meets it, and training that ends when it is met."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerState

from loramox import Data, ReferenceConfig, RunConfig, UnlearnConfig
from loramox.adapter.export import extrapolate
from loramox.cli import main
from loramox.errors import SettingsError
from loramox.evaluate.row_metrics import late_probability
from loramox.model.head import AnswerStates
from loramox.train.callbacks import AroundSteps
from loramox.train.target import (
    JUST_ENOUGH,
    SCORES,
    SHARES,
    advice_on_target,
    check_target,
    choose_share,
    choose_target,
    is_met,
    met_at_last,
    said,
)
from loramox.train.watched import _is_right, _late
from loramox.unlearning import unlearn

Rows = tuple[Path, Path]


def run_of(pico: Callable[[str], Path], rows: Rows, out: Path, resume: bool = False, **settings: Any) -> dict[str, Any]:
    """A run of `unlearn` on the pico Llama, of random weights, whose answers have probabilities of about 1/320."""
    settings = {"num_train_epochs": 3, "learning_rate": 2e-2, "alpha": 2.0, "seed": 0} | settings
    args = UnlearnConfig(use_cpu=True, report_to="none", disable_tqdm=True, **settings)
    reference = ReferenceConfig(str(pico("llama")), quantization="none", r=4, lora_alpha=8)
    return unlearn(RunConfig(str(out), resume=resume), reference, Data(str(rows[0]), str(rows[1])), args)


@pytest.mark.parametrize("above", [None, *SCORES])
def test_a_target_is_of_the_probability_that_of_second_halves_and_greedy_decoding(above: str | None) -> None:
    scores = {f"eval_forget_{name}": 0.06 if name == above else 0.05 for name in SCORES}
    assert is_met(0.05, scores) is (above is None)


@pytest.mark.parametrize(
    ("given", "targeted", "chosen"),
    [(None, True, JUST_ENOUGH), (None, False, None), (0.0, True, None), (0.2, True, 0.2), (0.2, False, 0.2)],
)
def test_just_enough_is_the_default_where_another_answer_is_taught(given: float | None, targeted: bool, chosen: float | None) -> None:  # fmt: skip
    args = UnlearnConfig(use_cpu=True, forget_to=given)
    choose_target(args, targeted)
    assert args.forget_to == chosen


def test_only_the_evaluation_of_the_last_step_counts_and_never_the_references() -> None:
    low, high = ({f"eval_forget_{name}": value for name in SCORES} for value in (0.01, 0.5))

    def met(step: int, *log: dict[str, float]) -> bool:
        state = TrainerState(global_step=step)
        state.log_history = list(log)
        return met_at_last(state, 0.05)

    assert met(2, high | {"step": 1}, low | {"step": 2}, {"eval_retain_probability": 0.9, "step": 2})
    assert not met(2, low | {"step": 1}, high | {"step": 2})
    assert not met(2, low | {"step": 1})
    assert not met(0, low | {"step": 0})


def test_a_row_is_right_when_all_tokens_but_its_last_are_the_first_choice() -> None:
    first = torch.tensor([1.0, 1, 0, 1, 0, 1, 0, 1])
    states = AnswerStates(first[:, None], first, torch.tensor([0, 0, 0, 1, 1, 1, 2, 3]), 4)
    assert _is_right(first, states).tolist() == [True, False, False, True]


def test_the_second_half_of_an_answer_is_that_of_evaluate_without_its_last_token() -> None:
    log_p = -torch.arange(1.0, 16.0)
    states = AnswerStates(log_p[:, None], log_p, torch.tensor([0] + [1] * 2 + [2] * 5 + [3] * 7), 4)
    found, lengths = _late(log_p, states), [1, 2, 5, 7]
    for late, row, n in zip(found, log_p.split(lengths), lengths, strict=True):
        assert late.exp().item() == pytest.approx(late_probability(row[: max(1, n - 1)].numpy()))
    assert found.tolist() == [-1, -2, -6.5, -13]


def test_unlearn_ships_the_smallest_share_that_meets_the_target(pico: Callable[[str], Path], rows: Rows, tmp_path: Path) -> None:  # fmt: skip
    record = run_of(pico, rows, tmp_path / "run", forget_to=0.5)  # the reference itself meets it
    assert record["forget_to"]["at"] == record["forget_adapter"]["alpha"] == SHARES[0] * 2.0
    assert record["forget_to"]["met"]
    provenance = json.loads((tmp_path / "run" / "forget-adapter" / "provenance.json").read_text())
    assert provenance["alpha"] == 0.5
    assert provenance["chosen_by"].startswith("--forget_to 0.5 chose alpha = 0.5, the smallest")
    assert not any("target is missed" in each for each in record["advice"])


def test_the_command_that_train_proposes_ships_the_scale_that_was_chosen(pico: Callable[[str], Path], rows: Rows, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:  # fmt: skip
    run = f"--model {pico('llama')} --quantization none --r 4 --forget {rows[0]} --retain {rows[1]} --out {tmp_path / 'run'}"
    settings = "--method npo --num_train_epochs 1 --use_cpu true --report_to none --disable_tqdm true"
    main(["train", *run.split(), *settings.split(), "--forget_to", "0.5"])  # which the reference itself meets
    proposed = re.search(r"--scale \S+", capsys.readouterr().out)[0].split()
    main(["extrapolate", str(tmp_path / "run" / "trained"), *proposed, "--out", str(tmp_path / "out")])
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert (provenance["alpha"], provenance["scale"]) == (None, 0.25)


def test_where_no_share_meets_the_target_it_ships_as_trained_and_says_so(pico: Callable[[str], Path], rows: Rows, tmp_path: Path) -> None:  # fmt: skip
    settings = {"method": "npo", "alpha": None, "num_train_epochs": 1, "learning_rate": 0.0}
    record = run_of(pico, rows, tmp_path / "run", forget_to=1e-9, **settings)
    chosen = record["forget_to"]
    assert (chosen["unit"], chosen["at"], chosen["met"]) == ("scale", 1.0, False)
    assert [each["at"] for each in chosen["measured"]] == list(SHARES)
    assert record["advice"][-1].startswith("the target is missed: --forget_to 1e-09 chose scale = 1, as trained")
    assert "--num_train_epochs above 1" in record["advice"][-1]


def test_training_ends_where_the_target_is_met_and_resuming_leaves_it_at_that(pico: Callable[[str], Path], rows: Rows, tmp_path: Path) -> None:  # fmt: skip
    out = tmp_path / "run"
    record = run_of(pico, rows, out, forget_to=0.5, stop_when_forgotten=True)
    assert record["ended_early"] == {"epoch": 1.0, "why": "--stop_when_forgotten: the forget rows meet --forget_to 0.5"}
    weights = (out / "trained" / "momentum" / "adapter_model.safetensors").read_bytes()
    # As if it was killed after the checkpoint, before the results.
    for name in ("provenance.json", "momentum"):
        path = out / "trained" / name
        path.rename(tmp_path / name)
    record = json.loads((out / "run.json").read_text()) | {"status": "running"}
    (out / "run.json").write_text(json.dumps(record))
    again = run_of(pico, rows, out, resume=True, forget_to=0.5, stop_when_forgotten=True)
    assert again["ended_early"] == record["ended_early"]
    assert (out / "trained" / "momentum" / "adapter_model.safetensors").read_bytes() == weights


def killed_at(step: int, pico: Callable[[str], Path], rows: Rows, out: Path, **settings: Any) -> None:
    """A run that is killed when the checkpoint of a step is written."""
    real = AroundSteps.on_save

    def stop(self, args, state, control, **kwargs):
        real(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AroundSteps, "on_save", stop)
        with pytest.raises(KeyboardInterrupt):
            run_of(pico, rows, out, **settings)


def test_training_ends_at_a_checkpoint_that_was_killed_before_it_was_scored(pico: Callable[[str], Path], rows: Rows, tmp_path: Path) -> None:  # fmt: skip
    settings = {"forget_to": 0.5, "stop_when_forgotten": True, "save_strategy": "steps", "save_steps": 1}
    killed_at(1, pico, rows, tmp_path / "killed", **settings)
    records = [run_of(pico, rows, tmp_path / "killed", resume=True, **settings), run_of(pico, rows, tmp_path / "whole", **settings)]  # fmt: skip
    assert [record["ended_early"]["epoch"] for record in records] == [1.0, 1.0]
    one, two = ((tmp_path / name / "trained" / "momentum" / "adapter_model.safetensors").read_bytes() for name in ("killed", "whole"))  # fmt: skip
    assert one == two


def test_training_may_end_before_the_first_update_of_the_momentum(pico: Callable[[str], Path], rows: Rows, tmp_path: Path) -> None:  # fmt: skip
    """What ships is what was scored: ΔW itself."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "per_device_train_batch_size": 1}
    record = run_of(pico, rows, tmp_path / "run", forget_to=0.5, stop_when_forgotten=True, **settings)
    assert record["ended_early"]["epoch"] == 0.25
    assert record["momentum"]["updates"] == 1
    assert (tmp_path / "run" / "forget-adapter" / "provenance.json").exists()


def test_the_momentum_is_updated_where_a_resumed_run_ends(pico: Callable[[str], Path], rows: Rows, tmp_path: Path) -> None:  # fmt: skip
    killed_at(2, pico, rows, tmp_path / "run", per_device_train_batch_size=2)  # two steps an epoch
    record = run_of(pico, rows, tmp_path / "run", resume=True, per_device_train_batch_size=2, num_train_epochs=1.5)
    assert record["ended_early"]["epoch"] == 1.5
    assert record["momentum"]["updates"] == 2


def test_a_resumed_run_may_end_before_its_plan(pico: Callable[[str], Path], rows: Rows, tmp_path: Path) -> None:
    """It is the beginning of the planned run: the learning rate is the planned one."""
    for epoch in (1, 2):  # of one step each
        killed_at(epoch, pico, rows, tmp_path / f"killed-{epoch}")
    # A run that has not finished ships from its checkpoint.
    made = extrapolate(tmp_path / "killed-2" / "trained" / "checkpoint-2", tmp_path / "early")
    assert (made["alpha"], made["checkpoint"], made["momentum"]["eta"]) == (2.0, "checkpoint-2", 0.675)
    assert "from `checkpoint-2` of its run" in (tmp_path / "early" / "README.md").read_text()
    records = [run_of(pico, rows, tmp_path / f"killed-{epoch}", resume=True, num_train_epochs=2) for epoch in (1, 2)]
    for record in records:
        assert record["status"] == "done"
        assert record["ended_early"] == {"epoch": 2.0, "why": "resumed with --num_train_epochs 2"}
        assert record["settings"]["num_train_epochs"] == 3  # the plan
    one, two = ((tmp_path / f"killed-{e}" / "trained" / "momentum" / "adapter_model.safetensors").read_bytes() for e in (1, 2))  # fmt: skip
    assert one == two


@pytest.mark.parametrize(
    ("settings", "reference", "message"),
    [
        ({"stop_when_forgotten": True}, {}, "--stop_when_forgotten needs a target: give --forget_to"),
        ({"stop_when_forgotten": True, "forget_to": 0.1, "eval_strategy": "no"}, {}, "leave out --eval_strategy no"),
        ({"forget_to": 0.1}, {"memorize_at": "earlier"}, "--forget_to: with --memorize_at"),
    ],
)
def test_a_target_that_cannot_be_measured_is_refused(settings: Any, reference: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        check_target(UnlearnConfig(use_cpu=True, **settings), ReferenceConfig("m", **reference))


@pytest.mark.parametrize("value", [1.0, -0.1])
def test_a_target_is_a_probability(value: float) -> None:
    with pytest.raises(SettingsError, match="--forget_to needs a probability"):
        UnlearnConfig(use_cpu=True, forget_to=value)


@pytest.mark.parametrize(
    ("fluent_from", "at", "said_so"),
    [
        (None, 3.0, "the smallest of 2, 3 that meets the target (probability 0.04"),
        (0.25, 3.0, "the smallest of 2, 3 that meets the target with fluent answers"),
        (0.625, 5.0, "the smallest of 2, 3, 4, 5 that meets the target with fluent answers"),
        (2.0, 3.0, "the most fluent of 2, 3, 4, 5, 6, 7, 8 that meets the target; none has 95% of its answers fluent"),
    ],
)
def test_what_ships_meets_the_target_and_answers_fluently_where_another_answer_was_taught(
    fluent_from: float | None, at: float, said_so: str
) -> None:
    """The target is met from 3/8 of alpha on, and answers are fluent from `fluent_from` on."""

    def predict(rows: list[int], metric_key_prefix: str) -> SimpleNamespace:
        return SimpleNamespace(
            metrics={"at_probability": 0.015 / trainer.share, "at_late_probability": 0.0, "at_rows_right": 0.0}
        )

    args = SimpleNamespace(forget_to=0.05, alpha=8.0)
    trainer: Any = SimpleNamespace(args=args, eval_dataset={"forget": [1, 2]}, predict=predict, share=1.0)
    fluent = None if fluent_from is None else lambda: 1.0 if trainer.share >= fluent_from else 0.9
    chosen = choose_share(trainer, fluent)
    assert (chosen["at"], chosen["met"], trainer.share) == (at, True, at / 8)
    assert said_so in said(chosen)
    advised = advice_on_target(chosen, UnlearnConfig(use_cpu=True))
    assert [each.split(". ")[-1][:12] for each in advised] == (["Train longer"] if fluent_from == 2.0 else [])


def test_where_no_value_is_fluent_enough_the_most_fluent_that_meets_the_target_ships() -> None:
    def predict(rows: list[int], metric_key_prefix: str) -> SimpleNamespace:
        return SimpleNamespace(
            metrics={"at_probability": 0.015 / trainer.share, "at_late_probability": 0.0, "at_rows_right": 0.0}
        )

    args = SimpleNamespace(forget_to=0.05, alpha=8.0)
    trainer: Any = SimpleNamespace(args=args, eval_dataset={"forget": [1, 2]}, predict=predict, share=1.0)
    fluent = {0.375: 0.5, 0.5: 0.7, 0.625: 0.75, 0.75: 0.94, 0.875: 0.94, 1.0: 0.88}
    assert choose_share(trainer, lambda: fluent[trainer.share])["at"] == 6.0


def test_a_choice_is_said_in_one_sentence() -> None:
    measured = [
        {"at": at, "probability": p, "late_probability": late, "rows_right": right}
        for at, p, late, right in ((2.0, 0.4, 0.6, 0.5), (4.0, 0.03, 0.04, 0.0))
    ]
    chosen = {"target": 0.05, "unit": "alpha", "at": 4.0, "met": True, "rows": 18, "measured": measured}
    assert said(chosen) == (
        "--forget_to 0.05 chose alpha = 4, the smallest of 2, 4 that meets the target (probability 0.03, of second halves 0.04, 0% answered "
        "right by greedy decoding, 18 forget rows)"
    )
    for each in measured:
        del each["late_probability"]  # a record of before it was scored
    assert "(probability 0.03, 0% answered right by greedy decoding, 18 forget rows)" in said(chosen)
    assert (
        advice_on_target(chosen, UnlearnConfig(use_cpu=True)) == advice_on_target({}, UnlearnConfig(use_cpu=True)) == []
    )
