"""Forget, retain and holdout rows: read from any common format, recognised by their columns, checked before use."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from loramox.data.row_files import load
from loramox.errors import RowsError

# Column names that are recognised without a flag: the prompt's, then the answer's.
QUESTION_ANSWER = ("question", "answer")
PROMPT_COMPLETION = ("prompt", "completion")
READ_BY_TEMPLATES = ("documents", "function_call", "tool_call_id", "tool_calls", "tools")  # beside role and content
MESSAGES = '[{"role": "user", …}, {"role": "assistant", …}]'


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
    records = load(source)
    if not records:
        raise RowsError(f"{source} has no rows. Expected at least one: check that the file is the right one")
    recognised = _Recognised(source, list(records[0]), columns)
    rows = [recognised.row(number, record) for number, record in enumerate(records, 1)]
    for row in rows:
        try:
            row.key().encode()
        except UnicodeEncodeError as error:
            raise RowsError(
                f"{source}, row {row.number} has half a character in it (a lone surrogate, like \\ud83d in JSON), which no "
                "tokenizer takes. Correct or remove it"
            ) from error
    return rows


class _Recognised:
    """What the columns of a file mean: makes a `Row` of each record."""

    def __init__(self, source: str, found: list[str], columns: Columns) -> None:
        """Raises `RowsError` unless `columns` names some of those found, or they have the names that are recognised."""
        self.source, self.wanted = source, columns.wanted_column
        self.pair = (columns.prompt_column, columns.answer_column) if columns.prompt_column else None
        self.messages, self.text = columns.messages_column, columns.text_column
        for setting in fields(columns):
            name = getattr(columns, setting.name)
            if name and name not in found:
                raise RowsError(f"{source} has no column '{name}' (--{setting.name}). It has: {', '.join(found)}")
        if not (self.pair or self.messages or self.text):
            self.pair = next((p for p in (QUESTION_ANSWER, PROMPT_COMPLETION) if set(p) <= set(found)), None)
            self.messages = "messages" if not self.pair and "messages" in found else None
            self.text = "text" if not self.pair and not self.messages and "text" in found else None
        if not (self.pair or self.messages or self.text):
            raise RowsError(
                f"{source} has columns {', '.join(found)}. Expected question and answer, prompt and completion, messages, or text; "
                "name others with --prompt_column and --answer_column, --messages_column or --text_column"
            )

    def row(self, number: int, record: dict[str, Any]) -> Row:
        if self.pair:
            return self._of_pair(number, record)
        if self.messages:
            return self._of_messages(number, record, record[self.messages])
        return self._answer(number, record, None, record[self.text])

    def _of_pair(self, number: int, record: dict[str, Any]) -> Row:
        prompt, answer = (record[name] for name in self.pair)
        if isinstance(prompt, list):  # TRL's conversational prompt/completion: two lists of messages
            answer = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
            return self._of_messages(number, record, prompt + answer)
        if not isinstance(prompt, str):
            raise RowsError(f"{self.source}, row {number} has no '{self.pair[0]}'. Expected text")
        return self._answer(number, record, prompt, answer, verbatim=self.pair == PROMPT_COMPLETION)

    def _of_messages(self, number: int, record: dict[str, Any], turns: Any) -> Row:
        where = f"{self.source}, row {number}"
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise RowsError(f"{where}: its messages are not a list of messages. Expected {MESSAGES}")
        beside = {name for of in (record, *turns) for name in READ_BY_TEMPLATES if of.get(name)}
        if beside:
            raise RowsError(
                f"{where}: {', '.join(sorted(beside))} would be left out of what the model reads. Give the whole text as prompt and "
                "completion, or remove it"
            )
        if len(turns) < 2 or turns[-1].get("role") != "assistant":
            raise RowsError(f"{where} has no answer: its last message is not the assistant's. Expected {MESSAGES}")
        turns = tuple({"role": turn.get("role"), "content": turn.get("content")} for turn in turns)
        return self._answer(number, record, turns[:-1], turns[-1]["content"])

    def _answer(self, number: int, record: dict[str, Any], prompt: Any, answer: Any, **more: Any) -> Row:
        where = f"{self.source}, row {number}"
        if not isinstance(answer, str) or not answer.strip():
            raise RowsError(
                f"{where} has no answer. Expected non-empty text, not {json.dumps(answer, default=str)}: fill it in, "
                "or remove the row"
            )
        wanted = record[self.wanted] if self.wanted else None
        if self.wanted and (not isinstance(wanted, str) or not wanted.strip()):
            raise RowsError(
                f"{where} has no wanted answer in '{self.wanted}'. Expected non-empty text: fill it in, or leave out --wanted_column"
            )
        return Row(self.source, number, answer, prompt, wanted=wanted, **more, **_variants(where, record))


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
