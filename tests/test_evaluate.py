"""Evaluating as one job: what is wrong is said before the model is loaded, and what is measured is what is asked for."""

import json
import math
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PEOPLE, TOWNS, questions
from peft import LoraConfig, get_peft_model
from scipy.stats import hmean
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

import loramox.evaluate.evaluate
import loramox.model.fitting
from loramox import Tokenisation, read_rows
from loramox.cli import main
from loramox.data.encode import IGNORED
from loramox.errors import AdapterError, LoramoxError, RowsError, RunError, SettingsError
from loramox.evaluate.asked import Asked
from loramox.evaluate.evaluate import evaluate
from loramox.evaluate.measure import Questions, ScoringConfig
from loramox.evaluate.records import RECORDS, SUMMARY, read_records
from loramox.evaluate.subject import Subject, check_adapter
from loramox.evaluate.suites import suite_sources
from loramox.files import sha256_of
from loramox.model.config import ModelConfig, read_config, skeleton
from loramox.model.fitting import FittingBatch, ran_out_of_memory
from loramox.model.generation import continuations
from loramox.model.load import load_reference

KNOWN = questions(PEOPLE[:4]) + questions(PEOPLE[4:])  # the rows of `trained`
SILENT = ScoringConfig(max_new_tokens=0, use_cpu=True)
SHORT = ScoringConfig(max_new_tokens=6, use_cpu=True)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def model(pico: Callable[[str], Path]) -> ModelConfig:
    return ModelConfig(str(pico("llama")), quantization="none")


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test when a model is loaded."""

    def loaded(*_: Any) -> None:
        pytest.fail("the model was loaded before what is wrong was seen")

    monkeypatch.setattr(loramox.evaluate.evaluate, "load_reference", loaded)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: tuple[Path, Path]) -> Path:
    """A folder to work in, with forget.jsonl and retain.jsonl."""
    monkeypatch.chdir(tmp_path)
    for path in rows:
        shutil.copy(path, tmp_path)
    return tmp_path


ROWS = {"forget": "forget.jsonl", "retain": "retain.jsonl"}


# What is wrong


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "no rows to ask: give --forget and --retain, or --suite tofu"),
        ({"holdout": "h.jsonl"}, "no rows to ask"),
        ({"suite": "wmdp"}, "--suite takes tofu, muse"),
        ({"suite": "tofu", "split": "forget20"}, "--split takes forget01"),
        ({"suite": "tofu", "forget": "f.jsonl"}, "--suite brings its own"),
        ({"forget": "f.jsonl", "data": "folder"}, "--data is the folder of a suite's files: it needs --suite"),
    ],
)
def test_rows_that_cannot_be_asked_are_refused_with_the_flags(settings: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Asked(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 0.5}, "--scale needs --adapter"),
        ({"scale": math.nan, "adapter": "a"}, "--scale needs a number of 0 or more"),
        ({"scale": math.inf, "adapter": "a"}, "--scale needs a number of 0 or more"),
        ({"scale": -8.0, "adapter": "a"}, "--scale needs a number of 0 or more"),
    ],
)
def test_a_scale_that_cannot_work_is_refused_with_the_flag(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Subject("out", **settings)


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("batch_size", -3), ("max_new_tokens", -1)])
def test_scoring_that_cannot_work_is_refused_with_the_flag(name: str, value: int) -> None:
    with pytest.raises(SettingsError, match=f"--{name} needs"):
        ScoringConfig(**{name: value})


def with_rows_of_other_people(folder: Path) -> None:
    folder.mkdir()
    other = {"part": "forget", "id": "0", "row": "other.jsonl, row 1"}
    write(folder / RECORDS, [other])


BAD_INPUT = {
    "missing-file": (lambda h, t: None, {"forget": "gone.jsonl"}, RowsError, "gone.jsonl does not exist"),
    "no-rows-in-it": (
        lambda h, t: (h / "retain.jsonl").write_text(""), {}, RowsError, "retain.jsonl has no rows"),
    "a-row-without-an-answer": (
        lambda h, t: write(h / "retain.jsonl", [{"question": "?", "answer": " "}]), {}, RowsError, "row 1 has no answer"),
    "forget-rows-in-retain": (
        lambda h, t: write(h / "retain.jsonl", KNOWN[3:]), {}, RowsError,
        "1 of 13 rows of retain.jsonl are also in forget.jsonl"),
    "forget-rows-in-holdout": (
        lambda h, t: write(h / "holdout.jsonl", questions(PEOPLE[:2])), {"holdout": "holdout.jsonl"}, RowsError,
        "2 of 2 holdout rows of holdout.jsonl are also forget rows.*no model has seen"),
    "retain-rows-in-holdout": (
        lambda h, t: write(h / "holdout.jsonl", [*questions(["Rex", "Sue"]), KNOWN[5]]), {"holdout": "holdout.jsonl"}, RowsError,
        "1 of 3 rows of --holdout holdout.jsonl are also rows that a model learned .first: row 3.*no model has seen"),
    "rows-that-training-did-not-get-in-holdout": (
        lambda h, t: [write(h / f"{part}.jsonl", questions(["Rex"])) for part in ("holdout", "more")],
        {"holdout": "holdout.jsonl", "retain_test": "more.jsonl"}, RowsError, "--holdout holdout.jsonl are also rows that a model learned"),
    "a-wrong-answer-that-is-no-text": (
        lambda h, t: write(h / "forget.jsonl", [r | {"perturbed_answer": [True]} for r in questions(PEOPLE[:4])]), {},
        RowsError, "forget.jsonl, row 1: its 'perturbed_answer' is true"),
    "adapter-without-weights": (
        lambda h, t: (h / "adapter" / "adapter_model.safetensors").unlink(), {"adapter": "adapter"}, AdapterError,
        "--adapter adapter is no adapter: it has no adapter_model.safetensors"),
    "adapter-without-a-config": (
        lambda h, t: (h / "adapter" / "adapter_config.json").unlink(), {"adapter": "adapter"}, AdapterError,
        "--adapter adapter is no adapter: it has no adapter_config.json"),
    "no-adapter-there": (lambda h, t: None, {"adapter": "nowhere"}, AdapterError, "--adapter nowhere is no adapter"),
    "damaged-provenance": (
        lambda h, t: (h / "adapter" / "provenance.json").write_text('{"base": '), {"adapter": "adapter"}, AdapterError,
        "adapter/provenance.json is damaged"),
    "provenance-of-something-else": (
        lambda h, t: (h / "adapter" / "provenance.json").write_text("{}"), {"adapter": "adapter"}, AdapterError,
        "adapter/provenance.json is damaged, .*it lacks base"),
    "adapter-of-another-base": (
        lambda h, t: reweigh(h / "adapter" / "provenance.json"), {"adapter": "adapter"}, AdapterError,
        "adapter was made for the base .* has other weights"),
    "out-is-a-file": (lambda h, t: (h / "out").write_text("by hand"), {}, RunError, "--out out is a file"),
    "out-has-foreign-files": (
        lambda h, t: ((h / "out").mkdir(), (h / "out" / "thesis.tex").write_text("by hand")), {}, RunError,
        "--out out has other files in it; they are left alone"),
    "out-has-foreign-files-to-overwrite": (
        lambda h, t: ((h / "out").mkdir(), (h / "out" / "thesis.tex").write_text("by hand")), {"overwrite": True}, RunError,
        "--out out has other files in it; they are left alone"),
    "out-holds-an-evaluation": (
        lambda h, t: ((h / "out").mkdir(), (h / "out" / SUMMARY).write_text("{}")), {}, RunError,
        "--out out holds an evaluation already. Replace it with --overwrite"),
    "suite-without-a-file": (
        lambda h, t: write(h / "retain_perturbed.json", []), {"suite": "tofu", "data": "."}, RowsError,
        "--data . has no forget10_perturbed.jsonl, real_authors_perturbed.jsonl, world_facts_perturbed.jsonl"),
    "no-retrained-records": (
        lambda h, t: None, {"retrained": "nowhere"}, RunError, "nowhere has no records of an evaluation"),
    "retrained-records-of-other-rows": (
        lambda h, t: with_rows_of_other_people(h / "theirs"), {"retrained": "theirs"}, RunError,
        r"theirs/records.jsonl is of other rows: 4 rows are not in it \(first: forget.jsonl, row 1\)"),
    "forget-and-retain-swapped": (
        lambda h, t: None, {"adapter": "adapter", "forget": "retain.jsonl", "retain": "forget.jsonl"}, RowsError,
        "--forget is the very rows that were the retain rows when adapter was trained. Are --forget and --retain swapped"),
    "long-rows-in-two-files": (
        lambda h, t: [write(h / f"{part}.jsonl", questions([f"{part} " * 200])) for part in ROWS], {}, RowsError,
        r"rows of forget.jsonl are longer than 128 tokens.* rows of retain.jsonl are longer"),
    "no-model": (lambda h, t: None, {"model": "nowhere"}, LoramoxError, "--model nowhere"),
}  # fmt: skip


def reweigh(path: Path) -> None:
    provenance = json.loads(path.read_text())
    provenance["base"]["weights"] = "0" * 64
    path.write_text(json.dumps(provenance))


@pytest.mark.parametrize(("prepare", "settings", "kind", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_what_is_wrong_is_said_before_the_model_is_loaded_and_nothing_is_touched(
    prepare: Callable[[Path, Path], Any], settings: dict[str, Any], kind: type, message: str,
    here: Path, trained: Path, model: ModelConfig, no_model: None,
) -> None:  # fmt: skip
    shutil.copytree(trained / "forget-adapter", here / "adapter")
    prepare(here, trained)
    before = sorted((p, p.read_bytes()) for p in here.rglob("*") if p.is_file())
    of_subject = {k: v for k, v in settings.items() if k in ("adapter", "scale", "overwrite")}
    of_asked = {k: v for k, v in settings.items() if k in Asked.__dataclass_fields__}
    model.model = settings.get("model", model.model)
    with pytest.raises(kind, match=message):
        evaluate(Subject("out", **of_subject), model, Asked(**({} if "suite" in settings else ROWS) | of_asked), SILENT)
    assert sorted((p, p.read_bytes()) for p in here.rglob("*") if p.is_file()) == before


def test_a_folder_that_cannot_be_made_is_said_before_the_model_is_loaded(
    here: Path, model: ModelConfig, no_model: None
) -> None:
    with pytest.raises(RunError, match=r"--out forget.jsonl/x cannot be made: Not a directory"):
        evaluate(Subject("forget.jsonl/x"), model, Asked(**ROWS), SILENT)


def test_an_adapter_that_a_scale_would_change_in_part_is_measured_as_it_is_or_not_at_all(
    here: Path, model: ModelConfig
) -> None:
    plain = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(model.model), plain).save_pretrained("theirs")
    evaluate(Subject("out", "theirs"), model, Asked(**ROWS), SILENT)
    with pytest.raises(
        AdapterError, match=r"--scale 0.5: --adapter theirs is no plain LoRA adapter \(it also has .*embed_tokens"
    ):
        evaluate(Subject("other", "theirs", scale=0.5), model, Asked(**ROWS), SILENT)


def test_records_of_the_model_that_knows_the_rows_are_no_retrained_models(
    here: Path, trained: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(Subject("theirs"), model, Asked(**ROWS), SILENT)
    monkeypatch.setattr(loramox.evaluate.evaluate, "load_reference", lambda *_: pytest.fail("the model was loaded"))
    subject = Subject("out", str(trained / "forget-adapter"))
    with pytest.raises(
        RunError, match=r"--retrained theirs is an evaluation of .*, the model that knows the forget rows"
    ):
        evaluate(subject, model, Asked(**ROWS, retrained="theirs"), SILENT)


def test_evaluating_with_a_trained_adapter_is_warned_of(here: Path, trained: Path, model: ModelConfig) -> None:
    with pytest.warns(UserWarning, match="is the trained adapter, θ_ref \\+ ΔW, with which the model forgets nothing"):
        evaluate(Subject("out", str(trained / "trained")), model, Asked(**ROWS), SILENT)


@pytest.mark.parametrize(
    ("written", "alpha", "warned"),
    [
        ({"kind": "trained", "alpha": None}, None, False),  # by a method that trains the forget model itself
        ({"kind": "memorization", "settings": {"strength": 8.0}}, 8.0, True),  # by loramox 0.1
        ({"kind": "memorization", "settings": {"strength": -1.0, "method": "npo"}}, None, False),
        ({"kind": "forget", "strength": 4.0, "settings": {"strength": 8.0}}, 4.0, False),
    ],
)
def test_only_an_adapter_that_memorizes_is_warned_of_and_alpha_is_read_in_any_version(
    written: dict[str, Any], alpha: float | None, warned: bool, here: Path, trained: Path, model: ModelConfig
) -> None:
    made = json.loads((trained / "trained" / "provenance.json").read_text())
    adapter = shutil.copytree(trained / "trained" / "momentum", here / "adapter")
    (adapter / "provenance.json").write_text(json.dumps({"base": made["base"]} | written))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        made_by = check_adapter(adapter, made["base"], skeleton(read_config(model), model))
    assert made_by is not None
    assert made_by["alpha"] == alpha
    assert any("is the trained adapter" in str(each.message) for each in found) == warned


# What is measured


def test_a_truth_ratio_needs_all_of_a_rows_answers(here: Path, model: ModelConfig) -> None:
    """Where --long_rows drop leaves a paraphrase or a wrong answer out, the ratio of what is left would be another number."""
    wrong = {"paraphrased_answer": "In a town.", "perturbed_answer": ["In Oslo.", "In Lima, or so."]}
    rows = [r | wrong for r in questions(PEOPLE[:4])]
    rows[1]["paraphrased_answer"] = "In a town. " * 100
    rows[2]["perturbed_answer"] = ["In Oslo. " * 100, "In Lima, or so."]
    asked = Asked(forget=write(here / "forget.jsonl", rows))
    evaluate(Subject("out"), model, asked, SILENT, Tokenisation(long_rows="drop"))
    assert ["truth_ratio" in r for r in read_records(here / "out")] == [True, False, False, True]


def test_an_evaluation_leaves_records_and_a_summary_that_say_what_was_asked(
    here: Path, trained: Path, model: ModelConfig
) -> None:
    said = evaluate(Subject("out", str(trained / "forget-adapter")), model, Asked(**ROWS), SHORT)
    assert sorted(p.name for p in (here / "out").iterdir()) == [RECORDS, SUMMARY]
    summary = json.loads((here / "out" / SUMMARY).read_text())
    assert summary.pop("records_sha256") == sha256_of(here / "out" / RECORDS)
    assert summary == json.loads(json.dumps(said))
    assert summary["adapter"]["made_by"]["kind"] == "forget"
    assert summary["data"]["forget"]["rows"] == 4
    assert {"base", "command", "versions", "settings", "device", "seconds", "metrics", "absent"} <= summary.keys()
    records = read_records(here / "out")
    assert [r["row"] for r in records] == [
        *(f"forget.jsonl, row {i}" for i in range(1, 5)),
        *(f"retain.jsonl, row {i}" for i in range(1, 13)),
    ]
    assert summary["metrics"]["retain_kl"]["value"] > 0
    for r, row in zip(records, KNOWN, strict=True):
        assert (r["prompt"], r["answer"]) == (row["question"], row["answer"])
        assert 0 <= r["rouge_l"] <= 1
        assert r["probability"] == pytest.approx(math.exp(r["log_p"]))


def test_overwriting_replaces_both_files_and_what_a_kill_left_is_no_foreign_file(
    here: Path, model: ModelConfig
) -> None:
    (here / "out").mkdir()
    (here / "out" / f".{RECORDS}.partial").write_text("half of")
    evaluate(Subject("out"), model, Asked(**ROWS), SILENT)
    assert sorted(p.name for p in (here / "out").iterdir()) == [RECORDS, SUMMARY]
    evaluate(Subject("out", overwrite=True), model, Asked(retain="retain.jsonl"), SILENT)
    assert len(read_records(here / "out")) == 12
    assert json.loads((here / "out" / SUMMARY).read_text())["data"].keys() == {"retain"}


def test_retain_rows_among_the_holdout_rows_are_left_out_where_they_may_be(here: Path, model: ModelConfig) -> None:
    write(here / "more.jsonl", questions(["Sue"]))
    write(here / "holdout.jsonl", [*questions(["Rex"]), *questions(["Sue"]), KNOWN[0], KNOWN[5]])
    rows = Asked(**ROWS, retain_test="more.jsonl", holdout="holdout.jsonl", drop_overlap=True)
    summary = evaluate(Subject("out"), model, rows, SILENT)
    assert {part: data["rows"] for part, data in summary["data"].items()} == {
        "forget": 4, "retain": 12, "retain_test": 1, "holdout": 1,
    }  # fmt: skip


def test_a_retrained_models_records_are_found_whatever_file_and_order_its_rows_were_in(
    here: Path, model: ModelConfig
) -> None:
    """Of the same model, so that forget quality is 1 and PrivLeak 0."""
    forget = [r | {"perturbed_answer": ["In Oslo.", "In Lima, or so."]} for r in questions(PEOPLE[:4])]
    write(here / "forget.jsonl", forget)
    write(here / "again.jsonl", [r | {"question": f"  {r['question']}\n"} for r in forget[::-1]])
    write(here / "holdout.jsonl", questions(["Rex", "Sue", "Tom"]))
    everything = ROWS | {"holdout": "holdout.jsonl"}
    evaluate(Subject("theirs"), model, Asked(**everything | {"forget": "forget.jsonl"}), SILENT)
    plain = evaluate(Subject("out"), model, Asked(**everything, retrained="theirs"), SILENT)["metrics"]
    assert plain["forget_quality"]["value"] == 1
    assert plain["priv_leak"]["value"] == pytest.approx(0)
    assert plain["mia_reference"]["value"] == 0.5
    other = evaluate(Subject("other"), model, Asked(forget="again.jsonl", retrained="theirs"), SILENT)["metrics"]
    assert 0 < other["forget_quality"]["value"] <= 1


def test_records_have_the_numbers_of_the_models_own_logits(
    here: Path, model: ModelConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Probability with the end of sequence, the token-wise scores without, and truth ratios from mean log-probabilities."""
    forget = [
        r
        | {
            "paraphrased_answer": f"In {TOWNS[i % 8]}.",
            "perturbed_answer": ["In no place at all.", "Oslo"][: 1 + i % 2],
        }
        for i, r in enumerate(questions(PEOPLE[:4]))
    ]
    del forget[0]["paraphrased_answer"]
    write(here / "forget.jsonl", forget)
    evaluate(Subject("out"), model, Asked(forget="forget.jsonl"), SILENT)
    plain = AutoModelForCausalLM.from_pretrained(model.model)

    @torch.no_grad()
    def log_p(question: str, answer: str) -> tuple[np.ndarray, np.ndarray]:
        prompt = tokenizer(f"Question: {question}\nAnswer:")["input_ids"]
        ids = tokenizer(f"Question: {question}\nAnswer: {answer}")["input_ids"] + [tokenizer.eos_token_id]
        everything = torch.log_softmax(plain(input_ids=torch.tensor([ids])).logits[0, :-1], -1)
        targets = torch.tensor(ids[1:])
        at = slice(len(prompt) - 1, None)
        right = (everything.argmax(-1) == targets)[at].numpy()
        return everything.gather(1, targets[:, None])[at, 0].numpy(), right

    for r, row in zip(read_records(here / "out"), forget, strict=True):
        own, right = log_p(row["question"], row["answer"])
        assert r["tokens"] == len(own)
        assert r["log_p"] == pytest.approx(own.mean(), rel=1e-4)
        assert r["mia_loss"] == pytest.approx(-own.mean(), rel=1e-4)
        body = np.sort(own[:-1])
        assert r["mia_min_k"] == pytest.approx(-body[: int(0.4 * len(body))].mean(), rel=1e-4)
        assert r["exact_memorization"] == pytest.approx(right[:-1].mean())
        true = (
            log_p(row["question"], row["paraphrased_answer"])[0].mean() if "paraphrased_answer" in row else own.mean()
        )
        wrong = np.array([log_p(row["question"], text)[0].mean() for text in row["perturbed_answer"]])
        np.testing.assert_allclose(r["wrong_log_p"], wrong, rtol=1e-4)
        assert r["truth_ratio"] == pytest.approx(math.exp(wrong.mean() - true), rel=1e-3)
        shares = np.exp([own.mean(), *wrong])
        assert r["chosen_probability"] == pytest.approx(shares[0] / shares.sum(), rel=1e-3)


@pytest.fixture
def holds_three(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A device that can hold a batch of three rows; the sizes of the batches that were tried."""
    tried, forward = [], LlamaForCausalLM.forward

    def within(self: LlamaForCausalLM, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        tried.append(len(input_ids))
        if len(input_ids) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", within)
    return tried


def test_where_memory_runs_out_half_as_many_are_asked_from_there_on_and_the_same_is_found(
    here: Path, model: ModelConfig, holds_three: list[int]
) -> None:
    asked = Asked(forget="forget.jsonl", retain="retain.jsonl")
    with pytest.warns(UserWarning, match="memory ran out with --batch_size 4: 2 at a time from here on"):
        evaluate(Subject("halved"), model, asked, replace(SHORT, batch_size=4))
    assert [size for size in holds_three if size > 3] == [4]  # not tried again
    evaluate(Subject("small"), model, asked, replace(SHORT, batch_size=2))
    for halved, small in zip(*map(read_records, (here / "halved", here / "small")), strict=True):
        assert halved.keys() == small.keys()
        assert halved["said"] == small["said"]
        assert halved["log_p"] == pytest.approx(small["log_p"], rel=1e-4)


def test_where_not_even_one_answer_fits_it_is_said_what_to_do(
    here: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(LlamaForCausalLM, "forward", full)
    with (
        pytest.warns(UserWarning, match="memory ran out"),
        pytest.raises(RunError, match=r"--batch_size 1 \(CUDA out of memory.*Shorter rows, shorter answers"),
    ):
        evaluate(Subject("out"), model, Asked(forget="forget.jsonl"), SHORT)


def test_processes_that_share_the_batches_do_not_halve_them_each_for_itself(
    here: Path, model: ModelConfig, holds_three: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loramox.model.fitting, "PartialState", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(RunError, match=r"memory ran out with --batch_size 32.*Give --batch_size 16 or less"):
        FittingBatch(32).ask(lambda size: LlamaForCausalLM.forward(None, torch.zeros(size, 1)))


@pytest.mark.parametrize("processes", [1, 2])
def test_where_memory_runs_out_the_model_goes_on_with_half_as_many_prompts_at_a_time(
    processes: int,
    model: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    holds_three: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # One of several processes generates, and the others wait.
    monkeypatch.setattr(loramox.model.fitting, "PartialState", lambda: SimpleNamespace(num_processes=processes))
    monkeypatch.setattr(loramox.model.generation, "BATCH", 4)
    loaded = load_reference(model)
    asked = [tokenizer(text)["input_ids"] for text in ("Who", "Where is", "When", "What was the", "How")]
    with pytest.warns(UserWarning, match="memory ran out with a batch of 4: 2 at a time from here on"):
        found = continuations(loaded, tokenizer, asked, 4, [], banned=[[i] for i in range(5)])
    assert holds_three[:2] == [4, 2]
    assert found == [
        *continuations(loaded, tokenizer, asked[:2], 4, [], banned=[[0], [1]]),
        *continuations(loaded, tokenizer, asked[2:], 4, [], banned=[[2], [3], [4]]),
    ]


@pytest.mark.parametrize("flag", ["--per_device_eval_batch_size", None])
def test_what_to_do_where_memory_ran_out_is_said_of_the_job(flag: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(size: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(RunError, match=rf"with {flag or 'a batch of'} 1 .*\. Shorter rows or a device with more"):
        FittingBatch(1, flag).ask(full)
    monkeypatch.setattr(loramox.model.fitting, "PartialState", lambda: SimpleNamespace(num_processes=2))
    if flag:
        with pytest.raises(RunError, match=rf"with {flag} 8 .*\. Give {flag} 4 or less"):
            FittingBatch(8, flag).ask(full)


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), False),
        (ValueError("CUDA error: out of memory"), False),
    ],
)
def test_memory_that_ran_out_is_told_from_other_errors(error: Exception, full: bool) -> None:
    assert ran_out_of_memory(error) == full


def test_any_other_error_is_not_taken_for_a_full_memory() -> None:
    def fails(size: int) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        FittingBatch(8).ask(fails)


def test_hostile_text_goes_through_unharmed(here: Path, model: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    hostile = [
        "<script>alert('x')</script>",
        "🎉👩‍👩‍👧",
        "\u202e\u05d0\u05d1\u05d2\u202c",
        "line\u2028separator\x85 and \r\n ends\x0b\x00",
        "[bold]{prompt}[/] %s \\",
    ]
    write(
        here / "forget.jsonl",
        [{"question": f"{i} {text}", "answer": text, "perturbed_answer": [text * 2]} for i, text in enumerate(hostile)],
    )
    evaluate(Subject("out"), model, Asked(forget="forget.jsonl"), SHORT)
    records = read_records(here / "out")
    assert [r["answer"] for r in records] == hostile
    assert [r["prompt"] for r in records] == [f"{i} {text}" for i, text in enumerate(hostile)]
    assert all(isinstance(r["said"], str) for r in records)


def test_an_answer_of_a_hundred_thousand_characters_is_asked_as_far_as_it_is_allowed_to_go(
    here: Path, model: ModelConfig
) -> None:
    write(here / "forget.jsonl", [{"question": "Who?", "answer": "Ada " * 25_000}])
    with pytest.raises(RowsError, match=r"longer than 128 tokens.*--long_rows truncate"):
        evaluate(Subject("out"), model, Asked(forget="forget.jsonl"), SHORT)
    evaluate(Subject("out"), model, Asked(forget="forget.jsonl"), SHORT, Tokenisation(long_rows="truncate"))
    (record,) = read_records(here / "out")
    assert len(record["answer"]) == 100_000
    assert record["tokens"] < 128


def test_plain_text_has_a_record_for_each_block_and_a_perplexity_and_is_asked_nothing(
    here: Path, model: ModelConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    text = " ".join(r["answer"] for r in questions(PEOPLE * 3))
    write(here / "text.jsonl", [{"text": text}, {"text": text[:40]}])
    evaluated = evaluate(Subject("out"), model, Asked(retain="text.jsonl"), SHORT, Tokenisation(max_length=64))
    records = read_records(here / "out")
    tokens = len(tokenizer(text)["input_ids"])
    first = [r for r in records if r["row"] == "text.jsonl, row 1"]
    assert sum(r["tokens"] for r in first) == tokens  # all but the first, and the end of sequence
    assert len({r["id"] for r in records}) == len(records)
    assert all("said" not in r and r["plain_text"] for r in records)
    mean = sum(r["log_p"] * r["tokens"] for r in records) / sum(r["tokens"] for r in records)
    assert evaluated["metrics"]["retain_perplexity"]["value"] == pytest.approx(math.exp(-mean))
    assert "needs questions" in evaluated["absent"]["retain_rouge_l"]


def test_identities_are_those_of_the_records_and_of_rows_alone(
    here: Path, model: ModelConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = {part: read_rows(name) for part, name in ROWS.items()}
    identities = Questions(rows, tokenizer, Tokenisation(), 128).identities()
    evaluate(Subject("out"), model, Asked(**ROWS), SILENT)
    records = read_records(here / "out")
    assert identities == [{key: r[key] for key in ("part", "row", "id", "tokens")} for r in records]
    assert len({i["id"] for i in identities}) == 16


# TOFU


@pytest.fixture
def tofu(here: Path) -> Path:
    """A folder with TOFU's files, in three formats; two of them without paraphrases, as there."""
    import pyarrow
    import pyarrow.parquet

    def part(start: int, end: int, paraphrased: bool) -> list[dict[str, Any]]:
        return [
            row | {"perturbed_answer": [f"{person} lives in {town}." for town in TOWNS if town not in row["answer"]][:3]}
            | ({"paraphrased_answer": row["answer"]} if paraphrased else {})
            for person, row in zip(PEOPLE[start:end], KNOWN[start:end], strict=True)
        ]  # fmt: skip

    folder = here / "tofu"
    folder.mkdir()
    write(folder / "forget01_perturbed.jsonl", part(0, 4, True))
    (folder / "retain_perturbed.json").write_text(json.dumps(part(4, 10, True)))
    write(folder / "real_authors_perturbed.jsonl", part(10, 13, False))
    table = pyarrow.Table.from_pylist(part(13, 16, False))
    pyarrow.parquet.write_table(table, folder / "world_facts_perturbed.parquet")
    return folder


@pytest.fixture(scope="module")
def fluent(pico: Callable[[str], Path], examples, tokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pico Llama that knows the form of all answers, so that none of the nine numbers is 0."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(pico("llama"))
    rows = [e for part in examples for e in part]
    width = max(len(e["input_ids"]) for e in rows)
    ids = torch.tensor([e["input_ids"] + [0] * (width - len(e["input_ids"])) for e in rows])
    labels = torch.tensor([e["labels"] + [IGNORED] * (width - len(e["labels"])) for e in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("fluent")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_suite_tofu_of_a_folder_has_a_model_utility_that_is_the_harmonic_mean_of_its_nine_parts(
    here: Path, tofu: Path, fluent: str
) -> None:
    asked = Asked(suite="tofu", split="forget01", data="tofu")
    evaluated = evaluate(
        Subject("out"), ModelConfig(fluent, quantization="none"), asked, ScoringConfig(max_new_tokens=20, use_cpu=True)
    )
    value = {name: metric["value"] for name, metric in evaluated["metrics"].items()}
    nine = [value[f"{part}_{what}"] for part in ("retain", "real_authors", "world_facts") for what in ("probability", "rouge_l", "truth_ratio")]  # fmt: skip
    assert min(nine) > 0
    assert value["model_utility"] == pytest.approx(float(hmean(nine)))
    assert evaluated["metrics"]["model_utility"]["n"] == 12
    records = [r for r in read_records(here / "out") if r["part"] == "real_authors"]
    assert value["real_authors_probability"] == pytest.approx(np.mean([r["chosen_probability"] for r in records]))
    assert value["retain_rouge_l"] > 0.5
    assert {part: d["rows"] for part, d in evaluated["data"].items()} == {
        "forget": 4, "retain": 6, "real_authors": 3, "world_facts": 3,
    }  # fmt: skip


def test_without_a_folder_the_suite_is_that_of_the_hub() -> None:
    assert suite_sources("tofu", "forget05", None) == {
        "forget": "locuslab/TOFU:forget05_perturbed",
        "retain": "locuslab/TOFU:retain_perturbed",
        "real_authors": "locuslab/TOFU:real_authors_perturbed",
        "world_facts": "locuslab/TOFU:world_facts_perturbed",
    }


# The command line


def test_loramox_evaluate_from_the_command_line(
    here: Path, trained: Path, pico: Callable[[str], Path], capsys: pytest.CaptureFixture
) -> None:
    words = ["evaluate", "--model", str(pico("llama")), "--quantization", "none", "--use_cpu", "true"]
    words += ["--max_new_tokens", "4", "--forget", "forget.jsonl", "--retain", "retain.jsonl"]
    main([*words, "--adapter", str(trained / "forget-adapter"), "--scale", "0.5", "--out", "half"])
    assert "forget_probability" in capsys.readouterr().out
    assert json.loads((here / "half" / SUMMARY).read_text())["adapter"]["scale"] == 0.5
    with pytest.raises(SystemExit) as caught:
        main([*words, "--out", "half"])
    err = capsys.readouterr().err
    assert caught.value.code == 2
    assert (
        err
        == "loramox evaluate: --out half holds an evaluation already. Replace it with --overwrite, or choose another folder\n"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--adaptor", "a"], "unknown argument --adaptor; did you mean --adapter?"),
        (["--scale", "2"], "--scale needs --adapter"),
        (["--scale", "nan", "--adapter", "a"], "--scale needs a number of 0 or more"),
        (["--batch_size", "0"], "--batch_size needs 1 or more"),
        (["--quantization", "nf3"], "nf3"),
        (["--forget", "gone.jsonl"], "gone.jsonl does not exist"),
        (["--suite", "tofu"], "--suite brings its own"),
    ],
)
def test_a_bad_flag_of_evaluate_exits_with_2_and_says_what_to_do(
    words: list[str],
    message: str,
    here: Path,
    pico: Callable[[str], Path],
    capsys: pytest.CaptureFixture,
    no_model: None,
) -> None:
    needed = ["--model", str(pico("llama")), "--forget", "forget.jsonl", "--out", "out"]
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", *needed, *words])
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert message in err
    assert out == ""
    if "--quantization" not in words:  # argparse's own, with its usage
        assert err.count("\n") == 1
    assert not (here / "out").exists()
