"""What is looked at before a model is loaded: rows that belong together, sides that look swapped, the base of an adapter."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loramox import Data, ReferenceConfig, RunConfig, Tokenisation, UnlearnConfig
from loramox.adapter.provenance import check_asked_base, check_base
from loramox.data.rows import Columns
from loramox.errors import AdapterError, RowsError, RunError
from loramox.evaluate.asked import Asked
from loramox.evaluate.attacks.attack import attack
from loramox.evaluate.attacks.config import AttackConfig
from loramox.evaluate.evaluate import evaluate
from loramox.evaluate.measure import ScoringConfig
from loramox.evaluate.subject import Subject
from loramox.model.config import ModelConfig
from loramox.run import read_record
from loramox.sweep.config import SweepConfig
from loramox.sweep.sweep import sweep
from loramox.train.inputs import choose_learning_rate
from loramox.train.prepare import prepare
from loramox.unlearning import train


def run(pico: Path, data: Data, out: Path, columns: Columns | None = None, **how: Any) -> None:
    args = UnlearnConfig(method="altpo" if columns else "mox", use_cpu=True, report_to="none")
    train(
        RunConfig(str(out)), ReferenceConfig(str(pico), quantization="none"), data, args, columns, Tokenisation(**how)
    )


def test_a_forget_row_of_which_one_answer_is_too_long_is_named(
    pico: Callable[[str], Path], rows: tuple[Path, Path], tmp_path: Path
) -> None:
    """As many true answers as wanted ones are left, and they are not those of the same rows."""
    records = [{"question": f"{i}?", "answer": f"True {i}.", "other": f"Wanted {i}."} for i in range(4)]
    records[1]["answer"] = records[2]["other"] = "Rome " * 60
    forget = tmp_path / "forget.jsonl"
    forget.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(RowsError, match=r"forget.jsonl, row [23]: only one of its two answers"):
        run(
            pico("llama"),
            Data(str(forget), str(rows[1])),
            tmp_path / "run",
            Columns(wanted_column="other"),
            long_rows="drop",
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("instead", ["none", "refuse"])
@pytest.mark.parametrize("too_long", ["question", "answer"])
def test_a_row_that_is_dropped_as_too_long_is_dropped_with_what_is_taught_instead(
    too_long: str, instead: str, pico: Callable[[str], Path], rows: tuple[Path, Path], tmp_path: Path
) -> None:
    data = []
    for path in rows:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        records[1][too_long] = "Rome " * 60
        data.append(tmp_path / path.name)
        data[-1].write_text("".join(json.dumps(record) + "\n" for record in records))
    prepared = prepare(
        ReferenceConfig(str(pico("llama")), quantization="none"),
        Data(*map(str, data)),
        UnlearnConfig(use_cpu=True, report_to="none", instead=instead),
        Columns(),
        Tokenisation(long_rows="drop"),
    )
    kept = {part: [row.where for row in getattr(prepared, part)] for part in ("forget", "retain")}
    assert [len(some) for some in kept.values()] == [3, 11]
    kept["wanted"] = kept["forget"] if instead == "refuse" else []
    for part, some in kept.items():
        assert [example["row"] for example in prepared.datasets[f"{part}_dataset"]] == some


def test_more_rows_to_forget_than_to_retain_are_asked_about_before_anything_is_written(
    pico: Callable[[str], Path], rows: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years")
    with (
        pytest.warns(UserWarning, match="12 rows to forget, but only 4 to retain.*swap"),
        pytest.raises(RunError, match="files in it that are not a run"),
    ):
        run(pico("llama"), Data(str(rows[1]), str(rows[0])), tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_of_the_hub_a_commit_tells_one_base_from_another() -> None:
    base = {"model": "a/b", "revision": "one", "shape": "s", "weights": None}
    check_base({"base": base}, base | {"model": "mirror/b"}, Path("adapter"))
    check_base({"base": base}, base | {"revision": None}, Path("adapter"))
    with pytest.raises(
        AdapterError, match=r"was made for the base a/b, and a/c is at revision two, not at its one \(--revision\)"
    ):
        check_base({"base": base}, base | {"model": "a/c", "revision": "two"}, Path("adapter"))


@pytest.mark.parametrize("weights", [(None, "x"), ("x", None)])
def test_that_a_folder_and_a_model_of_the_hub_are_not_compared_is_said(weights: tuple[str | None, str | None]) -> None:
    trained, here = (
        {"model": model, "revision": None, "shape": "s", "weights": each}
        for model, each in zip(("a", "b"), weights, strict=True)
    )
    with pytest.warns(
        UserWarning, match=r"was made for a, and this is b\. .* not compared here: make sure that they are"
    ):
        check_asked_base({"base": trained}, here, Path("adapter"))


def test_rows_read_and_rows_left_out_are_counted_and_recorded(
    pico: Callable[[str], Path], rows: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = [json.loads(line) for line in rows[1].read_text().splitlines()]
    records += [json.loads(rows[0].read_text().splitlines()[0]), {"question": "Who?", "answer": "Rome " * 200}]
    retain = tmp_path / "retain.jsonl"
    retain.write_text("".join(json.dumps(record) + "\n" for record in records))
    model, how = pico("llama"), Tokenisation(long_rows="drop")
    args = UnlearnConfig(use_cpu=True, report_to="none")
    with caplog.at_level(logging.INFO):
        plan = prepare(
            ReferenceConfig(str(model), quantization="none"),
            Data(str(rows[0]), str(retain), True),
            args,
            Columns(),
            how,
        ).plan
        summary = evaluate(
            Subject(str(tmp_path / "out")),
            ModelConfig(str(model), quantization="none"),
            Asked(str(rows[0]), str(retain), drop_overlap=True),
            ScoringConfig(max_new_tokens=0, use_cpu=True),
            how,
        )
    counted = {
        "forget": {"read": 4, "used": 4, "left_out": {}},
        "retain": {"read": 14, "used": 12, "left_out": {"also in the forget set": 1, "too long": 1}},
    }
    assert plan["row_counts"] == summary["row_counts"] == counted
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["row_counts"] == counted
    lines = [
        f"forget: 4 rows read from {rows[0]}, all used",
        f"retain: 14 rows read from {retain}, 12 used, left out: 1 also in the forget set, 1 too long",
    ]
    assert [message for message in caplog.messages if " rows read from " in message] == lines * 2


def test_sweep_and_attack_record_the_same_counts(trained: Path, rows: tuple[Path, Path], tmp_path: Path) -> None:
    records = [*rows[1].read_text().splitlines(), rows[0].read_text().splitlines()[0]]
    retain = tmp_path / "retain.jsonl"
    retain.write_text("\n".join(records))
    silent = ScoringConfig(max_new_tokens=0, use_cpu=True)
    swept = sweep(
        SweepConfig(str(trained / "trained"), str(tmp_path / "sweep"), alphas=[2.0], refine=0),
        Asked(str(rows[0]), str(retain), drop_overlap=True),
        silent,
    )
    attacked = attack(
        AttackConfig(str(trained / "forget-adapter"), str(tmp_path / "attack"), ["requantize"], relearn_share=0.25),
        ModelConfig(read_record(trained)["base"]["model"], quantization="none"),
        Data(str(rows[0]), str(retain), True),
        silent,
    )
    counted = {
        "forget": {"read": 4, "used": 4, "left_out": {}},
        "retain": {"read": 13, "used": 12, "left_out": {"also in the forget set": 1}},
    }
    for record, file in ((swept, "sweep/frontier.json"), (attacked, "attack/attacks.json")):
        assert record["row_counts"] == json.loads((tmp_path / file).read_text())["row_counts"] == counted


@pytest.mark.parametrize(("parameters", "rate"), [(600_000_000, 1e-3), (999_885_952, 2e-4), (7_000_000_000, 2e-4)])
def test_the_learning_rate_follows_the_size_of_the_model_unless_it_is_given(parameters: int, rate: float) -> None:
    model = SimpleNamespace(num_parameters=lambda: parameters)
    for given, expected in ((None, rate), (0.0, 0.0), (5e-4, 5e-4)):
        args = UnlearnConfig(learning_rate=given, use_cpu=True, report_to="none")
        choose_learning_rate(args, model)
        assert args.learning_rate == expected
