"""General ability: ratios to the reference are 1 with the adapter off and less after damage, and say what went in."""

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PEOPLE, TOWNS, questions
from transformers import AutoModelForCausalLM

from loramox import Tokenisation
from loramox.cli import main
from loramox.data.row import Row
from loramox.data.rows import Columns
from loramox.errors import MissingExtraError, RowsError, RunError, SettingsError
from loramox.evaluate.ability import TaskScores, add_ability
from loramox.evaluate.asked import Asked, read_text, with_neighbours
from loramox.evaluate.evaluate import evaluate
from loramox.evaluate.harness import Harness, HarnessConfig, compared
from loramox.evaluate.measure import Questions, ScoringConfig
from loramox.evaluate.metric import Summary
from loramox.evaluate.neighbours import nearest
from loramox.evaluate.records import read_records
from loramox.evaluate.subject import Subject
from loramox.evaluate.summary import summarise
from loramox.model.config import ModelConfig

SILENT = ScoringConfig(max_new_tokens=0, use_cpu=True)
OTHERS = ["Quin", "Rex", "Sue", "Tom", "Una", "Vic"]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: tuple[Path, Path], trained: Path) -> Path:
    """A folder with rows to forget, rows trained on, rows that were not, a text and an adapter."""
    monkeypatch.chdir(tmp_path)
    for path in rows:
        shutil.copy(path, tmp_path)
    shutil.copytree(trained / "forget-adapter", tmp_path / "adapter")
    wrong = [row | {"perturbed_answer": ["In Bonn.", "In Paris."]} for row in questions(OTHERS)]
    write(tmp_path / "unseen.jsonl", wrong)
    (tmp_path / "text.txt").write_text("\n".join(f"{p} lives in {t}." for p in PEOPLE for t in TOWNS))
    return tmp_path


@pytest.fixture
def model(pico: Callable[[str], Path]) -> ModelConfig:
    return ModelConfig(str(pico("llama")), quantization="none")


EVERYTHING = {
    "forget": "forget.jsonl", "retain": "retain.jsonl", "retain_test": "unseen.jsonl", "text": "text.txt", "neighbours": 2,
}  # fmt: skip
RATIOS = ("retain_test_probability_ratio", "text_perplexity_ratio", "retain_test_neighbours_probability_ratio")


# Ratios


def test_with_the_adapter_off_every_ratio_is_exactly_1(here: Path, model: ModelConfig) -> None:
    metrics = evaluate(Subject("out", "adapter", scale=0), model, Asked(**EVERYTHING), SILENT)["metrics"]
    found = {name for name in metrics if name.endswith("_ratio") and "truth" not in name}
    assert found == {*RATIOS, "retain_probability_ratio"}
    for name in (*found, "general_ability"):
        assert metrics[name]["value"] == 1
        assert "interval" not in metrics[name]  # all rows agree
    for record in read_records(here / "out"):
        assert record["reference_log_p"] == record["log_p"]
        assert record.get("reference_truth_ratio") == record.get("truth_ratio")


def test_with_the_adapter_on_they_are_those_of_the_records_and_general_ability_is_their_mean(
    here: Path, model: ModelConfig, capsys: pytest.CaptureFixture
) -> None:
    summary = evaluate(Subject("out", "adapter"), model, Asked(**EVERYTHING), SILENT)
    metrics, records = summary["metrics"], read_records(here / "out")
    unseen = [r for r in records if r["part"] == "retain_test"]
    by_hand = np.mean([r["probability"] for r in unseen]) / np.mean([math.exp(r["reference_log_p"]) for r in unseen])
    assert metrics["retain_test_probability_ratio"]["value"] == pytest.approx(by_hand)
    blocks = [r for r in records if r["part"] == "text"]
    assert len(blocks) > 1
    assert not any("kl" in r for r in blocks)
    off = evaluate(Subject("off", "adapter", scale=0), model, Asked(**EVERYTHING), SILENT)["metrics"]
    perplexities = (each["text_perplexity"]["value"] for each in (off, metrics))
    assert metrics["text_perplexity_ratio"]["value"] == pytest.approx(np.divide(*perplexities))
    general = metrics["general_ability"]
    assert general["value"] == pytest.approx(np.mean([metrics[name]["value"] for name in RATIOS]))
    assert all(name in general["source"] for name in RATIOS)
    assert "retain_probability_ratio" not in general["source"]  # training may have seen these rows
    assert general["interval"][0] < general["value"] < general["interval"][1]


def test_a_model_with_noise_on_its_weights_has_less(here: Path, model: ModelConfig, tokenizer: Any) -> None:
    """Of a reference that knows the rows, as the noise of one that knows nothing helps as often as it harms."""
    torch.manual_seed(0)
    rows = {"retain_test": [Row("r", i, r["answer"], r["question"]) for i, r in enumerate(questions(OTHERS), 1)]}
    rows["text"] = read_text("text.txt", Columns())
    asked = Questions(rows, tokenizer, Tokenisation(), 128, SILENT)
    net = AutoModelForCausalLM.from_pretrained(model.model)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(30):
        for example in (example for part in asked.parts for example in part.answers):
            ids = torch.tensor([example["input_ids"]])
            net(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    asked.remember_reference(net)
    found = []
    for noise in (0, 0.02, 0.05):
        with torch.no_grad():
            for weight in net.parameters():
                weight += noise * torch.randn_like(weight)
        found.append(summarise(asked.ask(net)).metrics)
    for name in ("retain_test_probability_ratio", "text_perplexity_ratio", "general_ability"):
        first, some, much = (metrics[name].value for metrics in found)
        assert first == 1 > some > much


def test_a_reference_that_scores_0_makes_no_ratio_and_of_nothing_there_is_no_general_ability() -> None:
    metrics, absent = found = Summary({}, {})
    add_ability({}, {"sums": TaskScores("acc", np.ones(4), np.zeros(4))}, found)
    assert metrics.keys() == {"lm_eval_sums_acc", "lm_eval_sums_change"}
    assert metrics["lm_eval_sums_change"].value == 1
    assert "is 0" in absent["lm_eval_sums_ratio"]
    assert "--retain_test" in absent["general_ability"]


def test_where_lower_is_better_the_ratio_is_turned_over() -> None:
    metrics, _ = found = Summary({}, {})
    scores = TaskScores("error", np.array([0.4, 0.4, 0.4]), np.array([0.2, 0.2, 0.2]), higher_is_better=False)
    add_ability({}, {"t": scores}, found)
    assert metrics["lm_eval_t_ratio"].value == pytest.approx(0.5)
    assert metrics["general_ability"].value == pytest.approx(0.5)


def test_neighbours_are_drawn_with_the_part_that_they_are_rows_of_and_counted_once() -> None:
    """If every row is its own neighbour, both ratios are one, and so is general ability, with the same interval."""
    random = np.random.default_rng(0)
    rows = [
        {"row": str(i), "plain_text": False, "log_p": -1.0 - random.random(), "reference_log_p": -1.0}
        for i in range(20)
    ]
    metrics, _ = found = Summary({}, {})
    add_ability({"retain_test": rows, "retain_test_neighbours": rows[::-1]}, {}, found)
    whole, near, general = metrics.values()
    assert whole.value == near.value == general.value
    assert whole.interval == near.interval == general.interval
    assert (whole.n, near.n, general.n) == (20, 20, 20)
    add_ability({"retain_test": rows, "retain_test_neighbours": rows[:4]}, {}, found)
    alone, _ = by_itself = Summary({}, {})
    add_ability({"retain_test": rows[:4]}, {}, by_itself)
    some = metrics["retain_test_neighbours_probability_ratio"]
    assert some.value == alone["retain_test_probability_ratio"].value
    assert (some.n, metrics["general_ability"].n) == (4, 20)


# Neighbours and text


def test_neighbours_are_the_rows_that_a_reader_would_pick() -> None:
    forget = [
        Row("f", 1, "Marie Curie was born in Warsaw.", "Where was Marie Curie born?"),
        Row("f", 2, "Radium and polonium.", "Which elements did Marie Curie discover?"),
    ]
    near = [
        Row("r", 1, "He shared the Nobel Prize.", "Which prize did Pierre Curie share?"),
        Row("r", 2, "It was used for dials.", "What was radium used for?"),
        Row("r", 3, "Alan Turing was born in London.", "Where was Alan Turing born?"),
    ]
    far = [
        Row("r", 4, "Seven minutes.", "How long do I boil an egg?"),
        Row("r", 5, "Picasso.", "Who painted Guernica?"),
        Row("r", 6, "Germany.", "Who won the cup of 1990?"),
    ]
    assert set(nearest([*far, *near], forget, 3)) == set(near)
    again = Row("r", 7, "marie curie was born in warsaw.", "WHERE was Marie Curie born?")
    assert nearest([*far, *near, again], forget, 1) == [again]


def test_rows_that_are_all_alike_or_very_short_have_neighbours_too() -> None:
    same = [Row("r", i, "a") for i in range(3)]
    assert nearest(same, same, 2) == same[:2]


def test_neighbours_are_of_unseen_rows_and_only_some_of_them() -> None:
    forget, retain = ([Row(name, i, f"{name} {i}", "?") for i in range(5)] for name in ("forget", "retain"))
    assert with_neighbours({"forget": forget, "retain": retain}, 5).keys() == {"forget", "retain"}
    assert with_neighbours({"retain": retain}, 2).keys() == {"retain"}
    assert with_neighbours({"forget": forget, "retain": retain}, 0).keys() == {"forget", "retain"}
    assert len(with_neighbours({"forget": forget, "retain": retain}, 2)["retain_neighbours"]) == 2
    found = with_neighbours({"forget": forget, "retain": retain, "retain_test": retain}, 2)
    assert "retain_neighbours" not in found
    assert len(found["retain_test_neighbours"]) == 2


def test_a_text_is_a_text_file_or_rows_of_text(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("\ufeff# Title\n\nSome text.", encoding="utf-8")
    write(tmp_path / "a.jsonl", [{"text": "One."}, {"text": "Two."}])
    assert [r.answer for r in read_text(str(tmp_path / "a.md"), Columns())] == ["# Title\n\nSome text."]
    assert [r.answer for r in read_text(str(tmp_path / "a.jsonl"), Columns())] == ["One.", "Two."]
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xff")
    write(tmp_path / "b.jsonl", questions(["Ada"]))
    (tmp_path / "c.txt").write_text(" \n")
    for name, message in (
        ("b.txt", "b.txt cannot be read"),
        ("b.jsonl", "questions and answers"),
        ("c.txt", "c.txt, row 1 has no"),
    ):
        with pytest.raises(RowsError, match=message):
            read_text(str(tmp_path / name), Columns())


# What is wrong


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"neighbours": -1}, "--neighbours needs 0 or more"),
        ({"equivalence": 0}, "--equivalence needs a share above 0"),
        ({"equivalence": 1.5}, "--equivalence needs a share above 0"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_the_flag(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Asked(forget="f.jsonl", **settings)


def test_rows_that_training_got_are_no_unseen_rows(
    here: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loramox.evaluate.evaluate.load_reference", lambda *_: pytest.fail("the model was loaded"))
    write(here / "some.jsonl", questions([*OTHERS, PEOPLE[5]]))
    with pytest.raises(
        RowsError, match="--retain_test is the very rows that were the retain rows when adapter was trained"
    ):
        evaluate(Subject("out", "adapter"), model, Asked(forget="forget.jsonl", retain_test="retain.jsonl"), SILENT)
    write(here / "some.jsonl", questions(PEOPLE[4:6])[1:] + questions(OTHERS))
    write(here / "more.jsonl", questions(PEOPLE[4:6]))
    with pytest.raises(
        RowsError, match=r"1 of 7 rows of --retain_test some.jsonl are also in --retain \(first: row 1\)"
    ):
        evaluate(Subject("out", "adapter"), model, Asked(retain="more.jsonl", retain_test="some.jsonl"), SILENT)
    assert not (here / "out").exists()


def test_two_evaluations_of_one_model_are_not_two_retrained_models(here: Path, model: ModelConfig) -> None:
    for name in ("a", "b"):
        evaluate(Subject(name), model, Asked(forget="forget.jsonl"), SILENT)
    with pytest.raises(RunError, match="--retrained a and b are evaluations of the same model"):
        evaluate(Subject("out"), model, Asked(forget="forget.jsonl", retrained=["a", "b"]), SILENT)


# lm-evaluation-harness

TASK = """
task: towns
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{[answer, 'Nowhere at all.']}}}}"
doc_to_target: 0
metric_list:
  - metric: acc
  - metric: acc_norm
"""


def test_a_task_of_the_harness_runs_on_the_loaded_model_off_and_on(
    here: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("HF_HOME", str(here / "cache"))
    (here / "towns.yaml").write_text(TASK.format(rows=here / "retain.jsonl"))
    words = ["evaluate", "--model", model.model, "--quantization", "none", "--use_cpu", "true", "--max_new_tokens", "0"]
    words += ["--forget", "forget.jsonl", "--adapter", "adapter", "--lm_eval", "towns.yaml", "--lm_eval_limit", "7"]
    for scale in ("0", "1"):
        main([*words, "--scale", scale, "--out", scale])
    off, on = (json.loads((here / scale / "summary.json").read_text())["metrics"] for scale in "01")
    assert off["lm_eval_towns_ratio"]["value"] == off["general_ability"]["value"] == 1
    assert off["lm_eval_towns_change"]["value"] == 0
    assert off["lm_eval_towns_acc_norm"]["n"] == 7
    change = on["lm_eval_towns_acc_norm"]["value"] - off["lm_eval_towns_acc_norm"]["value"]
    assert on["lm_eval_towns_change"]["value"] == pytest.approx(change)
    printed = " ".join(capsys.readouterr().out.split())
    assert "of the reference's, the mean of lm_eval_towns_ratio" in printed


def results(metric: str, values: list[Any], total: float | None) -> dict[str, Any]:
    samples = [{"filter": "none", "metrics": [metric], metric: value} for value in values]
    return {"samples": {"t": samples}, "results": {"t": {f"{metric},none": total}}, "higher_is_better": {"t": {}}}


def test_only_a_metric_that_is_a_mean_over_documents_is_compared() -> None:
    of_two = (results("acc", [1.0, 0.0], 0.5), results("acc", [1.0, 1.0], 1.0))
    found = compared("t", *of_two)
    assert (found.off.mean(), found.on.mean()) == (0.5, 1)
    for bad in (results("perplexity", [-3.0, -5.0], math.exp(4)), results("f1", [(1, 0), (0, 1)], 0.5)):
        with pytest.raises(SettingsError, match=r"none of its metrics \((perplexity|f1)\) is a mean over documents"):
            compared("t", bad, bad)


@pytest.mark.parametrize(
    ("config", "adapter", "message"),
    [
        ({"lm_eval_limit": 3}, "a", "needs 1 or more, and --lm_eval"),
        ({"lm_eval": ["towns"], "lm_eval_limit": 0}, "a", "needs 1 or more"),
        ({"lm_eval": ["towns"]}, None, "give --adapter"),
        ({"lm_eval": ["no_such_task"]}, "a", "--lm_eval no_such_task cannot be loaded"),
        ({"lm_eval": ["gone.yaml"]}, "a", "--lm_eval gone.yaml cannot be loaded"),
    ],
)
def test_tasks_that_cannot_be_run_are_refused(
    config: dict[str, Any], adapter: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    # Reading all of the harness's own tasks takes many seconds.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_defaults: TaskManager(include_defaults=False))
    with pytest.raises(SettingsError, match=message):
        Harness(HarnessConfig(**config), adapter)


def test_a_task_of_which_no_figure_can_be_made_is_refused_before_the_model_is_loaded(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(here / "cache"))
    task = TASK.format(rows=here / "retain.jsonl")
    metrics = "  - metric: acc\n  - metric: acc_norm\n"
    (here / "mcc.yaml").write_text(task.replace(metrics, "  - metric: mcc\n"))
    (here / "code.yaml").write_text(f"{task}unsafe_code: true\n")
    with pytest.raises(SettingsError, match=r"--lm_eval towns: none of its metrics \(mcc\) is a mean over documents"):
        Harness(HarnessConfig(lm_eval=["mcc.yaml"]), "a")
    (here / "nanmean.yaml").write_text(task.replace(metrics, "  - metric: acc\n    aggregation: nanmean\n"))
    assert len(Harness(HarnessConfig(lm_eval=["nanmean.yaml"]), "a").tasks) == 1
    with pytest.raises(SettingsError, match=r"--lm_eval code.yaml runs code that the model writes"):
        Harness(HarnessConfig(lm_eval=["code.yaml"]), "a")


def test_without_the_harness_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(
        MissingExtraError, match=r'lm_eval is not installed. Install it with: pip install "loramox\[eval\]"'
    ):
        Harness(HarnessConfig(lm_eval=["arc_easy"]), "a")
