"""Forget, retain and holdout rows: read from any common format, recognised by their columns, checked before use."""

import csv
import hashlib
import io
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loramox.errors import RowsError

FORMATS = (".json", ".jsonl", ".csv", ".parquet")

# Column names that are recognised without a flag: the prompt's, then the answer's.
QUESTION_ANSWER = ("question", "answer")
PROMPT_COMPLETION = ("prompt", "completion")


@dataclass
class Data:
    """Which rows to forget and which to hold in place."""

    forget: str = field(
        metadata={"help": "Rows to forget: .json, .jsonl, .csv, .parquet, or a hub data set owner/name:config[:split]."}
    )
    retain: str = field(metadata={"help": "Rows whose answers are to stay as they are, in any of the same forms."})
    drop_overlap: bool = field(
        default=False, metadata={"help": "Leave out retain rows that are also forget rows, instead of refusing them."}
    )


@dataclass
class Columns:
    """Which columns hold what, where the recognised names (question/answer, prompt/completion, messages, text) are not used."""

    prompt_column: str | None = field(default=None, metadata={"help": "Column of the question or prompt."})
    answer_column: str | None = field(
        default=None, metadata={"help": "Column of the answer, on which loss and KL are taken."}
    )
    messages_column: str | None = field(
        default=None, metadata={"help": "Column of chat messages; the last one is the answer."}
    )
    text_column: str | None = field(default=None, metadata={"help": "Column of plain text, cut into blocks."})
    wanted_column: str | None = field(
        default=None,
        metadata={"help": "Forget rows only: column of the answer wanted instead, for targeted unlearning."},
    )

    def __post_init__(self) -> None:
        if (self.prompt_column is None) != (self.answer_column is None):
            raise RowsError("--prompt_column and --answer_column go together: give both, or neither")


@dataclass(frozen=True)
class Row:
    """One row: an answer and what it answers. Plain text is an answer to nothing (`prompt` is None)."""

    source: str
    number: int  # counted from 1
    answer: str
    prompt: str | tuple[dict[str, str], ...] | None = None
    wanted: str | None = None
    verbatim: bool = False  # prompt and answer are joined as they are, with no template in between
    ends: bool = True  # False: a piece of a longer text, after which no end of sequence is put
    # For evaluation alone, from TOFU's columns paraphrased_answer, perturbed_answer and paraphrased_question.
    paraphrase: str | None = None
    wrong_answers: tuple[str, ...] = ()
    paraphrased_prompt: str | None = None
    given_words: int = 0  # so many first words of the answer count as part of the question

    def key(self) -> str:
        """What makes two rows the same row, wherever they come from: prompt and answer, white space aside.

        A question is the same as a chat of one user message.
        """
        turns = self.prompt or ()
        if isinstance(turns, str):
            turns = ({"role": "user", "content": turns},)
        parts = [turn[part] for turn in turns for part in ("role", "content")] + [self.answer]
        return "\x1f".join(" ".join(str(part).split()) for part in parts)


def read_rows(source: str, columns: Columns | None = None) -> list[Row]:
    """The rows of a JSON, JSON Lines, CSV or Parquet file, or of a hub data set `owner/name[:config[:split]]`.

    Raises `RowsError` naming the file, the row and the remedy: missing or empty file, broken line, no known columns,
    a row without an answer.
    """
    columns = columns or Columns()
    records = _load(source)
    if not records:
        raise RowsError(f"{source} has no rows. Expected at least one: check that the file is the right one")
    to_row = _recognise(source, list(records[0]), columns)
    rows = [to_row(number, record) for number, record in enumerate(records, 1)]
    for row in rows:
        try:
            row.key().encode()
        except UnicodeEncodeError as error:
            raise RowsError(
                f"{source}, row {row.number} has half a character in it (a lone surrogate, like \\ud83d in JSON), which no "
                "tokenizer takes. Correct or remove it"
            ) from error
    return rows


def _load(source: str) -> list[dict[str, Any]]:
    """The records of a file or hub data set, each with every column that any of them has."""
    path = Path(source)
    if path.is_dir() or (path.suffix in FORMATS and not path.exists()):
        what = "is a folder" if path.is_dir() else "does not exist"
        raise RowsError(
            f"{source} {what}. Expected a .json, .jsonl, .csv or .parquet file, or a hub data set owner/name:config"
        )
    if not path.exists():
        return _load_from_hub(source)
    if path.suffix not in FORMATS:
        raise RowsError(f"{source} ends in '{path.suffix}'. Expected one of {', '.join(FORMATS)}")
    # Not with `datasets`: it makes numbers and dates of answers that look like some, and leaves a copy of the rows, which
    # are to be forgotten, in its cache.
    try:
        records = list(_read_parquet(path) if path.suffix == ".parquet" else _read_text(source, path))
    except RowsError:
        raise
    except (OSError, ValueError) as error:
        raise RowsError(f"{source} cannot be read as {path.suffix[1:]}: {error}") from error
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict) or None in record:
            raise RowsError(
                f"{source}, row {number} does not fit the columns. Expected a value for each column, and no more: "
                'in JSON {"question": "…", "answer": "…"}, in CSV quotes around text with a comma or line break in it'
            )
    columns = dict.fromkeys(name for record in records for name in record)
    return [columns | record for record in records]


def _load_from_hub(source: str) -> list[dict[str, Any]]:
    from datasets import load_dataset

    name, config, split = [*source.split(":"), "", ""][:3]
    try:
        return load_dataset(name, config or None, split=split or "train").to_list()
    except (OSError, ValueError) as error:
        raise RowsError(
            f"{source} is no file, and as a hub data set (owner/name:config:split) it failed: {error}"
        ) from error


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path, partitioning=None).to_pylist()


def _read_text(source: str, path: Path) -> Iterable[Any]:
    """The records of a CSV file, of a JSON array, or of JSON Lines."""
    text = path.read_bytes().decode("utf-8-sig")  # read_text would change line ends, which may be part of an answer
    if path.suffix == ".csv":
        csv.field_size_limit(sys.maxsize)  # its default is less than a book
        reader, number = csv.DictReader(io.StringIO(text, newline=""), strict=True), 0
        try:
            for number, record in enumerate(reader, 1):  # noqa: B007 (used when the next row fails)
                yield record
        except csv.Error as error:
            raise RowsError(
                f"{source}, row {number + 1}, cannot be read as CSV: {error}. Expected text in double quotes, and each "
                "double quote within it twice"
            ) from error
    elif text.lstrip().startswith("["):
        yield from json.loads(text)
    else:
        # Not splitlines, which also splits at line ends that JSON allows inside a string.
        for number, line in enumerate(filter(str.strip, text.split("\n")), 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise RowsError(
                    f"{source}, row {number}, cannot be read as JSON: {error}. Expected one object a line"
                ) from error


def _recognise(source: str, found: list[str], columns: Columns):
    """The function (number, record) → Row that fits the columns found."""
    pair = (columns.prompt_column, columns.answer_column) if columns.prompt_column else None
    wanted, messages, text = columns.wanted_column, columns.messages_column, columns.text_column
    for flag, name in (("--prompt_column", pair and pair[0]), ("--answer_column", pair and pair[1]), ("--messages_column", messages),
                       ("--text_column", text), ("--wanted_column", wanted)):  # fmt: skip
        if name and name not in found:
            raise RowsError(f"{source} has no column '{name}' ({flag}). It has: {', '.join(found)}")
    if not (pair or messages or text):
        pair = next((p for p in (QUESTION_ANSWER, PROMPT_COMPLETION) if set(p) <= set(found)), None)
        messages = "messages" if not pair and "messages" in found else None
        text = "text" if not pair and not messages and "text" in found else None

    def answer_row(number: int, record: dict[str, Any], prompt: Any, answer: Any, **more: Any) -> Row:
        where = f"{source}, row {number}"
        if not isinstance(answer, str) or not answer.strip():
            raise RowsError(
                f"{where} has no answer. Expected non-empty text, not {json.dumps(answer, default=str)}: fill it in, "
                "or remove the row"
            )
        if wanted and (not isinstance(record[wanted], str) or not record[wanted].strip()):
            raise RowsError(
                f"{where} has no wanted answer in '{wanted}'. Expected non-empty text: fill it in, or leave out --wanted_column"
            )
        return Row(
            source,
            number,
            answer,
            prompt,
            wanted=record[wanted] if wanted else None,
            **more,
            **_variants(where, record),
        )

    def from_pair(number: int, record: dict[str, Any]) -> Row:
        prompt, answer = record[pair[0]], record[pair[1]]
        if isinstance(prompt, list):  # TRL's conversational prompt/completion: two lists of messages
            answer = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
            return from_messages(number, {**record, "messages": prompt + answer}, "messages")
        if not isinstance(prompt, str):
            raise RowsError(f"{source}, row {number} has no '{pair[0]}'. Expected text")
        return answer_row(number, record, prompt, answer, verbatim=pair == PROMPT_COMPLETION)

    def from_messages(number: int, record: dict[str, Any], column: str | None = None) -> Row:
        turns = record[column or messages]
        turns = turns if isinstance(turns, list) else []
        turns = tuple({"role": t.get("role"), "content": t.get("content")} for t in turns if isinstance(t, dict))
        if len(turns) < 2 or turns[-1]["role"] != "assistant":
            raise RowsError(
                f"{source}, row {number} has no answer: its last message is not the assistant's. Expected "
                '[{"role": "user", …}, {"role": "assistant", …}]'
            )
        return answer_row(number, record, turns[:-1], turns[-1]["content"])

    if pair:
        return from_pair
    if messages:
        return from_messages
    if text:
        return lambda number, record: answer_row(number, record, None, record[text])
    raise RowsError(
        f"{source} has columns {', '.join(found)}. Expected question and answer, prompt and completion, messages, or text; "
        "name others with --prompt_column and --answer_column, --messages_column or --text_column"
    )


def _variants(where: str, record: dict[str, Any]) -> dict[str, Any]:
    """What TOFU's perturbed rows have besides question and answer. Raises `RowsError` when it is not text."""
    paraphrase, question = record.get("paraphrased_answer"), record.get("paraphrased_question")
    wrong = record.get("perturbed_answer") or []
    wrong = [wrong] if isinstance(wrong, str) else wrong
    texts = [text for text in (paraphrase, question) if text is not None]
    if not isinstance(wrong, list) or any(not isinstance(text, str) or not text.strip() for text in [*texts, *wrong]):
        raise RowsError(
            f"{where}: paraphrased_answer and paraphrased_question are to be text, and perturbed_answer a list of wrong "
            "answers; one of them is not, or is empty. Correct it, or remove the column"
        )
    return {"paraphrase": paraphrase, "wrong_answers": tuple(wrong), "paraphrased_prompt": question}


def keep_disjoint(forget: Sequence[Row], retain: Sequence[Row], drop: bool = False) -> list[Row]:
    """The retain rows, none of which may be a forget row. With `drop`, those that are are left out.

    Raises `RowsError` with the count otherwise: what is to be forgotten cannot be held in place at the same time.
    """
    forgotten = {row.key() for row in forget}
    kept = [row for row in retain if row.key() not in forgotten]
    shared = len(retain) - len(kept)
    if shared and not drop:
        first = next(row for row in retain if row.key() in forgotten)
        raise RowsError(
            f"{shared} of {len(retain)} rows of {first.source} are also in {forget[0].source} (first: row {first.number}). "
            "A row cannot be forgotten and retained: remove them, or drop them from retain with --drop_overlap"
        )
    if not kept:
        raise RowsError(
            f"no retain rows are left: all {len(retain)} rows of {retain[0].source} are also in {forget[0].source}"
        )
    return kept


def wanted_rows(forget: Iterable[Row]) -> list[Row]:
    """The forget rows with the wanted answer in the place of theirs, for targeted unlearning."""
    return [replace(row, answer=row.wanted, wanted=None) for row in forget if row.wanted is not None]


def fingerprint(rows: Iterable[Row]) -> str:
    """SHA-256 over the rows' contents in order: tells whether two runs saw the same data, and no more."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.prompt, row.answer, row.wanted], ensure_ascii=False).encode())
        digest.update(b"\n")
    return digest.hexdigest()
