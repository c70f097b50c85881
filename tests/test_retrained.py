"""Records of a retrained model are compared only when it was asked the same: rows, wrong answers, prompts."""

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import PEOPLE, questions
from transformers import AutoModelForCausalLM

from loramox import Tokenisation, read_rows
from loramox.data.encode import DEFAULT_TEMPLATE
from loramox.data.rows import Columns, Data
from loramox.errors import RunError, SettingsError
from loramox.evaluate.asked import Asked
from loramox.evaluate.attacks.bench import Bench
from loramox.evaluate.attacks.config import AttackConfig
from loramox.evaluate.evaluate import evaluate
from loramox.evaluate.measure import Questions, ScoringConfig
from loramox.evaluate.metric import Summary
from loramox.evaluate.records import read_records, read_retrained, write_records
from loramox.evaluate.subject import Subject, check_retrained_model
from loramox.model.config import ModelConfig, read_tokenizer

SILENT = ScoringConfig(max_new_tokens=0, use_cpu=True)


@pytest.fixture
def model(pico: Callable[[str], Path]) -> ModelConfig:
    return ModelConfig(str(pico("llama")), quantization="none")


def rows_with(path: Path, wrong: str) -> str:
    rows = [row | {"perturbed_answer": [wrong]} for row in questions(PEOPLE[:4])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def asked(tmp_path: Path) -> Callable[..., Any]:
    def evaluated(
        model: ModelConfig,
        out: str,
        wrong: str = "In Bonn.",
        template: str | None = None,
        how: Tokenisation | None = None,
        **more: Any,
    ) -> dict:
        forget = rows_with(tmp_path / f"{out}.jsonl", wrong)
        given = Asked(forget=forget, **more)
        how = how or Tokenisation(prompt_template=template)
        return evaluate(Subject(str(tmp_path / out)), model, given, SILENT, how)

    return evaluated


def test_records_with_other_wrong_answers_are_refused(tmp_path: Path, model: ModelConfig, asked: Callable) -> None:
    asked(model, "theirs", wrong="In Paris.")
    for retrained in (tmp_path / "theirs", tmp_path / "theirs" / "records.jsonl"):
        with pytest.raises(RunError, match=r"theirs.* has other texts of .*, row 1: .*on the same files"):
            asked(model, "out", retrained=str(retrained))
    assert not (tmp_path / "out").exists()


def test_records_of_other_texts_of_the_same_rows_are_refused(
    tmp_path: Path, model: ModelConfig, asked: Callable
) -> None:
    """The answer that --long_rows truncate cuts has the row's identity, and other tokens."""
    cut = Tokenisation(max_length=16, long_rows="truncate")
    asked(model, "theirs", how=cut)
    with pytest.raises(
        RunError, match=r"theirs.* has other texts of .*, row 1: .*same --max_length, --long_rows and --prompt_template"
    ):
        asked(model, "out", retrained=str(tmp_path / "theirs"))
    assert not (tmp_path / "out").exists()
    asked(model, "same", how=cut, retrained=str(tmp_path / "theirs"))


def test_of_several_right_answers_each_model_may_have_scored_another(tmp_path: Path) -> None:
    here = {"part": "forget", "id": "a", "row": "f.jsonl, row 1", "tokens": 3}
    write_records(tmp_path / "r", [here | {"tokens": 5, "other_answers": ["Rome."]}], Summary({}, {}), {})
    assert read_records(tmp_path / "r", like=[here])[0]["tokens"] == 5


def test_rows_of_one_id_are_found_by_their_numbers_of_tokens(tmp_path: Path) -> None:
    """White space and reasoning are no part of an id."""
    rows = [{"part": "forget", "id": "a", "row": f"f.jsonl, row {n}", "tokens": n} for n in (3, 5)]
    write_records(tmp_path / "r", rows, Summary({}, {}), {})
    assert read_records(tmp_path / "r", like=rows) == rows
    with pytest.raises(RunError, match=r"has other texts of f.jsonl, row 3: .*with the same --max_length"):
        read_records(tmp_path / "r", like=[rows[0] | {"tokens": 4}])


def test_an_evaluation_of_the_same_commit_of_the_hub_is_refused_unless_an_adapter_is_on_it(
    tmp_path: Path, model: ModelConfig, asked: Callable
) -> None:
    """No file of the hub is sampled: such a model has no digest of its weights."""
    asked(model, "theirs")
    path = tmp_path / "theirs" / "summary.json"
    held = json.loads(path.read_text())
    hub = {"model": "owner/name", "revision": "c0ffee", "weights": None}
    questions = Questions(
        {"forget": read_rows(str(tmp_path / "theirs.jsonl"))}, read_tokenizer(model), Tokenisation(), 128
    )

    def read(theirs: dict[str, Any], reference: dict[str, Any], folders: int = 1, **more: Any) -> int:
        path.write_text(json.dumps(held | {"base": theirs} | more))
        return len(read_retrained([str(tmp_path / "theirs")] * folders, questions, reference, None))

    with pytest.raises(RunError, match="is an evaluation of owner/name, the model that knows the forget rows"):
        read(hub, hub)
    with pytest.raises(RunError, match="are evaluations of the same model"):
        read(hub, model_of_base := hub | {"revision": "other"}, folders=2)
    assert read(hub, model_of_base) == 1
    for base in (hub, hub | {"weights": "74b4"}):  # a model in a folder has a digest
        assert read(base, base, adapter={"folder": "trained without the rows"}) == 1
        with pytest.raises(RunError, match="are evaluations of the same model"):
            read(base, base, folders=2, adapter={"folder": "trained without the rows"})


def test_the_same_commit_of_the_hub_is_no_retrained_model(model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = {"model": model.model, "revision": "c0ffee", "weights": None, "shape": "llama"}
    monkeypatch.setattr("loramox.evaluate.subject.identify", lambda *_: hub)
    with pytest.raises(SettingsError, match="is the model that knows the forget rows"):
        check_retrained_model(model.model, model, hub, hub)
    assert check_retrained_model(model.model, model, hub, hub | {"revision": "other"})[1] == hub


def test_beside_a_combined_adapter_the_base_is_a_retrained_model(
    tmp_path: Path, model: ModelConfig, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base alone never knew the rows: the user's own adapter, in the combined one, does."""
    combined = shutil.copytree(trained / "forget-adapter", tmp_path / "combined")
    made = json.loads((combined / "provenance.json").read_text())
    more = {"combined": True, "tuned_adapter": {"path": "mine", "sha256": "c0ffee"}}
    (combined / "provenance.json").write_text(json.dumps(made | more))
    rows, theirs = Asked(forget=rows_with(tmp_path / "rows.jsonl", "In Bonn.")), str(tmp_path / "theirs")
    evaluate(Subject(theirs), model, rows, SILENT)
    monkeypatch.setattr("loramox.evaluate.evaluate.load_reference", lambda *_: 1 / 0)  # all checks come before
    with pytest.raises(ZeroDivisionError):
        evaluate(Subject(str(tmp_path / "out"), str(combined)), model, replace(rows, retrained=[theirs]), SILENT)
    data, retain = Data(rows.forget, str(tmp_path / "retain.jsonl")), questions(PEOPLE[4:])
    Path(data.retain).write_text("".join(json.dumps(row) + "\n" for row in retain))
    for adapter, refused in ((combined, False), (trained / "forget-adapter", True)):
        config = AttackConfig(str(adapter), str(tmp_path / "a"), attacks=["relearn"], retrained_model=model.model)
        expected = pytest.raises(SettingsError, match="knows the forget rows") if refused else nullcontext()
        with expected:
            Bench(config, model, data, SILENT, Tokenisation(), Columns())


@pytest.mark.parametrize("lost", [("prompts", "base"), ("prompts",), ("base",)], ids=["all", "prompts", "base"])
def test_an_evaluation_that_was_not_finished_is_no_retrained_models(
    lost: tuple[str, ...], tmp_path: Path, model: ModelConfig, asked: Callable
) -> None:
    asked(model, "theirs")
    path = tmp_path / "theirs" / "summary.json"
    held = json.loads(path.read_text())
    path.unlink()
    if lost != ("prompts", "base"):  # neither is in the summary of another command, such as a point of a sweep
        path.write_text(json.dumps({name: value for name, value in held.items() if name not in lost}))
    for given in (tmp_path / "theirs", tmp_path / "theirs" / "records.jsonl"):
        message = rf"--retrained {given}: this evaluation was not finished, .*Run it again: .* --out {path.parent},"
        with pytest.raises(RunError, match=message):
            asked(model, "out", retrained=str(given))
    assert not (tmp_path / "out").exists()


def test_records_with_another_prompt_template_are_refused(tmp_path: Path, model: ModelConfig, asked: Callable) -> None:
    asked(model, "theirs", template="Q: {prompt} A:")
    with pytest.raises(
        RunError,
        match=r"theirs was scored with prompts of another form: 'Q: .* here 'Question: .*same --prompt_template",
    ):
        asked(model, "out", retrained=str(tmp_path / "theirs"))
    asked(model, "same", template="Q: {prompt} A:", retrained=str(tmp_path / "theirs"))


def test_the_tokenizers_own_template_is_the_same_named_or_not(
    tmp_path: Path, model: ModelConfig, asked: Callable
) -> None:
    asked(model, "theirs", template=DEFAULT_TEMPLATE)
    asked(model, "out", retrained=str(tmp_path / "theirs"))


def test_a_chat_template_is_another_prompt_than_one_of_the_flag(
    tmp_path: Path, model: ModelConfig, asked: Callable, tokenizer: Any
) -> None:
    chat = with_chat_template(model, tokenizer, tmp_path / "chat")
    asked(model, "theirs", template="Q: {prompt} A:")
    with pytest.raises(
        RunError, match=r"prompts of another form: 'Q: Who wrote it\? A:', and here 'user: Who wrote it"
    ):
        asked(chat, "out", retrained=str(tmp_path / "theirs"))


def with_chat_template(model: ModelConfig, tokenizer: Any, folder: Path, opening: str = "") -> ModelConfig:
    AutoModelForCausalLM.from_pretrained(model.model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = opening + "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return ModelConfig(str(folder), quantization="none")


@pytest.mark.parametrize("lost", ["theirs", "ours"])
def test_a_retrained_model_that_lost_its_chat_template_was_asked_in_another_form(
    tmp_path: Path, model: ModelConfig, asked: Callable, tokenizer: Any, lost: str
) -> None:
    """Neither has --prompt_template: the flag does not tell them apart."""
    chat = with_chat_template(model, tokenizer, tmp_path / "chat")
    theirs, ours = (model, chat) if lost == "theirs" else (chat, model)
    asked(theirs, "theirs")
    with pytest.raises(
        RunError, match=r"prompts of another form: .*Who wrote it\?.* has a chat template and the other none"
    ):
        asked(ours, "out", retrained=str(tmp_path / "theirs"))
    assert not (tmp_path / "out").exists()
    asked(model, "same", template=DEFAULT_TEMPLATE)  # the default, in words
    asked(chat, "out", template=DEFAULT_TEMPLATE, retrained=str(tmp_path / "same"))


def test_another_chat_template_is_another_form(
    tmp_path: Path, model: ModelConfig, asked: Callable, tokenizer: Any
) -> None:
    asked(with_chat_template(model, tokenizer, tmp_path / "a"), "theirs")
    with pytest.raises(RunError, match=r"prompts of another form: .*'Be brief"):
        asked(
            with_chat_template(model, tokenizer, tmp_path / "b", "Be brief. "),
            "out",
            retrained=str(tmp_path / "theirs"),
        )


def test_the_form_does_not_matter_to_rows_of_plain_text(tmp_path: Path, model: ModelConfig, tokenizer: Any) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "Anna lives in Oslo and Ben in Lima."}) + "\n")
    rows = Asked(forget=str(text))
    assert evaluate(Subject(str(tmp_path / "theirs")), model, rows, SILENT)["prompts"] == {}
    chat = with_chat_template(model, tokenizer, tmp_path / "chat")
    evaluate(Subject(str(tmp_path / "out")), chat, replace(rows, retrained=[str(tmp_path / "theirs")]), SILENT)
