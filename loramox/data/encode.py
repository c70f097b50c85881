"""Rows → token ids and an answer mask, so that only answers are trained on."""

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from loramox.data.chat import ChatTemplate, Messages, any_of, end_tokens, special_tokens
from loramox.data.row import Row, each_answer
from loramox.data.words import first_words
from loramox.errors import RowsError, SettingsError
from loramox.settings import check_choices, refuse, setting

IGNORED = -100  # transformers' label for "no loss here"

DEFAULT_TEMPLATE = "Question: {prompt}\nAnswer:"  # for tokenizers without a chat template

TEXT_BLOCK = 2048  # tokens: a block of plain text, where nothing else is asked for and the context has room for it

Example = dict[str, Any]  # input_ids, labels: lists of equal length; row: where it came from


@dataclass
class Tokenisation:
    """How rows become tokens."""

    prompt_template: str | None = setting(
        "Text around a question, with {prompt} in it and ending where the answer begins. Default: the tokenizer's "
        "chat template, or 'Question: {prompt}\\nAnswer:' when it has none. prompt/completion rows are joined as they are.",
        None,
    )
    max_length: int | None = setting(
        f"Longest row in tokens. Default: the model's context; for blocks of plain text no more than {TEXT_BLOCK}.",
        None,
    )
    long_rows: str = setting(
        "Rows longer than --max_length: refuse, truncate (the end of the answer), or drop.",
        "refuse",
        choices=["refuse", "truncate", "drop"],
    )

    def __post_init__(self) -> None:
        check_choices(self)
        if self.prompt_template is not None and "{prompt}" not in self.prompt_template:
            raise SettingsError(
                "prompt_template has no {prompt} in it; --prompt_template needs it where the question goes"
            )
        fine = self.max_length is None or self.max_length >= 2
        refuse("max_length", self.max_length, fine, "at least 2 tokens, a prompt's and an answer's")


def encode(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, how: Tokenisation, context: int) -> list[Example]:
    """Rows → examples, labels being `IGNORED` on everything but the answer's tokens and the one that ends it.

    An answer under a chat template ends with the token that the template puts behind it, other answers with the
    end-of-sequence token. Plain text is cut into blocks of max_length tokens, each an example; the last token of a block is also
    the first of the next, so that every token has one to be predicted from. Everything else is one example for each right answer
    of a row.

    Raises:
        RowsError: rows are longer than max_length (or than the model's context) and `long_rows` is refuse; the text of a row has
            special tokens in it; the chat template refuses a row.
        ModelError: rows go through a chat template that cannot be used.
        SettingsError: max_length is more than the context.
    """
    if not tokenizer.is_fast:
        raise RowsError(
            f"{type(tokenizer).__name__} cannot map tokens to text; a fast tokenizer (tokenizer.json) is needed"
        )
    if how.max_length is not None and how.max_length > context:
        raise SettingsError(
            f"max_length is {how.max_length}, and the model's context {context} tokens. Give --max_length no more than that, or leave it out"
        )
    rows = each_answer(rows)
    limit = how.max_length or context
    block = how.max_length or min(context, TEXT_BLOCK)
    encoder = _Encoder(tokenizer, how)
    encoder.refuse_special(rows)
    encoded = [(row, encoder.encode(row)) for row in rows]
    long = [(row, len(ids)) for row, (ids, _) in encoded if row.prompt is not None and len(ids) > limit]
    if long and how.long_rows == "refuse":
        row, length = long[0]
        raise RowsError(
            f"{len(long)} of {len(rows)} rows of {row.source} are longer than {limit} tokens (first: row {row.number}, {length} "
            "tokens). Cut the end of their answers with --long_rows truncate, or leave them out with --long_rows drop"
        )
    dropped = {row.where for row, _ in long} if how.long_rows == "drop" else set()  # with all their right answers
    examples: list[Example] = []
    for row, (ids, labels) in encoded:
        if row.where in dropped:
            continue
        parts = encoder.blocks(ids, labels, block) if row.prompt is None else [(ids[:limit], labels[:limit])]
        for tokens, targets in parts:
            # The first token of a sequence is predicted from nothing.
            if any(label != IGNORED for label in targets[1:]):
                examples.append({"input_ids": tokens, "labels": targets, "row": row.where})
            elif row.prompt is not None:
                raise RowsError(
                    f"{row.where}: its prompt alone fills {limit} tokens. Shorten it, or use --long_rows drop"
                )
    if not examples:
        raise RowsError(
            f"{rows[0].source}: no row is left within {limit} tokens. Raise --max_length, or use --long_rows truncate"
        )
    return examples


def served_otherwise(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, how: Tokenisation
) -> dict[str, str] | None:
    """What comes after a question in these rows (`trained`) and from a server (`served`); None where it is the same.

    Rows with reasoning do not count: theirs is a server's.
    """
    encoder = _Encoder(tokenizer, how)
    if (
        not any(encoder.messages(row) for row in rows if not row.reasoning)
        or encoder.chat.trained == encoder.chat.served
    ):
        return None
    return {"trained": encoder.chat.trained, "served": encoder.chat.served}


def may_think(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, how: Tokenisation) -> bool:
    """Whether rows without reasoning go through a chat template that can make the model think first."""
    encoder = _Encoder(tokenizer, how)
    without = any(encoder.messages(row) for row in rows if not row.reasoning)
    return without and "enable_thinking" in tokenizer.get_chat_template()


class _Encoder:
    """A tokenizer and what it takes to make tokens of rows with it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, how: Tokenisation) -> None:
        self.tokenizer, self.how = tokenizer, how
        special, self.ends = special_tokens(tokenizer), end_tokens(tokenizer)
        self.special, self.any_special = set(special.values()), any_of(special)
        self.end_texts = [text for text, token in special.items() if token in self.ends]
        self.any_end = any_of(self.end_texts)

    @functools.cached_property
    def chat(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer)

    def messages(self, row: Row) -> Messages | None:
        """The messages of a row that goes through the chat template."""
        if row.prompt is None or row.verbatim:
            return None
        if isinstance(row.prompt, str):
            templates = self.how.prompt_template is None and self.tokenizer.chat_template is not None
            return ({"role": "user", "content": row.prompt},) if templates else None
        if self.tokenizer.chat_template is None:
            raise RowsError(
                f"{row.source} has chat messages, but the tokenizer has no chat template. Use question/answer rows"
            )
        return row.prompt

    def refuse_special(self, rows: Sequence[Row]) -> None:
        """Raises `RowsError` for text that the tokenizer would take for special tokens: a turn would end in the middle of it.

        Prompt and completion are joined as they are, and may have any but an end that is not the last of the completion.
        """

        def found_in(row: Row) -> re.Match[str] | None:
            if row.verbatim:
                last = next(filter(row.answer.endswith, self.end_texts), "")
                return self.any_end.search(row.answer.removesuffix(last))
            turns = [text for m in row.prompt for text in m.values()] if isinstance(row.prompt, tuple) else [row.prompt]
            texts = [*turns, *dict(row.reasoning).values(), row.answer]
            matches = (self.any_special.search(text) for text in texts if text)
            return next(filter(None, matches), None)

        if found := [(row, match.group()) for row in rows if (match := found_in(row))]:
            row, token = found[0]
            raise RowsError(
                f"{len(found)} of {len(rows)} rows of {row.source} have a special token of the model in their text (first: row {row.number}, "
                f"{token}). The model would read it as the token, not as text. Write it otherwise, with a space in it, or leave these rows out"
            )

    def blocks(self, ids: list[int], labels: list[int], size: int) -> Iterator[tuple[list[int], list[int]]]:
        """The token ids and labels of a text's blocks. Each begins with the last token of the one before.

        In front of it is the beginning of sequence, if the tokenizer puts one there: some models (Gemma) predict nothing well
        without it.
        """
        first = ids[:1] if size > 2 and ids[:1] == [self.tokenizer.bos_token_id] else []
        at, size = len(first), size - len(first)
        for start in range(at, max(at + 1, len(ids) - 1), size - 1):
            part = slice(start, start + size)
            targets = [IGNORED] * at + labels[part]
            if start > at > 0:
                targets[at] = IGNORED  # the block before has it
            yield first + ids[part], targets

    def encode(self, row: Row) -> tuple[list[int], list[int]]:
        """Token ids and labels of a whole row. Answer tokens are those that reach past the prompt's last character."""
        prompt, full, special = self._as_text(row)
        given = len(prompt) + len(first_words(full[len(prompt) :], row.given_words))
        encoding = self.tokenizer(full, return_offsets_mapping=True, add_special_tokens=special)
        ids = list(encoding["input_ids"])
        bos = self.tokenizer.bos_token_id
        if special and bos is not None and ids[:2] == [bos, bos]:
            raise RowsError(
                f"{row.where} begins with {self.tokenizer.bos_token}, which the tokenizer puts there itself. Leave it out"
            )
        # Special tokens the tokenizer adds have the span (0, 0): they are context, not answer. An empty span further on is a
        # token of white space, where a tokenizer trims its spans. Some special tokens take the white space behind them.
        labels = [
            token if end > given and (start >= given or token not in self.special) else IGNORED
            for token, (start, end) in zip(ids, encoding["offset_mapping"], strict=True)
        ]
        eos = self.tokenizer.eos_token_id if row.ends else None
        if special and eos is not None:
            if ids[-1] not in self.ends:
                ids.append(eos)
            labels = [*labels[: len(ids) - 1], ids[-1]]
        return ids, labels

    def _as_text(self, row: Row) -> tuple[str, str, bool]:
        """(prompt, prompt + answer, whether the tokenizer has still to add its special tokens)."""
        if messages := self.messages(row):
            return *self.chat.text(messages, row.answer, row.where, row.as_served, row.reasoning), False
        prompt = row.prompt or ""
        assert isinstance(prompt, str)  # chats have gone through the template
        if row.prompt is None or row.verbatim:
            return prompt, prompt + row.answer, True
        prompt = (self.how.prompt_template or DEFAULT_TEMPLATE).replace("{prompt}", prompt)
        space = "" if prompt[-1:].isspace() else " "
        return prompt, prompt + space + row.answer, True
