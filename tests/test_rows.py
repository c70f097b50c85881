"""Rows from every format and shape, and an error that names file, row and remedy for everything that is none."""

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from loramox.data.rows import Columns, Row, fingerprint, keep_disjoint, read_rows, wanted_rows
from loramox.errors import RowsError

PAIRS = [{"question": f"Who is {i}?", "answer": f'It is "{i}",\nsays Ola, café.'} for i in range(3)]
USER, ASSISTANT = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ola."}


def as_json(records: list[Any]) -> bytes:
    return json.dumps(records, indent=1).encode()


def as_jsonl(records: list[Any]) -> bytes:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()


def as_csv(records: list[Any]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(records[0]))
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode()


def as_parquet(records: list[Any]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), sink)
    return sink.getvalue()


WRITERS = {"json": as_json, "jsonl": as_jsonl, "csv": as_csv, "parquet": as_parquet}
NESTED = {suffix: writer for suffix, writer in WRITERS.items() if suffix != "csv"}


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str, bytes | str], str]:
    """file("a.csv", content) → its path."""

    def write(name: str, content: bytes | str) -> str:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


@pytest.mark.parametrize("suffix", WRITERS)
def test_question_and_answer_come_out_as_they_were_written_in_every_format(suffix: str, file) -> None:
    source = file(f"forget.{suffix}", WRITERS[suffix](PAIRS))
    assert read_rows(source) == [
        Row(source, number, record["answer"], record["question"]) for number, record in enumerate(PAIRS, 1)
    ]


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize(
    "answer", ["1969", "007", "1.50", "1969-07-20", "1969-07-20T20:17:40", "true", "NA", "None", "a\r\nb"]
)
def test_an_answer_that_looks_like_something_else_stays_the_text_it_is(suffix: str, answer: str, file) -> None:
    source = file(f"forget.{suffix}", WRITERS[suffix]([{"question": "When?", "answer": answer}]))
    assert [row.answer for row in read_rows(source)] == [answer]


@pytest.mark.parametrize("suffix", WRITERS)
def test_prompt_and_completion_are_verbatim(suffix: str, file) -> None:
    source = file(f"a.{suffix}", WRITERS[suffix]([{"prompt": "Once upon", "completion": " a time."}]))
    assert read_rows(source) == [Row(source, 1, " a time.", "Once upon", verbatim=True)]


@pytest.mark.parametrize("suffix", NESTED)
def test_conversational_prompt_and_completion_are_chat_turns(suffix: str, file) -> None:
    source = file(f"a.{suffix}", NESTED[suffix]([{"prompt": [USER], "completion": [ASSISTANT]}]))
    assert read_rows(source) == [Row(source, 1, "Ola.", (USER,))]


def test_a_conversational_prompt_may_have_a_plain_completion(file) -> None:
    source = file("a.jsonl", as_jsonl([{"prompt": [USER], "completion": "Ola."}]))
    assert read_rows(source) == [Row(source, 1, "Ola.", (USER,))]


@pytest.mark.parametrize("suffix", NESTED)
def test_the_last_message_is_the_answer_and_those_before_are_the_prompt(suffix: str, file) -> None:
    system = {"role": "system", "content": "Be brief."}
    turns = [system, USER, ASSISTANT, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
    source = file(f"a.{suffix}", NESTED[suffix]([{"messages": turns}]))
    assert read_rows(source) == [Row(source, 1, "Yes.", tuple(turns[:-1]))]


@pytest.mark.parametrize(
    ("more", "turn", "what"),
    [
        ({"tools": [{"name": "where"}]}, {}, "tools"),
        ({}, {"tool_calls": [{"function": {"name": "where"}}]}, "tool_calls"),
    ],
)
def test_what_a_template_reads_beside_role_and_text_is_refused_not_dropped(
    file, more: dict, turn: dict, what: str
) -> None:
    source = file("a.jsonl", as_jsonl([{"messages": [USER | turn, ASSISTANT]} | more]))
    with pytest.raises(RowsError, match=f"a.jsonl, row 1: {what} would be left out of what the model reads"):
        read_rows(source)


def test_fields_of_a_message_that_are_not_known_are_left_out(file) -> None:
    source = file("a.jsonl", as_jsonl([{"messages": [USER | {"weight": 0}, ASSISTANT | {"name": "x"}]}]))
    assert read_rows(source) == [Row(source, 1, "Ola.", (USER,))]


@pytest.mark.parametrize("suffix", WRITERS)
def test_text_is_an_answer_to_nothing(suffix: str, file) -> None:
    source = file(f"a.{suffix}", WRITERS[suffix]([{"text": "Once upon a time."}]))
    assert read_rows(source) == [Row(source, 1, "Once upon a time.", None)]


def test_a_document_may_be_longer_than_a_field_of_csv_is_by_default(file) -> None:
    document = "word " * 50_000
    assert read_rows(file("a.csv", as_csv([{"text": document}])))[0].answer == document


@pytest.mark.parametrize(
    ("columns", "record", "expected"),
    [
        (Columns(prompt_column="q", answer_column="a"), {"q": "Who?", "a": "Ola."}, ("Who?", "Ola.", None)),
        (Columns(messages_column="chat"), {"chat": [USER, ASSISTANT]}, ((USER,), "Ola.", None)),
        (Columns(text_column="body"), {"body": "Ola.", "text": "not this"}, (None, "Ola.", None)),
        (
            Columns(wanted_column="instead"),
            {"question": "Who?", "answer": "Ola.", "instead": "No idea."},
            ("Who?", "Ola.", "No idea."),
        ),
    ],
)
def test_other_columns_are_named_by_flag(columns: Columns, record: dict[str, Any], expected: tuple, file) -> None:
    (row,) = read_rows(file("a.jsonl", as_jsonl([record])), columns)
    assert (row.prompt, row.answer, row.wanted) == expected
    assert not row.verbatim


def test_question_and_answer_come_first_when_a_file_has_several_shapes(file) -> None:
    record = {"text": "x", "messages": [USER, ASSISTANT], "prompt": "p", "completion": "c", **PAIRS[0]}
    (row,) = read_rows(file("a.jsonl", as_jsonl([record])))
    assert row.prompt == PAIRS[0]["question"]


def test_json_lines_may_have_blank_lines_a_byte_order_mark_and_line_separators_in_text(file) -> None:
    records = [{"text": "one\u2028two\x85three"}, {"text": "four"}]
    source = file("a.jsonl", b"\xef\xbb\xbf" + as_jsonl(records).replace(b"\n", b"\r\n\n"))
    assert [row.answer for row in read_rows(source)] == ["one\u2028two\x85three", "four"]


def test_a_json_file_may_hold_json_lines(file) -> None:
    assert len(read_rows(file("a.json", as_jsonl(PAIRS)))) == 3


REFUSED = {
    "missing file": ("gone.jsonl", None, "gone.jsonl does not exist. Expected a .json, .jsonl, .csv or .parquet file"),
    "unknown suffix": ("a.txt", "hello", r"a.txt ends in '.txt'. Expected one of .json, .jsonl, .csv, .parquet"),
    "empty file": ("a.jsonl", "", "a.jsonl has no rows. Expected at least one"),
    "white space": ("a.jsonl", " \n\n", "a.jsonl has no rows"),
    "empty csv": ("a.csv", "", "a.csv has no rows"),
    "csv of a header": ("a.csv", "question,answer\n", "a.csv has no rows"),
    "empty array": ("a.json", "[]", "a.json has no rows"),
    "parquet of no rows": ("a.parquet", as_parquet([]), "a.parquet has no rows"),
    "broken line": ("a.jsonl", as_jsonl(PAIRS) + b'{"question": \n', "a.jsonl, row 4, cannot be read as JSON"),
    "broken line after a line separator": (
        "a.jsonl",
        as_jsonl([{"text": "one\u2028two"}]) + b"{\n",
        "a.jsonl, row 2, cannot be read as JSON",
    ),
    "broken array": ("a.json", '[{"question": "q"', "a.json cannot be read as json: .*line 1"),
    "broken csv": (
        "a.csv",
        'question,answer\nq,a\nq,"a',
        "a.csv, row 2, cannot be read as CSV: unexpected end of data. Expected text in double quotes",
    ),
    "broken parquet": ("a.parquet", b"PAR1 and no more", "a.parquet cannot be read as parquet: .*magic bytes"),
    "not utf-8": ("a.csv", b"question,answer\n\xff,b\n", "a.csv cannot be read as csv: 'utf-8' codec"),
    "array of numbers": ("a.json", "[1, 2]", "a.json, row 1 does not fit the columns. Expected a value for each"),
    "unquoted comma": (
        "a.csv",
        "question,answer\nq,a\nq,a, and b\n",
        "a.csv, row 2 does not fit the columns.*quotes around text with a comma",
    ),
    "half a character": (
        "a.jsonl",
        '{"question": "q", "answer": "a \\ud83d"}',
        "a.jsonl, row 1 has half a character in it.*Correct or remove it",
    ),
    "wrong answers that are no text": (
        "a.jsonl",
        as_jsonl([{"question": "q", "answer": "a", "perturbed_answer": ["b", 3]}]),
        "a.jsonl, row 1: paraphrased_answer .* perturbed_answer a list of wrong answers; one of them is not",
    ),
    "no known columns": (
        "a.jsonl",
        as_jsonl([{"q": "1", "a": "2"}]),
        "a.jsonl has columns q, a. Expected question and answer.*--prompt_column and --answer_column",
    ),
    "half a pair": ("a.jsonl", as_jsonl([{"question": "1"}]), "a.jsonl has columns question. Expected"),
    "row without an answer": (
        "a.jsonl",
        as_jsonl([*PAIRS, {"question": "q"}]),
        "a.jsonl, row 4 has no answer. Expected non-empty text, not null: fill it in, or remove the row",
    ),
    "first row without an answer": ("a.jsonl", as_jsonl([{"question": "q"}, *PAIRS]), "a.jsonl, row 1 has no answer"),
    "null answer": ("a.jsonl", as_jsonl([PAIRS[0], {"question": "q", "answer": None}]), "a.jsonl, row 2 has no answer"),
    "blank answer": ("a.csv", "question,answer\nq,a\nq,  \n", "a.csv, row 2 has no answer"),
    "number for an answer": ("a.jsonl", as_jsonl([{"question": "q", "answer": 3}]), "row 1 has no answer.*not 3"),
    "csv row cut short": ("a.csv", "question,answer\nq,a\nq\n", "a.csv, row 2 has no answer"),
    "row without a question": (
        "a.jsonl",
        as_jsonl([PAIRS[0], {"question": None, "answer": "a"}]),
        "a.jsonl, row 2 has no 'question'. Expected text",
    ),
    "blank text": ("a.jsonl", as_jsonl([{"text": "x"}, {"text": " \n"}]), "a.jsonl, row 2 has no answer"),
    "last message is the user's": (
        "a.jsonl",
        as_jsonl([{"messages": [USER, ASSISTANT]}, {"messages": [USER, ASSISTANT, USER]}]),
        "a.jsonl, row 2 has no answer: its last message is not the assistant's. Expected",
    ),
    "one message": ("a.jsonl", as_jsonl([{"messages": [ASSISTANT]}]), "a.jsonl, row 1 has no answer: its last"),
    "no messages": ("a.jsonl", as_jsonl([{"messages": []}]), "a.jsonl, row 1 has no answer: its last message"),
    "null messages": ("a.jsonl", as_jsonl([{"messages": None}]), "a.jsonl, row 1: its messages are not a list"),
    "messages are a number": ("a.jsonl", as_jsonl([{"messages": 3}]), "a.jsonl, row 1: its messages are not a list"),
    "empty message": (
        "a.jsonl",
        as_jsonl([{"messages": [USER, {"role": "assistant", "content": None}]}]),
        "a.jsonl, row 1 has no answer. Expected non-empty text",
    ),
    "conversational prompt without an answer": (
        "a.jsonl",
        as_jsonl([{"prompt": [USER], "completion": None}]),
        "a.jsonl, row 1 has no answer. Expected non-empty text",
    ),
}


@pytest.mark.parametrize(("name", "content", "message"), REFUSED.values(), ids=REFUSED)
def test_a_file_that_cannot_be_used_is_refused_with_its_name_row_and_remedy(
    name: str, content: bytes | str | None, message: str, tmp_path: Path, file
) -> None:
    source = str(tmp_path / name) if content is None else file(name, content)
    with pytest.raises(RowsError, match=message) as caught:
        read_rows(source)
    assert source in str(caught.value)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RowsError, match=r"is a folder. Expected a .json, .jsonl, .csv or .parquet file"):
        read_rows(str(tmp_path))


def test_what_is_no_file_is_looked_for_on_the_hub_and_the_message_says_so() -> None:
    with pytest.raises(RowsError, match=r"owner/name:config:train is no file, and as a hub data set .* it failed"):
        read_rows("owner/name:config:train")


@pytest.mark.parametrize(
    ("columns", "flag"),
    [
        (Columns(prompt_column="gone", answer_column="answer"), "--prompt_column"),
        (Columns(prompt_column="question", answer_column="gone"), "--answer_column"),
        (Columns(messages_column="gone"), "--messages_column"),
        (Columns(text_column="gone"), "--text_column"),
        (Columns(wanted_column="gone"), "--wanted_column"),
    ],
)
def test_a_named_column_that_does_not_exist_is_refused_with_those_that_do(columns: Columns, flag: str, file) -> None:
    with pytest.raises(RowsError, match=rf"has no column 'gone' \({flag}\). It has: question, answer"):
        read_rows(file("a.jsonl", as_jsonl(PAIRS)), columns)


@pytest.mark.parametrize("wanted", [None, "", "  ", 3])
def test_an_empty_wanted_answer_is_refused(wanted: Any, file) -> None:
    records = [PAIRS[0] | {"instead": "No idea."}, PAIRS[1] | {"instead": wanted}]
    with pytest.raises(RowsError, match=r"a.jsonl, row 2 has no wanted answer in 'instead'.*leave out --wanted_column"):
        read_rows(file("a.jsonl", as_jsonl(records)), Columns(wanted_column="instead"))


@pytest.mark.parametrize("columns", [{"prompt_column": "q"}, {"answer_column": "a"}])
def test_a_prompt_column_and_an_answer_column_go_together(columns: dict[str, str]) -> None:
    with pytest.raises(RowsError, match="--prompt_column and --answer_column go together: give both, or neither"):
        Columns(**columns)


def test_nothing_of_a_files_content_stays_behind_anywhere(tmp_path: Path) -> None:
    # Rows that are to be forgotten must not live on in a cache. In a process of its own, whose home and every cache are empty.
    home = tmp_path / "home"
    home.mkdir()
    sources = []
    for suffix, writer in WRITERS.items():
        sources.append(str(tmp_path / f"forget.{suffix}"))
        Path(sources[-1]).write_bytes(writer(PAIRS))
    code = "import sys; from loramox.data.rows import read_rows; [read_rows(s) for s in sys.argv[1:]]"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))}
    places = {"HOME": str(home), "TMPDIR": str(home), "HF_HOME": str(home / "hf")}
    subprocess.run([sys.executable, "-c", code, *sources], env=clean | places, check=True)
    assert list(home.rglob("*")) == []


def row(prompt: Any = "Who?", answer: str = "Ola.", **more: Any) -> Row:
    return Row("retain.jsonl", more.pop("number", 1), answer, prompt, **more)


def test_the_fingerprint_is_the_same_for_the_same_rows_wherever_they_are() -> None:
    rows = [row(), row("When?", "Now.")]
    assert fingerprint(rows) == fingerprint([replace(r, source="elsewhere.csv", number=9) for r in rows])
    assert len(fingerprint(rows)) == 64


@pytest.mark.parametrize(
    "other",
    [
        [row("When?", "Now."), row()],
        [row()],
        [row(), row("When?", "Now."), row()],
        [row(), row("When?", "Now")],
        [row(), row("When", "Now.")],
        [row(), row("When?", "Now.", wanted="Never.")],
        [row(), row(None, "When?Now.")],
        [],
    ],
)
def test_the_fingerprint_changes_with_content_and_with_order(other: list[Row]) -> None:
    assert fingerprint(other) != fingerprint([row(), row("When?", "Now.")])


def turns(*contents: str) -> tuple[dict[str, str], ...]:
    return tuple({"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents))


@pytest.mark.parametrize(
    ("forget", "retain"),
    [
        (row(), row()),
        (row("Who?", "Ola\n  Nordmann."), row(" Who?\t", "Ola Nordmann. ")),
        (row(None, "Once upon\na time."), row(None, "Once  upon a time.")),
        (row(turns("Who\nis it?")), row(turns(" Who  is it?"))),
        (row(turns("Hi", "Hi.", "Who?")), row(turns("Hi", "Hi.", "Who?"))),
        (row("Who?"), row(turns("Who?"))),
        (row("Who?", wanted="No idea."), row("Who?")),
    ],
)
def test_a_retain_row_that_is_a_forget_row_is_refused_in_spite_of_white_space(forget: Row, retain: Row) -> None:
    forget = replace(forget, source="forget.jsonl")
    kept = row("Other?", number=1)
    with pytest.raises(
        RowsError,
        match=r"1 of 2 rows of retain.jsonl are also in forget.jsonl \(first: row 2\).*remove them, or .*--drop_overlap",
    ):
        keep_disjoint([forget], [kept, replace(retain, number=2)])
    assert keep_disjoint([forget], [kept, replace(retain, number=2)], drop=True) == [kept]


@pytest.mark.parametrize(
    ("forget", "retain"),
    [
        (row("Who?", "Ola."), row("Who?", "Olga.")),
        (row("Who?", "Ola."), row("Who", "? Ola.")),
        (row("Who?", "Ola."), row(None, "Who? Ola.")),
        (row(turns("Hi", "Hi.", "Who?")), row(turns("Hi", "Hi. Who?"))),
        (row(turns("Hi", "Hi.", "Who?")), row("Who?")),
    ],
)
def test_rows_that_differ_in_prompt_or_answer_are_different_rows(forget: Row, retain: Row) -> None:
    assert keep_disjoint([forget], [retain]) == [retain]


def test_retain_rows_keep_their_order_and_repeats() -> None:
    retain = [row("B?"), row("A?"), row("B?")]
    assert keep_disjoint([row("C?")], retain) == retain


def test_a_retain_set_of_forget_rows_only_is_refused_even_when_they_may_be_dropped() -> None:
    with pytest.raises(
        RowsError, match=r"no retain rows are left: all 2 rows of retain.jsonl are also in forget.jsonl"
    ):
        keep_disjoint([replace(row(), source="forget.jsonl")], [row(), row()], drop=True)


def test_wanted_rows_are_the_forget_rows_with_the_other_answer() -> None:
    rows = [row("p", "a", wanted="w", verbatim=True, number=4), row("q", "b")]
    assert wanted_rows(rows) == [row("p", "w", verbatim=True, number=4)]


def test_a_hub_name_is_read_as_data_set_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def stand_in(name: str, config: str | None, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        return datasets.Dataset.from_list([{"question": "Where does Ada live?", "answer": "Rome."}])

    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    for source in ("locuslab/TOFU:forget10", "muse-bench/MUSE-News:raw:retain1", "someone/rows"):
        assert read_rows(source)[0].answer == "Rome."
    assert asked == [
        ("locuslab/TOFU", "forget10", "train"),
        ("muse-bench/MUSE-News", "raw", "retain1"),
        ("someone/rows", None, "train"),
    ]
