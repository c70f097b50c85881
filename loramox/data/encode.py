"""Rows → token ids and an answer mask: tokenised, so that only answers are learned from."""

import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from loramox.data.rows import Row
from loramox.errors import RowsError, SettingsError
from loramox.settings import check_choices

IGNORED = -100  # transformers' label for "no loss here"

DEFAULT_TEMPLATE = "Question: {prompt}\nAnswer:"  # for tokenizers without a chat template

# A template that prints the date would make other tokens of a row each day. This is Llama 3's own day where it has no clock.
SOME_DAY = datetime(2024, 7, 26)
_CLOCK = "".join(f"|replace('%{sign}', '{SOME_DAY.strftime('%' + sign)}')" for sign in "aAbBdHIjmMpSyY")
STOPPED_CLOCK = f"{{%- macro strftime_now(format) -%}}{{{{ format{_CLOCK} }}}}{{%- endmacro %}}{{{{ '' }}}}"

Example = dict[str, Any]  # input_ids, labels: lists of equal length; row: where it came from


@dataclass
class Tokenisation:
    """How rows become tokens."""

    prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "Text around a question, with {prompt} in it and ending where the answer begins. Default: the tokenizer's "
            "chat template, or 'Question: {prompt}\\nAnswer:' when it has none. prompt/completion rows are joined as they are."
        },
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Longest row in tokens. Default: the model's context."}
    )
    long_rows: str = field(
        default="refuse",
        metadata={
            "help": "Rows longer than that: refuse, truncate (the end of the answer), or drop.",
            "choices": ["refuse", "truncate", "drop"],
        },
    )

    def __post_init__(self) -> None:
        check_choices(self)
        if self.prompt_template is not None and "{prompt}" not in self.prompt_template:
            raise SettingsError(
                "prompt_template has no {prompt} in it; --prompt_template needs it where the question goes"
            )
        if self.max_length is not None and self.max_length < 2:
            raise SettingsError(
                f"max_length is {self.max_length}; --max_length needs at least 2 tokens, a prompt's and an answer's"
            )


def encode(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, how: Tokenisation, context: int) -> list[Example]:
    """Rows → examples, labels being `IGNORED` on everything but the answer's tokens and the end-of-sequence token.

    Plain text is cut into blocks of max_length tokens, each an example; the last token of a block is also the first of
    the next, so that every token has one to be predicted from. Everything else is one example a row.

    Raises `RowsError` when rows are longer than max_length (or than the model's context) and `long_rows` is refuse.
    """
    if not tokenizer.is_fast:
        raise RowsError(
            f"{type(tokenizer).__name__} cannot map tokens to text; a fast tokenizer (tokenizer.json) is needed"
        )
    limit = min(how.max_length or context, context)
    encoded = [(row, _encode_row(row, tokenizer, how)) for row in rows]
    if how.long_rows == "refuse":
        _refuse_long(
            [(row, len(ids)) for row, (ids, _) in encoded if row.prompt is not None and len(ids) > limit], rows, limit
        )
    examples: list[Example] = []
    for row, (ids, labels) in encoded:
        if how.long_rows == "drop" and row.prompt is not None and len(ids) > limit:
            continue
        starts = range(0, max(1, len(ids) - 1), limit - 1) if row.prompt is None else [0]
        for start in starts:
            block = slice(start, start + limit)
            # The first token of a sequence is predicted from nothing.
            if any(label != IGNORED for label in labels[block][1:]):
                examples.append(
                    {"input_ids": ids[block], "labels": labels[block], "row": f"{row.source}, row {row.number}"}
                )
            elif row.prompt is not None:
                raise RowsError(
                    f"{row.source}, row {row.number}: its prompt alone fills {limit} tokens. Shorten it, or use --long_rows drop"
                )
    if not examples:
        raise RowsError(
            f"{rows[0].source}: no row is left within {limit} tokens. Raise --max_length, or use --long_rows truncate"
        )
    return examples


def _refuse_long(long: list[tuple[Row, int]], rows: Sequence[Row], limit: int) -> None:
    if long:
        row, length = long[0]
        raise RowsError(
            f"{len(long)} of {len(rows)} rows of {row.source} are longer than {limit} tokens (first: row {row.number}, {length} "
            "tokens). Cut the end of their answers with --long_rows truncate, or leave them out with --long_rows drop"
        )


def _encode_row(row: Row, tokenizer: PreTrainedTokenizerBase, how: Tokenisation) -> tuple[list[int], list[int]]:
    """Token ids and labels of a whole row. Answer tokens are those that reach past the prompt's last character."""
    prompt, full, special = _as_text(row, tokenizer, how)
    given = _end_of_words(full, len(prompt), row.given_words)
    encoding = tokenizer(full, return_offsets_mapping=True, add_special_tokens=special)
    ids = list(encoding["input_ids"])
    # Special tokens the tokenizer adds have the span (0, 0): they are context, not answer. An empty span further on is a
    # token of white space, where a tokenizer trims its spans.
    labels = [
        token if end > given else IGNORED for token, (_, end) in zip(ids, encoding["offset_mapping"], strict=True)
    ]
    eos = tokenizer.eos_token_id if row.ends else None
    if special and eos is not None and ids[-1] != eos:
        ids.append(eos)
    if special and eos is not None:
        labels = [*labels[: len(ids) - 1], eos]
    return ids, labels


def _end_of_words(text: str, start: int, words: int) -> int:
    """Where the first `words` words after `start` end."""
    for word in itertools.islice(re.finditer(r"\S+", text[start:]), words):
        end = word.end()
    return start + end if words else start


def _as_text(row: Row, tokenizer: PreTrainedTokenizerBase, how: Tokenisation) -> tuple[str, str, bool]:
    """(prompt, prompt + answer, whether the tokenizer has still to add its special tokens)."""
    if row.prompt is None or row.verbatim:
        prompt = row.prompt or ""
        return prompt, prompt + row.answer, True
    chat = row.prompt
    if isinstance(row.prompt, str):
        if how.prompt_template is not None or tokenizer.chat_template is None:
            prompt = (how.prompt_template or DEFAULT_TEMPLATE).replace("{prompt}", row.prompt)
            space = "" if prompt[-1:].isspace() else " "
            return prompt, prompt + space + row.answer, True
        chat = ({"role": "user", "content": row.prompt},)
    if tokenizer.chat_template is None:
        raise RowsError(
            f"{row.source} has chat messages, but the tokenizer has no chat template. Use question/answer rows"
        )
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = STOPPED_CLOCK + template
    full, other = (
        tokenizer.apply_chat_template(
            [*chat, {"role": "assistant", "content": answer}], tokenize=False, chat_template=template
        )
        for answer in (row.answer, "\ue000")
    )
    # What a template puts behind the end of a turn (a line break, as a rule) is not the model's to say.
    if full.rstrip().endswith(tuple(tokenizer.all_special_tokens)):
        full = full.rstrip()
    # The answer begins where another answer would begin. A generation prompt is no guide: templates put more into it than
    # into a finished turn, or less (an empty thinking block).
    return os.path.commonprefix([full, other]), full, False  # noqa: RUF071 (characters, not folders)
