"""Forget, retain and holdout rows: read from any common format, recognised by their columns, checked before use."""

import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from loramox.data.messages import MESSAGES, REASONING, read_messages
from loramox.data.row import Row
from loramox.data.row_files import load
from loramox.data.text import check_characters, number_as_text, shown
from loramox.errors import RowsError, escaped
from loramox.files import replacing
from loramox.settings import setting

# Column names that are recognised without a flag: the prompt's, then the answer's.
QUESTION_ANSWER = ("question", "answer")
PROMPT_COMPLETION = ("prompt", "completion")
ALPACA = ("instruction", "output")
ALPACA_INPUT = "input"  # what an instruction is about, if that is a column of its own
VARIANTS = ("paraphrased_answer", "paraphrased_question", "perturbed_answer")  # TOFU's


@dataclass
class Data:
    """Which rows to forget and which to hold in place."""

    forget: str = setting("Rows to forget: .json, .jsonl, .csv, .parquet, or a hub data set owner/name:config[:split].")
    retain: str = setting(
        "Rows to retain, or auto: the model writes them. Same forms as --forget; auto is for training and plan."
    )
    drop_overlap: bool = setting("Leave out retain rows that are also forget rows, instead of refusing them.", False)


@dataclass
class Columns:
    """Which columns hold what, where the recognised names (question/answer, prompt/completion, messages, text) are not used."""

    prompt_column: str | None = setting("Column of the question or prompt.", None)
    answer_column: str | None = setting("Column of the answer, on which loss and KL are computed.", None)
    messages_column: str | None = setting("Column of chat messages; the last one is the answer.", None)
    text_column: str | None = setting("Column of plain text, cut into blocks.", None)
    wanted_column: str | None = setting(
        "Forget rows only: column of the answer wanted instead, for targeted unlearning.", None
    )

    def __post_init__(self) -> None:
        if (self.prompt_column is None) != (self.answer_column is None):
            raise RowsError("--prompt_column and --answer_column go together: give both, or neither")


def read_rows(source: str, columns: Columns | None = None) -> list[Row]:
    """Read the rows of a file or hub data set.

    Args:
        source: a JSON, JSON Lines, CSV or Parquet file, or a hub data set `owner/name[:config[:split]]`.
        columns: which columns hold what, where they do not have one of the recognised names.

    Raises:
        RowsError: names the file, the row and the remedy. A file that is missing, empty or broken; no known columns; a row
            without an answer, or with text that would be hidden from the model.
    """
    return rows_of(load(source), source, columns)


def rows_of(records: Sequence[dict[str, Any]], source: str, columns: Columns | None = None) -> list[Row]:
    """The rows of records that are in memory, as `read_rows` makes them of a file. `source` is their name in messages."""
    if not records:
        raise RowsError(f"{source} has no rows. Expected at least one: check that the file is the right one")
    reader = _Reader(source, records, columns or Columns())
    rows = [reader.row(number, record) for number, record in enumerate(records, 1)]
    for note in reader.notes(rows, records):
        warnings.warn(escaped(f"{source}: {note}"), stacklevel=2)
    return rows


def write_rows(path: Path, rows: Iterable[Row], columns: Columns) -> None:
    """Write JSON Lines that `read_rows(path, columns)` reads; no one but the owner may."""
    lines = [json.dumps(record_of(row, columns), ensure_ascii=False) for row in rows]
    with replacing(path, private=True) as partial:
        partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def record_of(row: Row, columns: Columns) -> dict[str, Any]:
    """The row as `rows_of` reads it with these columns, without what only evaluation uses.

    A row for which these columns have no place, such as a question beside plain text, gets the recognised ones.
    """
    wanted = {columns.wanted_column: row.wanted} if columns.wanted_column else {}
    named = dict.fromkeys(name for name in asdict(columns).values() if name) | wanted  # the reader expects each of them
    if row.prompt is None:
        return named | {columns.text_column or "text": row.answer}
    said = {"role": "assistant", "content": row.answer, **dict(row.reasoning)}
    pair = columns.prompt_column, columns.answer_column
    if columns.messages_column and not all(pair):
        asked = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else row.prompt
        return named | {columns.messages_column: [*asked, said]}
    answer = [said] if row.reasoning else [*row.right_answers] if row.other_answers else row.answer
    joined = pair == PROMPT_COMPLETION and isinstance(row.prompt, str)  # as they are, with no template in between
    if all(pair) and joined == row.verbatim:
        return named | {pair[0]: row.prompt, pair[1]: answer}
    prompt_name, answer_name = PROMPT_COMPLETION if row.verbatim else QUESTION_ANSWER
    return {prompt_name: row.prompt, answer_name: answer} | wanted


class _Reader:
    """What the columns of a file mean: makes a `Row` of each record."""

    def __init__(self, source: str, records: Sequence[dict[str, Any]], columns: Columns) -> None:
        """Raises `RowsError` unless `columns` names some of those found, or they have the names that are recognised."""
        found = list(records[0])
        self.source, self.wanted = source, columns.wanted_column
        pair = columns.prompt_column, columns.answer_column
        self.pair = pair if all(pair) else None
        self.messages, self.text = columns.messages_column, columns.text_column
        self.input: str | None = None
        self.numbers: list[tuple[int, str]] = []  # the row and the text of each number that was read as text
        for column in fields(columns):
            name = getattr(columns, column.name)
            if name and name not in found:
                raise RowsError(f"{source} has no column '{name}' (--{column.name}). It has: {', '.join(found)}")
        if not (self.pair or self.messages or self.text):
            known = (QUESTION_ANSWER, PROMPT_COMPLETION, ALPACA)
            self.pair = next((p for p in known if set(p) <= set(found)), None)
            self.input = ALPACA_INPUT if self.pair == ALPACA and ALPACA_INPUT in found else None
            self.messages = "messages" if not self.pair and "messages" in found else None
            self.text = "text" if not self.pair and not self.messages and "text" in found else None
        if not (self.pair or self.messages or self.text):
            raise RowsError(
                f"{source} has columns {', '.join(found)}. Expected question and answer, prompt and completion, messages, or text; "
                f"name others with --prompt_column and --answer_column, --messages_column or --text_column{_wrapped(records)}"
            )

    def row(self, number: int, record: dict[str, Any]) -> Row:
        if self.pair:
            return self._of_pair(number, record, *self.pair)
        if self.messages:
            return self._of_messages(number, record, record[self.messages])
        return self._answer(number, record, None, record[self.text])

    def notes(self, rows: Sequence[Row], records: Sequence[dict[str, Any]]) -> Iterable[str]:
        """What the user should know about how the rows were read."""
        if self.numbers:
            number, text = self.numbers[0]
            yield (
                f"{len(self.numbers)} of its values are numbers, and are read as text (first: row {number}, '{text[:40]}'). Put them in "
                "quotes if that is meant, or correct them"
            )
        if not self.pair:
            return
        used = {*self.pair, self.input, self.wanted, *VARIANTS}
        # One word is a name or an id, as a rule.
        unread = [name for name in records[0] if name not in used and any(_has_text(r[name]) for r in records)]
        if len(rows) > 1 and all(row.prompt == rows[0].prompt for row in rows):
            of = f", and column '{', '.join(unread)}' is not read" if unread else ""
            yield f"all {len(rows)} rows ask the same question{of}. If another column tells them apart, put its text into the question"
        elif unread:
            yield f"column '{', '.join(unread)}' is not read. If the answer depends on it, put its text into the question"

    def _of_pair(self, number: int, record: dict[str, Any], prompt_column: str, answer_column: str) -> Row:
        prompt, answer = record[prompt_column], record[answer_column]
        if isinstance(prompt, list):  # TRL's conversational prompt/completion: two lists of messages
            if isinstance(answer, list):
                return self._of_messages(number, record, prompt + answer)
            return self._answer(number, record, read_messages(self._where(number), record, prompt), answer)
        prompt = self._text(number, f"'{prompt_column}'", prompt, may_be_blank=True)
        if self.input and record[self.input] is not None:
            about = self._text(number, f"'{self.input}'", record[self.input], may_be_blank=True)
            prompt = f"{prompt}\n{about}" if about.strip() else prompt
        return self._answer(number, record, prompt, answer, verbatim=self.pair == PROMPT_COMPLETION)

    def _of_messages(self, number: int, record: dict[str, Any], messages: Any) -> Row:
        turns = read_messages(self._where(number), record, messages)
        if len(turns) < 2 or turns[-1]["role"] != "assistant":
            raise RowsError(
                f"{self._where(number)} has no answer: its last message is not the assistant's. Expected {MESSAGES}"
            )
        reasoning = tuple((key, turns[-1][key]) for key in REASONING if key in turns[-1])
        return self._answer(number, record, turns[:-1], turns[-1]["content"], reasoning=reasoning)

    def _answer(self, number: int, record: dict[str, Any], prompt: Any, answer: Any, **more: Any) -> Row:
        several = answer if isinstance(answer, list) and answer and prompt is not None else [answer]
        answer, *others = dict.fromkeys(self._text(number, "answer", each) for each in several)
        wanted = self._text(number, f"wanted answer in '{self.wanted}'", record[self.wanted]) if self.wanted else None
        more |= {"other_answers": tuple(others), **self._variants(number, record)}
        return Row(self.source, number, answer, prompt, wanted=wanted, **more)

    def _variants(self, number: int, record: dict[str, Any]) -> dict[str, Any]:
        """What TOFU's perturbed rows have besides question and answer."""
        names = {"paraphrase": VARIANTS[0], "paraphrased_prompt": VARIANTS[1]}
        texts = {of: self._text(number, f"'{n}'", record[n]) for of, n in names.items() if record.get(n) is not None}
        wrong = record.get(VARIANTS[2]) or []
        wrong = wrong if isinstance(wrong, list) else [wrong]
        return texts | {"wrong_answers": tuple(self._text(number, f"'{VARIANTS[2]}'", each) for each in wrong)}

    def _where(self, number: int) -> str:
        return f"{self.source}, row {number}"

    def _text(self, number: int, what: str, value: Any, may_be_blank: bool = False) -> str:
        """The value, if it is text, or a number as it is written. Raises `RowsError` for everything else."""
        where = self._where(number)
        if (text := number_as_text(value)) is not None:
            self.numbers.append((number, text))
            return text
        if isinstance(value, list):
            raise RowsError(f"{where}: its {what} is a list of {len(value)}. Expected one text")
        missing = value is None or (isinstance(value, str) and not value.strip()) or value != value  # NaN
        if missing and not (may_be_blank and isinstance(value, str)):
            raise RowsError(
                f"{where} has no {what}. Expected non-empty text, not {shown(value)}: fill it in, or remove the row"
            )
        if not isinstance(value, str):
            raise RowsError(f"{where}: its {what} is {shown(value)}. Expected text: put it in quotes, or correct it")
        check_characters(where, value)
        return value


def _has_text(value: Any) -> bool:
    """Whether a value is text of several words, or a list or object that holds some."""
    if isinstance(value, list | dict):
        return any(map(_has_text, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and len(value.split()) > 1


def _wrapped(records: Sequence[dict[str, Any]]) -> str:
    """The end of a message, for a JSON file that is one object with the rows in it."""
    lists = [
        name for name, value in records[0].items() if isinstance(value, list) and value and isinstance(value[0], dict)
    ]
    if len(records) > 1 or not lists:
        return ""
    return (
        f". The file is one object. If its rows are the list under '{', '.join(lists)}', give a file of that list alone"
    )
