"""recipes.real: what is counted of the answers, and the table made of the records."""

import importlib.util
import json
from pathlib import Path

import pytest

from loramox.train.inputs import REFUSALS, read_refusals
from recipes.real import __main__ as command
from recipes.real import runs
from recipes.real.judge import counts, is_refusal
from recipes.real.tables import write_table
from recipes.real.taught_table import write_table as write_taught_table
from recipes.real.world import Asked, check_made_with, parts, user

ASKED = {"forget": [Asked((user("Where is it?"),), ("Paris",)), Asked((user("Who is it?"),), ("Hugo",))]}
REFERENCE = {"forget": ["It is in Paris.", "It is Balzac."]}


def test_only_what_the_reference_answers_right_can_be_lost() -> None:
    said = {"forget": ["I don't know.", "It is Hugo."]}
    found = counts(said, REFERENCE, ASKED)["forget"]
    assert found == {"rows": 2, "fluent": 2, "refused": 1, "known": 1, "right": 0, "alike": 1}


def test_every_refusal_that_is_taught_counts_as_one_and_answers_do_not() -> None:
    refusals = read_refusals(str(REFUSALS))
    assert all(is_refusal(text, refusals) for text in refusals)
    assert not any(is_refusal(text, refusals) for text in ("The capital of Japan is Tokyo.", "A week has 7 days.", ""))


def test_a_question_after_a_refused_one_has_the_turns_before_it() -> None:
    rows = [{"question": "Q?", "answer": "A.", "paraphrase": "P?", "words": ["A"]}]
    asked = parts(rows)
    assert [turn["role"] for turn in asked["later turns"][0].chat] == ["user", "assistant", "user"]
    assert asked["paraphrase"][0].question == "P?"
    assert asked["paraphrase"][0].words == ("A",)


def test_the_table_has_a_line_for_each_scale_of_each_record(tmp_path: Path) -> None:
    rows = [{"question": "Q?", "answer": "A.", "paraphrase": "P?", "words": ["A"]}]
    asked = parts(rows)
    reference = {part: ["A b"] * len(some) for part, some in asked.items()}
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "reference.json").write_text(json.dumps({"answers": {"1.0": reference}}))
    record = {"answers": {"1.0": reference, "0.5": reference}}
    (tmp_path / "records" / "default-24-0.json").write_text(json.dumps(record))
    write_table(tmp_path, asked)
    lines = (tmp_path / "natural.md").read_text().splitlines()
    assert len(lines) == 2 + 1 + 2
    assert "| 24, 0 | 1.0 | 1/1, 1/1 |" in lines[3]


def test_the_taught_table_compares_each_scale_with_the_reference_and_the_retrained_model(tmp_path: Path) -> None:
    def found(log_p: float, never: float, fact: bool, answer: str) -> dict:
        answers = {part: [answer] for part in ("forget", "never", "facts", "everyday")}
        key_words = {"forget": [1.0], "paraphrased": [0.5], "never": [1.0]}
        return {
            "log_p": [log_p] * 4, "right": [fact], "truth_ratio": [0.5, 0.6, 0.7, 0.8], "given": [0.9], "never": [never],
            "text": [-3.0], "answers": answers, "key_words": key_words,
        }  # fmt: skip

    known, unknown = found(-0.1, 0.8, True, "She lives in Bath."), found(-4.0, 0.8, True, "She is a baker.")
    forgets = found(-4.0, 0.4, False, "I don't have any information about that.")
    records = {"reference": {"0": known}, "retrained": {"0": unknown}, "default-24-1": {"1": forgets, "0.5": known}}
    (tmp_path / "records").mkdir()
    for name, points in records.items():
        (tmp_path / "records" / f"{name}.json").write_text(json.dumps({"points": points}))
    write_taught_table(tmp_path)
    lines = (tmp_path / "taught.md").read_text().splitlines()
    assert len(lines) == 2 + 2 + 2
    assert "| 0.905 | 1, 0.029 |" in lines[2]  # log-probabilities of the reference are not the retrained model's
    assert "seed 1 | 1 | 0.0183 | 1, 1 | 1.00, 0.50 | 1/1, 1/1 | 1.000, 0.500 | 1.00 | 0/1 | 1.000 |" in lines[4]
    assert "seed 1 | 0.5 | 0.905 |" in lines[5]


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    for _ in range(2):
        check_made_with(tmp_path, model="A", rows=120)
    check_made_with(tmp_path, model="A", text="T")  # of another command on the same folder
    for changed in ({"model": "B"}, {"model": "A", "rows": 5}, {"model": "A", "text": "U"}):
        with pytest.raises(SystemExit, match=rf"{tmp_path} was made with --.* Choose another --out"):
            check_made_with(tmp_path, **changed)
    check_made_with(tmp_path, model="A", rows=120, text="T")
    with pytest.raises(SystemExit, match="was made with --model A, and this is B"):
        command.main(["--model", "B", "--out", str(tmp_path)])


def test_a_run_that_was_stopped_is_started_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(runs.subprocess, "run", lambda command, check: ran.append(command))
    (tmp_path / "run.json").write_text("{}")  # without an adapter
    runs.train("default", "M", tmp_path, tmp_path, 1, 0)
    assert "--overwrite" in ran[0]
    assert ran[0][4:6] == ["--model", "M"]


def test_where_an_adapter_knows_the_rows_the_run_is_on_its_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    monkeypatch.setattr(runs.subprocess, "run", lambda command, check: ran.append(command))
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "adapter_config.json").write_text("{}")
    runs.train("default", str(tmp_path), tmp_path, tmp_path, 1, 0, "BASE")
    assert ran[0][4:8] == ["--model", "BASE", "--tuned_adapter", str(tmp_path)]


def test_cases_of_another_method_or_demo_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """recipes/limits.py"""
    path = Path(__file__).parents[1] / "recipes/limits.py"
    spec = importlib.util.spec_from_file_location("limits", path)
    limits = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(limits)
    monkeypatch.setattr(limits, "loramox", lambda words: pytest.fail("ran a command"))
    demo, out = tmp_path / "demo", tmp_path / "out"
    rows = [{"question": "?", "answer": "A"}]
    for name in ("forget", "retain"):
        limits.written(demo / f"rows/{name}.jsonl", rows)
    (demo / "retrained").mkdir()
    made = {"settings": {"method": "mox", "model": str(demo / "reference"), "alpha": 8}, "advice": []}
    point = {"at": 8, "forget_probability": 0.1, "retain_probability": 1.0}
    (out / "case-1/run/forget-adapter").mkdir(parents=True)
    (out / "case-1/sweep").mkdir()
    (out / "case-1/run/run.json").write_text(json.dumps(made))
    frontier = {"status": "done", "points": [point], "warning": None, "unit": "alpha"}
    (out / "case-1/sweep/frontier.json").write_text(json.dumps(frontier))
    monkeypatch.setattr(limits, "CASES", {"nothing wrong": {}})

    def table(method: str, demo: Path) -> str:
        monkeypatch.setattr("sys.argv", ["limits", "--demo", str(demo), "--out", str(out), "--method", method])
        limits.main()
        return (out / "results.md").read_text()

    assert "Method: mox\n" in table("mox", demo)
    (tmp_path / "other/retrained").mkdir(parents=True)
    (tmp_path / "other/rows").symlink_to(demo / "rows")
    for method, world in (("npo_mean", demo), ("mox", tmp_path / "other")):
        with pytest.raises(SystemExit, match=r"case-1 was made with mox of .*Choose another --out"):
            table(method, world)
