"""Records of a retrained model are compared only when it was asked the same: rows, wrong answers, prompts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import PEOPLE, questions
from transformers import AutoModelForCausalLM

from loramox import Tokenisation
from loramox.data.encode import DEFAULT_TEMPLATE
from loramox.errors import RunError
from loramox.evaluate.asked import Asked
from loramox.evaluate.evaluate import evaluate
from loramox.evaluate.measure import ScoringConfig
from loramox.evaluate.subject import Subject
from loramox.model.config import ModelConfig

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
        model: ModelConfig, out: str, wrong: str = "In Bonn.", template: str | None = None, **more: Any
    ) -> dict:
        forget = rows_with(tmp_path / f"{out}.jsonl", wrong)
        given = Asked(forget=forget, **more)
        return evaluate(Subject(str(tmp_path / out)), model, given, SILENT, Tokenisation(prompt_template=template))

    return evaluated


def test_records_with_other_wrong_answers_are_refused(tmp_path: Path, model: ModelConfig, asked: Callable) -> None:
    asked(model, "theirs", wrong="In Paris.")
    for retrained in (tmp_path / "theirs", tmp_path / "theirs" / "records.jsonl"):
        with pytest.raises(RunError, match=r"theirs.* has other paraphrases or wrong answers of .*, row 1"):
            asked(model, "out", retrained=str(retrained))
    assert not (tmp_path / "out").exists()


def test_records_of_which_nothing_else_is_known_are_warned_of(
    tmp_path: Path, model: ModelConfig, asked: Callable
) -> None:
    asked(model, "theirs")
    (tmp_path / "theirs" / "summary.json").unlink()
    with pytest.warns(UserWarning, match=r"its model and its prompt template are not known. Give the whole folder"):
        asked(model, "out", retrained=str(tmp_path / "theirs"))


def test_records_with_another_prompt_template_are_refused(tmp_path: Path, model: ModelConfig, asked: Callable) -> None:
    asked(model, "theirs", template="Q: {prompt} A:")
    with pytest.raises(
        RunError, match=r"scored with the prompt template 'Q: .* and this is with .*'Question: .*same --prompt_template"
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
    chat = tmp_path / "chat"
    AutoModelForCausalLM.from_pretrained(model.model).save_pretrained(chat)
    tokenizer.save_pretrained(chat)
    config = json.loads((chat / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (chat / "tokenizer_config.json").write_text(json.dumps(config))
    asked(model, "theirs", template="Q: {prompt} A:")
    with pytest.raises(RunError, match="and this is with the chat template"):
        asked(ModelConfig(str(chat), quantization="none"), "out", retrained=str(tmp_path / "theirs"))
