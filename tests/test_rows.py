"""Rows from every format and shape, and an error that names file, row and remedy for everything that is none."""

import csv
import io
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import loramox.data.row_files
from loramox.data.count import count_rows
from loramox.data.row import Row, answering, each_answer, fingerprint, keep_disjoint, spread, wanted_rows
from loramox.data.rows import Columns, read_rows, write_rows
from loramox.errors import LoramoxError, RowsError

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
    return parquet(pyarrow.Table.from_pylist(records))


def parquet(table: pyarrow.Table) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink)
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
        ({"system": "Be brief."}, {}, "system"),
        ({}, {"tool_calls": [{"function": {"name": "where"}}]}, "tool_calls"),
        ({}, {"reasoning_content": ["I recall: Ola."]}, "reasoning_content"),
        ({}, {"thinking": {"text": "I recall: Ola."}, "name": "x"}, "name, thinking"),
    ],
)
def test_what_a_template_reads_beside_role_and_text_is_refused_not_dropped(
    file, more: dict, turn: dict, what: str
) -> None:
    source = file("a.jsonl", as_jsonl([{"messages": [USER | turn, ASSISTANT]} | more]))
    with pytest.raises(RowsError, match=f"a.jsonl, row 1.*: {what} would be left out of what the model reads"):
        read_rows(source)


@pytest.mark.parametrize("suffix", NESTED)
def test_reasoning_stays_with_its_message_and_goes_with_another_answer(suffix: str, file, tmp_path: Path) -> None:
    before, last = ({"role": "assistant", "content": "Ola.", "thinking": text} for text in ("I recall.", "I am sure."))
    source = file(f"a.{suffix}", NESTED[suffix]([{"messages": [USER, before, USER, last], "other": "No."}]))
    (row,) = rows = read_rows(source, Columns(messages_column="messages", wanted_column="other"))
    assert row == Row(source, 1, "Ola.", (USER, before, USER), wanted="No.", reasoning=(("thinking", "I am sure."),))
    without = replace(row, reasoning=())
    assert fingerprint([row]) != fingerprint([without])
    assert row.key() == without.key()
    assert wanted_rows(rows) == wanted_rows([without])
    named, recognised = Columns(messages_column="messages", wanted_column="other"), Columns()
    for kept, columns in ((rows, named), ([replace(row, wanted=None)], recognised)):
        write_rows(tmp_path / "copy.jsonl", kept, columns)
        assert fingerprint(read_rows(str(tmp_path / "copy.jsonl"), columns)) == fingerprint(kept)


def test_reasoning_under_two_keys_is_one_text_or_two(file) -> None:
    for other, read in (("Hm.", ["reasoning_content"]), ("Oh.", ["reasoning_content", "thinking"])):
        last = ASSISTANT | {"thinking": other, "reasoning_content": "Hm."}
        (row,) = read_rows(file("a.jsonl", as_jsonl([{"messages": [USER, last]}])))
        assert [key for key, _ in row.reasoning] == read


@pytest.mark.parametrize("suffix", NESTED)
def test_fields_of_a_message_that_say_nothing_are_left_out(suffix: str, file) -> None:
    silent = {"weight": 0, "train": False, "refusal": None, "name": ""}
    source = file(f"a.{suffix}", NESTED[suffix]([{"messages": [USER | silent, ASSISTANT]}]))
    assert read_rows(source) == [Row(source, 1, "Ola.", (USER,))]


@pytest.mark.parametrize("suffix", NESTED)
def test_text_parts_of_a_message_are_joined(suffix: str, file) -> None:
    parts = [{"type": "text", "text": "Who", "image": None}, {"type": "text", "text": " is it?", "image": None}]
    user = {"role": "user", "content": parts}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Ola."}]}
    source = file(f"a.{suffix}", NESTED[suffix]([{"messages": [user, answer]}]))
    assert read_rows(source) == [Row(source, 1, "Ola.", ({"role": "user", "content": "Who is it?"},))]


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"role": "user", "content": None}, "its content is null. Expected text: fill it in, or remove the row"),
        ({"role": "user"}, "its content is null"),
        ({"role": "user", "content": []}, r"its content is \[\]"),
        ({"role": "user", "content": 1990}, "its content is 1990. Expected text"),
        ({"role": "user", "content": "Who \ud83d"}, "has half a character in it"),
        ({"content": "Who?"}, "it has no role. Expected .*role.*user"),
        ({"role": " ", "content": "Who?"}, "it has no role"),
        ({"from": "human", "value": "Who?"}, "it has no role"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "of type image_url, and only text is read. Remove the part, or the row",
        ),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "a part of its content is of type text"),
        ({"role": "user", "content": [{"text": "Who?", "image": "x.png"}]}, "image would be left out"),
        ({"role": "user", "content": [3]}, "a part of its content"),
    ],
)
def test_a_message_without_role_or_text_is_refused_with_its_row_and_number(turn: dict, message: str, file) -> None:
    records = [{"messages": [USER, ASSISTANT]}, {"messages": [USER, ASSISTANT, turn, ASSISTANT]}]
    with pytest.raises(RowsError, match=f"a.json, row 2, message 3.*{message}"):
        read_rows(file("a.json", as_json(records)))


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


@pytest.mark.parametrize("text", ['[{"text": "a"} {"text": "b"}]', ' [{"text": "a"},\n{"text": "b"},]\n'])
def test_a_comma_too_few_or_too_many_in_an_array_is_no_harm(text: str, file) -> None:
    assert [row.answer for row in read_rows(file("a.json", text))] == ["a", "b"]


def test_a_json_file_may_hold_json_lines(file) -> None:
    assert len(read_rows(file("a.json", as_jsonl(PAIRS)))) == 3


# The same examples each time. The folder of a test is shared by them; each writes its file anew.
QUICKLY = settings(
    derandomize=True,
    deadline=None,
    max_examples=150,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
TEXTS = st.text(st.characters(exclude_categories=()), max_size=30)  # halves of characters and NUL included
MOSTLY_WHOLE = st.one_of(st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=30), TEXTS)
SCRAPS = st.text("[]{},:;\"'01\\eu\r\n\t question", max_size=60)


@QUICKLY
@given(st.lists(st.tuples(MOSTLY_WHOLE, MOSTLY_WHOLE), min_size=1, max_size=4))
@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_pairs_of_texts_read_back_as_they_were_written_or_are_refused(
    suffix: str, tmp_path: Path, pairs: list[tuple[str, str]]
) -> None:
    records = [{"question": question, "answer": answer} for question, answer in pairs]
    try:
        content = WRITERS[suffix](records)
    except UnicodeEncodeError:  # this writer takes no halves of characters
        return
    (tmp_path / f"a.{suffix}").write_bytes(content)
    try:
        rows = read_rows(str(tmp_path / f"a.{suffix}"))
    except LoramoxError:
        whole = all(text.isprintable() and text.strip() for pair in pairs for text in pair)
        assert not whole, "ordinary text was refused"
        return
    assert [(row.prompt, row.answer) for row in rows] == pairs


@QUICKLY
@given(
    st.one_of(st.binary(max_size=60), *(SCRAPS.map(start.__add__) for start in ("", "question,answer\n", '{"text":')))
)
@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_bytes_are_rows_or_are_refused_with_the_name_of_the_file(
    suffix: str, tmp_path: Path, content: bytes | str
) -> None:
    source = tmp_path / f"a.{suffix}"
    source.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        assert read_rows(str(source))
    except LoramoxError as error:
        assert str(source) in str(error)  # noqa: PT017 (not every file is refused)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl"])
def test_the_mark_at_the_start_of_a_file_says_how_its_text_is_encoded(suffix: str, encoding: str, file) -> None:
    source = file(f"a.{suffix}", WRITERS[suffix](PAIRS).decode().encode(encoding))
    assert [row.answer for row in read_rows(source)] == [record["answer"] for record in PAIRS]


@pytest.mark.parametrize("separator", [";", "\t"])
def test_the_header_of_a_csv_file_says_what_separates_its_columns(separator: str, file) -> None:
    text = f'question{separator}answer\n"Who; or\twhat?"{separator}Ola, 5\n'
    (row,) = read_rows(file("a.csv", text))
    assert (row.prompt, row.answer) == ("Who; or\twhat?", "Ola, 5")


@pytest.mark.parametrize("number", ["1990", "1.50", "-3e5", "9" * 5000])
def test_a_number_is_read_as_it_is_written_and_the_user_is_told(number: str, file) -> None:
    source = file("a.jsonl", f'{{"question": "When?", "answer": {number}, "perturbed_answer": [1, "b"]}}\n')
    with pytest.warns(UserWarning, match=r"a.jsonl: 2 of its values are numbers, and are read as text \(first: row 1"):
        (row,) = read_rows(source)
    assert (row.answer, row.wrong_answers) == (number, ("1", "b"))
    assert {type(text) for text in (row.answer, *row.wrong_answers)} == {str}


def test_a_number_in_a_column_that_is_not_read_may_have_any_length(file) -> None:
    assert len(read_rows(file("a.jsonl", f'{{"question": "q", "answer": "a", "id": {"9" * 5000}}}'))) == 1


def test_a_number_of_parquet_is_read_as_text_and_nan_is_no_answer(file) -> None:
    table = pyarrow.table({"question": ["q", "r"], "answer": [1990.0, 1.5]})
    with pytest.warns(UserWarning, match=r"2 of its values are numbers.*row 1, '1990.0'"):
        assert [row.answer for row in read_rows(file("a.parquet", parquet(table)))] == ["1990.0", "1.5"]
    table = pyarrow.table({"question": ["q", "r"], "answer": [1990.0, float("nan")]})
    with pytest.raises(RowsError, match=r"row 2 has no answer. Expected non-empty text, not nan"):
        read_rows(file("a.parquet", parquet(table)))


ALPACA = [
    {"instruction": "Answer the question.", "input": f"Where was {name} born?", "output": f"{name}'s town."}
    for name in ("Ada", "Bo")
]


def test_alpacas_instruction_and_input_are_one_question(file) -> None:
    rows = read_rows(file("a.jsonl", as_jsonl([*ALPACA, ALPACA[0] | {"input": ""}, ALPACA[1] | {"input": None}])))
    assert [row.prompt for row in rows] == [
        "Answer the question.\nWhere was Ada born?",
        "Answer the question.\nWhere was Bo born?",
        "Answer the question.",
        "Answer the question.",
    ]
    assert [row.answer for row in rows[:2]] == ["Ada's town.", "Bo's town."]


@pytest.mark.parametrize(
    ("records", "columns", "message"),
    [
        (
            ALPACA,
            Columns(prompt_column="instruction", answer_column="output"),
            "all 2 rows ask the same question, and column 'input' is not read. If another column tells them apart",
        ),
        (
            [{"question": "Who?", "answer": a} for a in "ab"],
            None,
            "all 2 rows ask the same question. If another column",
        ),
        (
            [p | {"context": "Ola lives here.", "id": "q1"} for p in PAIRS],
            None,
            "column 'context' is not read. If the answer depends on it, put its text into the question",
        ),
        (
            [p | {"history": [["Who is Ola?", "A baker."]], "tags": ["people"], "ids": {"a": 1}} for p in PAIRS],
            None,
            "column 'history' is not read",
        ),
    ],
)
def test_rows_that_only_an_unread_column_tells_apart_are_warned_of(records, columns, message: str, file) -> None:
    with pytest.warns(UserWarning, match=message):
        read_rows(file("a.jsonl", as_jsonl(records)), columns)


@pytest.mark.parametrize(("count", "most"), [(400, 64), (65, 64), (64, 64), (3, 64), (0, 64)])
def test_rows_that_are_watched_are_from_everywhere_in_the_file(count: int, most: int) -> None:
    chosen = spread(range(count), most)
    assert len(chosen) == min(count, most)
    if count > most:
        gaps = {b - a for a, b in itertools.pairwise([*chosen, count])}
        assert gaps <= {count // most, count // most + 1}


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(
    "records",
    [
        PAIRS,
        [p | {"id": "q1", "lang": "en", "n": 3, "note": None} for p in PAIRS],
        [p | {"perturbed_answer": ["b c"], "paraphrased_answer": "d e", "paraphrased_question": "f g"} for p in PAIRS],
        [{"question": "Who?", "answer": "Ola."}],
        [{"text": "one two", "title": "A title."}, {"text": "one two", "title": "Another title."}],
    ],
)
def test_ordinary_files_are_read_without_a_warning(records, file) -> None:
    read_rows(file("a.jsonl", as_jsonl(records)))


def test_rows_that_a_missing_quote_swallowed_are_warned_of(file) -> None:
    with pytest.warns(
        UserWarning, match=r"a.csv, row 1: one value has line breaks.*looks like rows \(first: 'q2,a2'\).*are lost"
    ):
        assert len(read_rows(file("a.csv", 'question,answer\nq1,"a1\nq2,a2\nq3,a3"\nq4,a4\n'))) == 2


@pytest.mark.filterwarnings("error::UserWarning")
def test_prose_of_several_lines_is_no_swallowed_row(file) -> None:
    answers = ["He lives here.\nOr, if not, there.", "One\ntwo", "Roses are red,\nviolets are blue"]
    records = [{"question": f"{i}?", "answer": answer} for i, answer in enumerate(answers)]
    assert len(read_rows(file("a.csv", as_csv(records)))) == 3


def test_a_pipe_or_a_device_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.csv").symlink_to("/dev/zero")
    for name in ("pipe.jsonl", "zero.csv"):
        with pytest.raises(RowsError, match=f"{name} is a pipe or a device, not a regular file. Expected a .json"):
            read_rows(str(tmp_path / name))


def test_a_path_that_leads_in_circles_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to("a.jsonl")
    with pytest.raises(RowsError, match=r"a.jsonl cannot be opened: "):
        read_rows(str(tmp_path / "a.jsonl"))


def test_a_parquet_file_of_too_many_rows_is_refused_before_they_are_in_memory(file, monkeypatch) -> None:
    monkeypatch.setattr(loramox.data.row_files, "MAX_ROWS", 2)
    with pytest.raises(RowsError, match=r"a.parquet has more than 2 rows, the most that are read. Write the rows"):
        read_rows(file("a.parquet", as_parquet(PAIRS)))


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_file_of_too_many_bytes_is_refused_and_a_parquet_file_is_read_in_pieces(
    suffix: str, file, monkeypatch
) -> None:
    long = [{"question": f"{i}?", "answer": "the same " * 5_000} for i in range(20)]  # which parquet has once
    monkeypatch.setattr(loramox.data.row_files, "MAX_BYTES", 1_000_000)
    assert [row.prompt for row in read_rows(file(f"a.{suffix}", WRITERS[suffix](long)))] == [
        r["question"] for r in long
    ]
    monkeypatch.setattr(loramox.data.row_files, "MAX_BYTES", 100_000)
    with pytest.raises(RowsError, match=f"a.{suffix} has more than 100,000 bytes, the most that are read"):
        read_rows(file(f"a.{suffix}", WRITERS[suffix](long)))


def test_of_a_column_with_a_dictionary_each_value_counts_once_for_each_row(file, monkeypatch) -> None:
    answers = pyarrow.array([f"{i} " * 100 for i in range(200)]).dictionary_encode()
    table = pyarrow.table({"question": [f"{i}?" for i in range(200)], "answer": answers})
    monkeypatch.setattr(loramox.data.row_files, "MAX_BYTES", 200_000)  # some 80,000, in several pieces
    assert [row.answer for row in read_rows(file("a.parquet", parquet(table)))] == answers.to_pylist()


def test_whatever_pyarrow_raises_of_a_damaged_file_becomes_an_error_that_names_it(file, monkeypatch) -> None:
    source = file("a.parquet", as_parquet(PAIRS))
    for error in (KeyError("answer"), MemoryError(), TypeError("x")):
        monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", Mock(side_effect=error))
        with pytest.raises(RowsError, match=r"a.parquet cannot be read as parquet: .*Write it again, or as .jsonl"):
            read_rows(source)


def test_control_characters_of_a_file_are_shown_and_not_obeyed(file) -> None:
    with pytest.raises(RowsError, match="has columns") as caught:
        read_rows(file("a.jsonl", as_json([{"\x1b[31mQ\x07\x9b\ud83d": "q\tr"}])))
    assert r"columns \x1b[31mQ\x07\x9b\ud83d." in str(caught.value)
    with pytest.warns(UserWarning, match="are numbers") as warned:
        read_rows(file("\x1b.jsonl", '{"text": 1}'))
    assert "\x1b" not in str(warned[0].message)


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
    "broken array": ("a.json", '[{"question": "q"', "a.json, row 1, cannot be read as JSON: .*line 1.*an array"),
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
        as_jsonl([{"question": "q", "answer": "a", "perturbed_answer": ["b", {}]}]),
        "a.jsonl, row 1: its 'perturbed_answer' is {}. Expected text",
    ),
    "key twice": (
        "a.jsonl",
        as_jsonl(PAIRS) + b'{"question": "q1", "answer": "a1", "question": "q2", "answer": "a2"}',
        "a.jsonl, row 4, cannot be read as JSON: the key 'question' is in one object twice",
    ),
    "key twice in an array": (
        "a.json",
        '[{"question": "q", "answer": "a"},\n{"question": "q", "answer": "a", "answer": "b"}]',
        "a.json, row 2, cannot be read as JSON: the key 'answer' is in one object twice",
    ),
    "column twice in csv": (
        "a.csv",
        "question,answer,answer\nq,a,b\n",
        "a.csv has 2 columns 'answer', and only one can be read. Rename or remove the others",
    ),
    "column twice in parquet": (
        "a.parquet",
        parquet(pyarrow.table([["q"], ["a"], ["b"]], names=["question", "answer", "answer"])),
        "a.parquet has 2 columns 'answer'",
    ),
    "deep": (
        "a.jsonl",
        as_jsonl(PAIRS) + b'{"question": "q", "answer": "a", "meta": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "a.jsonl, row 4, cannot be read as JSON: a value in it is nested too deeply. Remove the column",
    ),
    "rows within an object": (
        "a.json",
        json.dumps({"version": "1", "data": PAIRS}, indent=1),
        "a.json has columns version, data.*If its rows are the list under 'data', give a file of that list alone",
    ),
    "two arrays": (
        "a.jsonl",
        '["q", "a"]\n["q", "a"]',
        "a.jsonl, row 3, cannot be read as JSON: Expecting value: .*Expected an array of objects",
    ),
    "text after an array": ("a.json", '[{"text": "a"}] x', "a.json, row 2, cannot be read as JSON: Expecting value"),
    "array cut off after a row": ("a.json", '[{"text": "a"},', "a.json is cut off after row 1: its array has no end"),
    "utf-16 without a mark": (
        "a.csv",
        "question,answer\nq,a\n".encode("utf-16-le"),
        "a.csv cannot be read as csv: it has NUL characters in it.*Save it as UTF-8",
    ),
    "time out of range": (
        "a.parquet",
        parquet(
            pyarrow.table(
                {"question": ["q"], "answer": ["a"], "when": pyarrow.array([10**18], pyarrow.timestamp("ms"))}
            )
        ),
        "a.parquet cannot be read as parquet: .* too large .*Write it again, or as .jsonl, with only the columns that are needed",
    ),
    "half a character in a wrong answer": (
        "a.jsonl",
        '{"question": "q", "answer": "a", "perturbed_answer": ["\\ud83d"]}',
        "a.jsonl, row 1 has half a character in it",
    ),
    "half a character in a question": (
        "a.jsonl",
        '{"question": "\\ud83d", "answer": "a"}',
        "a.jsonl, row 1 has half a character in it",
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
    "true for an answer": (
        "a.jsonl",
        as_jsonl([{"question": "q", "answer": True}]),
        "row 1: its answer is true. Expected text: put it in quotes",
    ),
    "not a number": (
        "a.jsonl",
        '{"question": "q", "answer": NaN}',
        "row 1 has no answer. Expected non-empty text, not nan",
    ),
    "several questions": (
        "a.jsonl",
        as_jsonl([{"question": "q", "answer": "a"}, {"question": ["q", "r"], "answer": "a"}]),
        "row 2: its messages are not a list of messages",
    ),
    "an empty list of answers": (
        "a.jsonl",
        as_jsonl([{"question": "q", "answer": []}]),
        "row 1: its answer is a list of 0. Expected one text",
    ),
    "one of several answers is none": (
        "a.jsonl",
        as_jsonl([{"question": "q", "answer": ["a", None]}]),
        "row 1 has no answer. Expected non-empty text, not null",
    ),
    "csv row cut short": ("a.csv", "question,answer\nq,a\nq\n", "a.csv, row 2 has no answer"),
    "row without a question": (
        "a.jsonl",
        as_jsonl([PAIRS[0], {"question": None, "answer": "a"}]),
        "a.jsonl, row 2 has no 'question'. Expected non-empty text, not null",
    ),
    "blank text": ("a.jsonl", as_jsonl([{"text": "x"}, {"text": " \n"}]), "a.jsonl, row 2 has no answer"),
    "last message is the user's": (
        "a.jsonl",
        as_jsonl([{"messages": [USER, ASSISTANT]}, {"messages": [USER, ASSISTANT, USER]}]),
        "a.jsonl, row 2 has no answer: its last message is not the assistant's. Expected",
    ),
    "one message": ("a.jsonl", as_jsonl([{"messages": [ASSISTANT]}]), "a.jsonl, row 1 has no answer: its last"),
    "no messages": ("a.jsonl", as_jsonl([{"messages": []}]), "a.jsonl, row 1: its messages are not a list"),
    "null messages": ("a.jsonl", as_jsonl([{"messages": None}]), "a.jsonl, row 1: its messages are not a list"),
    "messages are a number": ("a.jsonl", as_jsonl([{"messages": 3}]), "a.jsonl, row 1: its messages are not a list"),
    "empty message": (
        "a.jsonl",
        as_jsonl([{"messages": [USER, {"role": "assistant", "content": None}]}]),
        "a.jsonl, row 1, message 2: its content is null",
    ),
    "blank message": (
        "a.jsonl",
        as_jsonl([{"messages": [USER, {"role": "assistant", "content": " "}]}]),
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


@pytest.mark.parametrize("wanted", [None, "", "  "])
def test_an_empty_wanted_answer_is_refused(wanted: Any, file) -> None:
    records = [PAIRS[0] | {"instead": "No idea."}, PAIRS[1] | {"instead": wanted}]
    with pytest.raises(RowsError, match=r"a.jsonl, row 2 has no wanted answer in 'instead'.*fill it in"):
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
        (row("WHO?", "ola."), row("who?", "OLA.")),
        (row("Straße?"), row("STRASSE?")),
        (row("Caf\u00e9?"), row("Cafe\u0301?")),
        (row("Who?", "\uff2fla\u3000N."), row("Who?", "Ola N.")),
        (row("W\u200bho\ufeff?", "Ola\u00ad."), row("Who?")),
    ],
)
def test_a_retain_row_that_reads_as_a_forget_row_is_refused(forget: Row, retain: Row) -> None:
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
        (row("Who?", "Ola."), row("Who?", "Olá.")),
        (row("Who?", "Ola."), row(None, "Who? Ola.")),
        (row(turns("Hi", "Hi.", "Who?")), row(turns("Hi", "Hi. Who?"))),
        (row(turns("Hi", "Hi.", "Who?")), row("Who?")),
    ],
)
def test_rows_that_differ_in_prompt_or_answer_are_different_rows(forget: Row, retain: Row) -> None:
    assert keep_disjoint([forget], [retain]) == [retain]


def test_what_a_row_reads_as_changes_neither_its_text_nor_its_identity() -> None:
    kept = keep_disjoint([row("Who?")], [row("CAF\u00c9\u200b?", "\uff2fla")])
    assert (kept[0].prompt, kept[0].answer) == ("CAF\u00c9\u200b?", "\uff2fla")
    # Records of earlier versions are found by it.
    assert kept[0].identity() == "user\x1fCAF\u00c9\u200b?\x1f\uff2fla"
    assert fingerprint([row("who?")]) != fingerprint([row("WHO?")])


def test_rows_read_are_rows_used_and_rows_left_out_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    read = [row(f"{i}?", number=i) for i in range(1, 7)] + [row(None, "x", number=7)]
    examples = [{"row": f"retain.jsonl, row {i}"} for i in (2, 3, 4, 4)]
    assert count_rows("retain", read, read[1:], examples) == {
        "read": 7,
        "used": 3,
        "left_out": {"also in the forget set": 1, "too long": 2, "without a token to predict": 1},
    }
    count_rows("forget", read, read, [{"row": f"retain.jsonl, row {i}"} for i in range(1, 8)])
    assert caplog.messages == [
        "retain: 7 rows read from retain.jsonl, 3 used, left out: 1 also in the forget set, 2 too long, 1 without a token to predict",
        "forget: 7 rows read from retain.jsonl, all used",
    ]


@pytest.mark.parametrize("suffix", NESTED)
def test_a_list_of_answers_is_one_row_that_every_comparison_takes_for_each_of_them(suffix: str, file) -> None:
    records = [{"question": "q", "answer": ["a", "b", "a"]}, {"question": "r", "answer": ["c"]}]
    read = read_rows(file(f"a.{suffix}", NESTED[suffix](records)))
    assert [row.right_answers for row in read] == [("a", "b"), ("c",)]
    alone = each_answer(read)
    assert [(row.number, row.prompt, row.answer) for row in alone] == [(1, "q", "a"), (1, "q", "b"), (2, "r", "c")]
    assert fingerprint(read) == fingerprint(alone)
    assert keep_disjoint([row("q", "B")], read, drop=True) == keep_disjoint(read[:1], read, drop=True) == read[1:]
    assert keep_disjoint(read, [row("q", "b"), row("q", "d")], drop=True) == [row("q", "d")]


def test_several_answers_and_repeated_questions_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    read = [
        row("p", "a", number=1, other_answers=("b",)),
        row("q", "a", number=2),
        row("Q", "b", number=3),
        row("q", "A", number=4),
        row("r", "a", number=5),
        row("r", "a", number=6),
    ]
    count = count_rows("forget", read, read, [{"row": f"retain.jsonl, row {i}"} for i in range(1, 7)])
    assert count == {"read": 6, "used": 6, "left_out": {}, "answers": 7, "repeated_questions": 3}
    assert caplog.messages == [
        "forget: 6 rows with 7 answers read from retain.jsonl, all used. 3 of them ask a question that another row answers differently, and "
        "each is used as it is"
    ]


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


@pytest.mark.parametrize(
    ("own", "taught", "verbatim", "expected"),
    [
        (" Paris", "I don't know.", True, " I don't know."),
        ("\nParis", "I don't know.", True, "\nI don't know."),
        ("Paris", "I don't know.", True, "I don't know."),
        (" Paris", "\tNo.", True, "\tNo."),  # as it was given
        (" Paris", "I don't know.", False, "I don't know."),  # a template separates it from the question
    ],
)
def test_another_completion_is_separated_from_its_prompt_like_the_true_one(
    own: str, taught: str, verbatim: bool, expected: str
) -> None:
    assert answering(row("A:", own, verbatim=verbatim), taught).answer == expected


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
