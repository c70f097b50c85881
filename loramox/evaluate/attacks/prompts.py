"""Attacks by asking otherwise: the question in other words, or with the first words of the answer given away."""

from collections.abc import Sequence
from dataclasses import replace

from loramox.data.rows import Row

PREFIX_WORDS = (1, 3, 5)


def paraphrased_questions(rows: Sequence[Row]) -> list[Row]:
    """The rows that have a paraphrased question, with it in the place of the question. Their other answers are left out."""
    return [
        replace(r, prompt=r.paraphrased_prompt, paraphrase=None, wrong_answers=()) for r in rows if r.paraphrased_prompt
    ]


def as_served(rows: Sequence[Row]) -> list[Row]:
    """The rows behind the prompt that a server makes of them, where training has another. Their other answers are left out."""
    return [replace(r, as_served=True, paraphrase=None, wrong_answers=()) for r in rows]


def given_away(rows: Sequence[Row], words: int) -> list[Row]:
    """Question rows whose answer is longer than `words` words, and from which only the rest is still asked.

    The answer stays as it is, so that the model reads question and beginning in the form that it knows; `given_words`
    words of it are no longer scored.
    """
    return [
        replace(r, given_words=words, paraphrase=None, wrong_answers=())
        for r in rows
        if isinstance(r.prompt, str) and len(r.answer.split()) > words
    ]
