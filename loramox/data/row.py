"""A row: an answer and what it answers. When two rows are one, and which rows follow from others."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from loramox.data.messages import REASONING
from loramox.errors import RowsError

T = TypeVar("T")

# Characters of no width: soft hyphens, joiners, marks of direction, variation selectors, byte order marks.
_INVISIBLE = re.compile("[\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff]")


@dataclass(frozen=True)
class Row:
    """One row: an answer and what it answers. Plain text is an answer to nothing (`prompt` is None)."""

    source: str
    number: int  # counted from 1
    answer: str
    prompt: str | tuple[dict[str, str], ...] | None = None
    wanted: str | None = None
    reasoning: tuple[tuple[str, str], ...] = ()  # keys and texts that the chat template puts before the answer
    other_answers: tuple[str, ...] = ()  # right too: all are trained on, and the best counts
    verbatim: bool = False  # prompt and answer are joined as they are, with no template in between
    ends: bool = True  # False: a piece of a longer text, after which no end of sequence is put
    # For evaluation alone, from TOFU's columns paraphrased_answer, perturbed_answer and paraphrased_question.
    paraphrase: str | None = None
    wrong_answers: tuple[str, ...] = ()
    paraphrased_prompt: str | None = None
    given_words: int = 0  # so many first words of the answer count as part of the question
    as_served: bool = False  # behind the prompt of a server, even where training has another (see `loramox.data.chat`)

    @property
    def where(self) -> str:
        """The file and the row, as messages and records name them."""
        return f"{self.source}, row {self.number}"

    @property
    def right_answers(self) -> tuple[str, ...]:
        return (self.answer, *self.other_answers)

    def identity(self) -> str:
        """Prompt and answer, white space aside: finds the row again in records, also in those of earlier versions.

        A question is the same as a chat of one user message.
        """
        turns = self.prompt or ()
        if isinstance(turns, str):
            turns = ({"role": "user", "content": turns},)
        parts = [turn[part] for turn in turns for part in ("role", "content", *REASONING) if part in turn]
        return "\x1f".join(" ".join(str(part).split()) for part in [*parts, self.answer])

    def key(self) -> str:
        """What makes two rows the same row to a reader: their `identity` without case, Unicode forms and invisible characters.

        For comparison alone: nothing is trained on it.
        """
        text = self.identity()
        if not text.isascii():
            text = _INVISIBLE.sub("", unicodedata.normalize("NFKC", text))
            text = "\x1f".join(" ".join(part.split()) for part in text.split("\x1f"))
        return text.casefold()


def keep_disjoint(forget: Sequence[Row], retain: Sequence[Row], drop: bool = False) -> list[Row]:
    """The retain rows, none of which may be a forget row; `drop` leaves out those that are.

    Raises `RowsError` for a row in both, and where none is left.
    """
    shared = also_in(retain, forget)
    if shared and not drop:
        first = shared[0]
        raise RowsError(
            f"{len(shared)} of {len(retain)} rows of {first.source} are also in {forget[0].source} (first: row {first.number}), case and white "
            "space aside. A row cannot be forgotten and retained: remove them, or drop them from retain with --drop_overlap"
        )
    dropped = {id(row) for row in shared}
    kept = [row for row in retain if id(row) not in dropped]
    if not kept:
        raise RowsError(
            f"no retain rows are left: all {len(retain)} rows of {retain[0].source} are also in {forget[0].source}"
        )
    return kept


def each_answer(rows: Iterable[Row]) -> list[Row]:
    """The rows with one answer each: a row of several right answers once for each of them."""
    return [replace(row, answer=answer, other_answers=()) for row in rows for answer in row.right_answers]


def also_in(rows: Sequence[Row], others: Iterable[Row]) -> list[Row]:
    """Those of `rows` that have a question and a right answer in common with one of `others`."""
    known = {each.key() for each in each_answer(others)}
    return [row for row in rows if any(each.key() in known for each in each_answer([row]))]


def question_of(row: Row) -> str:
    """The text that a row asks: its prompt, or all turns of its chat; empty for plain text."""
    return row.prompt if isinstance(row.prompt, str) else " ".join(turn["content"] for turn in row.prompt or ())


def last_question(row: Row) -> str:
    """What a row asks last: its prompt, or the last turn of its chat; empty for plain text."""
    return row.prompt if isinstance(row.prompt, str) else row.prompt[-1]["content"] if row.prompt else ""


def wanted_rows(forget: Iterable[Row]) -> list[Row]:
    """The forget rows with the wanted answer in the place of theirs, for targeted unlearning."""
    return [answering(row, row.wanted) for row in each_answer(forget) if row.wanted is not None]


def answering(row: Row, answer: str) -> Row:
    """The row with another answer in the place of its own, and without the reasoning that led to its own."""
    if row.verbatim and not answer[:1].isspace():  # nothing else separates it from the prompt
        answer = row.answer[: len(row.answer) - len(row.answer.lstrip())] + answer
    return replace(row, answer=answer, wanted=None, reasoning=())


def spread(rows: Sequence[T], most: int) -> list[T]:
    """At most so many of the rows, at even distances: a file often has the rows of one subject together."""
    return [rows[i * len(rows) // most] for i in range(most)] if len(rows) > most else list(rows)


def fingerprint(rows: Iterable[Row]) -> str:
    """SHA-256 over the rows' contents in order: tells whether two runs saw the same data, and no more."""
    digest = hashlib.sha256()
    for row in each_answer(rows):
        parts = [row.prompt, row.answer, row.wanted, *([row.reasoning] if row.reasoning else [])]
        digest.update(json.dumps(parts, ensure_ascii=False).encode())
        digest.update(b"\n")
    return digest.hexdigest()
