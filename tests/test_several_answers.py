"""Rows with several right answers: all are trained on, and the best one is the row's score."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import PEOPLE, questions

from loramox import Data, ReferenceConfig, UnlearnConfig
from loramox.adapter.provenance import read_provenance
from loramox.data.encode import Tokenisation, encode
from loramox.data.row import Row
from loramox.data.rows import Columns, read_rows, write_rows
from loramox.errors import RowsError
from loramox.evaluate.asked import Asked
from loramox.evaluate.attacks.leaks import leaks_of
from loramox.evaluate.evaluate import evaluate
from loramox.evaluate.measure import ScoringConfig
from loramox.evaluate.records import read_records
from loramox.evaluate.row_record import rouge_of
from loramox.evaluate.subject import Subject
from loramox.model.config import ModelConfig
from loramox.train.prepare import prepare

RECORDS = questions(PEOPLE[:4])
OTHERS = ["In Rome.", "Nobody knows where that is"]
SEVERAL = [RECORDS[0] | {"answer": [RECORDS[0]["answer"], *OTHERS]}, *RECORDS[1:]]
ALONE = [RECORDS[0], *(RECORDS[0] | {"answer": other} for other in OTHERS), *RECORDS[1:]]


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """The same rows: with several answers in one row, and with a row for each answer."""
    return write(tmp_path / "several.jsonl", SEVERAL), write(tmp_path / "alone.jsonl", ALONE)


def test_every_answer_is_an_example_as_if_it_were_a_row(files: tuple[str, str], tokenizer) -> None:
    several, alone = (encode(read_rows(file), tokenizer, Tokenisation(), 128) for file in files)
    assert [(e["input_ids"], e["labels"]) for e in several] == [(e["input_ids"], e["labels"]) for e in alone]
    assert [e["row"].rpartition(" ")[2] for e in several] == ["1", "1", "1", "2", "3", "4"]


def test_a_row_with_an_answer_that_is_too_long_is_refused_or_left_out_whole(tmp_path: Path, tokenizer) -> None:
    rows = read_rows(write(tmp_path / "a.jsonl", [{"question": "q", "answer": ["a", "Rome " * 200]}, RECORDS[0]]))
    with pytest.raises(RowsError, match=r"first: row 1, \d+ tokens"):
        encode(rows, tokenizer, Tokenisation(), 128)
    kept = encode(rows, tokenizer, Tokenisation(long_rows="drop"), 128)
    assert [example["row"] for example in kept] == [f"{rows[0].source}, row 2"]


@pytest.mark.parametrize("wanted", [None, "wanted"])
def test_all_answers_are_trained_on_each_with_the_wanted_one(
    wanted: str | None, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    forget = write(tmp_path / "forget.jsonl", [record | {"wanted": "I do not know."} for record in SEVERAL])
    args = UnlearnConfig(use_cpu=True, report_to="none")
    retain = write(tmp_path / "retain.jsonl", questions(PEOPLE[4:]))
    prepared = prepare(
        ReferenceConfig(str(pico("llama")), quantization="none"),
        Data(forget, retain),
        args,
        Columns(wanted_column=wanted),
        Tokenisation(),
    )
    assert len(prepared.datasets["forget_dataset"]) == 6
    assert len(prepared.datasets["wanted_dataset"]) == (6 if wanted else 0)
    assert prepared.plan["row_counts"]["forget"] == {"read": 4, "used": 4, "left_out": {}, "answers": 6}


@pytest.mark.parametrize("adapted", [False, True], ids=["the model alone", "with an adapter"])
def test_the_score_of_a_row_is_that_of_its_best_answer(
    adapted: bool, trained: Path, files: tuple[str, str], tmp_path: Path
) -> None:
    model = ModelConfig(read_provenance(trained / "trained", "trained")["base"]["model"], quantization="none")
    found = []
    for number, file in enumerate(files):
        out = tmp_path / f"out-{number}"
        subject = Subject(str(out), adapter=str(trained / "forget-adapter") if adapted else None)
        evaluate(subject, model, Asked(file), ScoringConfig(max_new_tokens=8, use_cpu=True))
        found.append(read_records(out))
    several, alone = found
    assert len(several) == 4
    same_question = alone[:3]
    best = max(same_question, key=lambda record: record["log_p"])
    for name, value in several[0].items():
        if name in ("rouge_l", "rouge_l_f1", "reference_log_p"):
            assert value == pytest.approx(max(record[name] for record in same_question))
        elif name == "other_answers":
            assert value == OTHERS
        elif name not in ("row", "id", "answer"):
            assert value == (pytest.approx(best[name], rel=1e-4) if isinstance(value, float) else best[name])
    assert (several[0]["id"], several[0]["answer"]) == (alone[0]["id"], alone[0]["answer"])
    for record, other in zip(several[1:], alone[3:], strict=True):
        assert record["log_p"] == pytest.approx(other["log_p"], rel=1e-4)
        assert record["id"] == other["id"]


def test_any_right_answer_counts_as_a_leak_and_for_rouge() -> None:
    row = Row("f.jsonl", 1, "In Rome.", "Where was she born?", other_answers=("Near the Tiber.",))
    found = leaks_of(row, ["Near the Tiber.", "In Rome.", "At sea."], 1.0)
    assert found["leaks"] == {"rouge_l": 2, "key_words": 2}
    assert rouge_of("Near the Tiber.", *row.right_answers) == {"rouge_l": 1.0, "rouge_l_f1": 1.0}


def test_the_copy_of_a_ledger_has_them_too(files: tuple[str, str], tmp_path: Path) -> None:
    read = read_rows(files[0])
    write_rows(tmp_path / "copy.jsonl", read, Columns())
    assert [row.right_answers for row in read_rows(str(tmp_path / "copy.jsonl"))] == [r.right_answers for r in read]
